"""From a GGUF file to a folder that every tool loads: safetensors, config, tokenizer, template."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from polylens.errors import ModelError
from polylens.models.gguf_header import check_header


def convert_gguf(source: Path, target: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write the weights of a GGUF file, dequantised, with its tokenizer, into a new folder.

    The dequantised values are rounded to `dtype`; bfloat16's relative error of 2⁻⁹ is far below
    that of the 4-bit quantisation that such files carry.

    Args:
        source: the GGUF file.
        target: the folder to make.
        dtype: of the weights written.

    Raises:
        ModelError: transformers cannot read the file.
    """
    check_header(source)
    try:
        # transformers draws a bar of its own here, which no setting of it switches off.
        with contextlib.redirect_stderr(io.StringIO()):
            model: Any = AutoModelForCausalLM.from_pretrained(
                source.parent,
                gguf_file=source.name,
                quantization_config=GgufConfig(dequantize=True),
                dtype=dtype,
                local_files_only=True,
            )
        tokenizer = AutoTokenizer.from_pretrained(
            source.parent, gguf_file=source.name, local_files_only=True
        )
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"{source} must be a GGUF file of an architecture that transformers reads, but it "
            f"cannot ({reason}); check the file"
        ) from error
    # The weights are plain tensors now; with its quantizer attached, the model refuses to be saved.
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    # A GGUF names no limits of generation; what stops it is the tokenizer's end of turn.
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
