"""The merged model as one GGUF file for llama.cpp and what is built on it.

Written only for architectures and tokenizers whose files were loaded again and compared: Llama,
Qwen2 and Qwen3 with byte-level BPE. For any other, llama.cpp's own convert_hf_to_gguf.py takes the
folder of the merged model. The vocabulary is in `gguf_tokenizer`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as QuantizationType
from torch import Tensor

from polylens.artefacts import writing
from polylens.crown import CrownDelta
from polylens.errors import ModelError, UsageError, nearest
from polylens.export.gguf_tokenizer import add_tokenizer
from polylens.merging import MAX_LOST_RATIO, lost_ratio
from polylens.models.loading import LanguageModel
from polylens.progress import Progress, silent

Numbers = Literal["float32", "float16", "bfloat16", "q8_0"]

_QUANTIZATION = {
    "float32": QuantizationType.F32,
    "float16": QuantizationType.F16,
    "bfloat16": QuantizationType.BF16,
    "q8_0": QuantizationType.Q8_0,
}
_FILE_TYPE = {
    "float32": gguf.LlamaFileType.ALL_F32,
    "float16": gguf.LlamaFileType.MOSTLY_F16,
    "bfloat16": gguf.LlamaFileType.MOSTLY_BF16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
}

# transformers' model types, and llama.cpp's architectures.
ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
}

# What an architecture's graph in llama.cpp takes for granted.
_EXPECTED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "use_sliding_window": False,
}


@dataclass(frozen=True)
class GgufExport:
    """What a file holds.

    Attributes:
        numbers: format of the matrices; vectors, such as norms, are float32.
        lost_ratio: what rounding did, ‖rounded - exact‖ / ‖change‖, over the weights that changed;
            above 1 where it moved them further than training.
        n_tensors: weights written.
    """

    numbers: Numbers
    lost_ratio: float
    n_tensors: int


def save_gguf(
    model: LanguageModel,
    delta: CrownDelta,
    path: str | Path,
    *,
    strength: float = 1.0,
    numbers: Numbers | None = None,
    progress: Progress = silent,
) -> GgufExport:
    """Write the merged model as a GGUF file, whole or not at all.

    Args:
        model: the untouched model; it is not changed.
        delta: what training changed.
        path: the file to write.
        strength: the dial: W + strength · change.
        numbers: format of the matrices; None takes float16 unless rounding to it loses more than
            a tenth of the change, else float32. "q8_0" (8 bits, a scale for each 32 numbers) keeps
            float16 where a row is not a multiple of 32.
        progress: told the tensors done.

    Raises:
        ModelError: the architecture or the tokenizer is not one that was verified.
        UsageError: no such format of numbers.
    """
    if numbers is not None and numbers not in get_args(Numbers):
        raise UsageError(
            f"numbers of a GGUF file must be one of {', '.join(get_args(Numbers))}, got "
            f"{numbers!r}{nearest(numbers, get_args(Numbers))}"
        )
    if numbers is None:
        loses = lost_ratio(model, delta, torch.float16, strength) > MAX_LOST_RATIO
        numbers = "float32" if loses else "float16"
    config = model.causal_lm.config
    architecture = check_architecture(config)
    names = _tensor_names(model, architecture)
    wanted = _QUANTIZATION[numbers]
    with writing(Path(path)) as temporary:
        writer = gguf.GGUFWriter(temporary, gguf.MODEL_ARCH_NAMES[architecture])
        _add_settings(writer, model, numbers)
        add_tokenizer(writer, model.tokenizer, config.vocab_size)
        extra = _rope_factors(model)
        for name, values in extra.items():
            writer.add_tensor_info(name, values.shape, values.dtype, values.nbytes)
        shapes = {name: tuple(tensor.shape) for name, tensor in _weights(model)}
        kinds = {name: _kind(shape, wanted) for name, shape in shapes.items()}
        for name, shape in shapes.items():
            kind = kinds[name]
            block, n_bytes = gguf.GGML_QUANT_SIZES[kind]
            size = int(np.prod(shape)) // block * n_bytes
            writer.add_tensor_info(names[name], shape, np.dtype(np.float32), size, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for values in extra.values():
            writer.write_tensor_data(values)
        lost = total = 0.0
        for number, (name, tensor) in enumerate(_weights(model)):
            progress(number, len(shapes), "writing GGUF")
            original = tensor.detach().cpu().float()
            change = delta.changes.get(name)
            exact = original if change is None else original + strength * change
            data = gguf.quants.quantize(_arranged(name, exact, config), kinds[name])
            writer.write_tensor_data(data)
            if change is not None:
                read = gguf.quants.dequantize(data, kinds[name]).reshape(exact.shape)
                lost += float(np.square(read - _arranged(name, exact, config), dtype=float).sum())
                total += float((strength * change).double().square().sum())
        progress(len(shapes), len(shapes), "writing GGUF")
        writer.close()
    return GgufExport(numbers, (lost / total) ** 0.5 if total else 0.0, len(shapes) + len(extra))


def check_architecture(config: Any) -> gguf.MODEL_ARCH:
    """Return llama.cpp's name of a model's architecture.

    Raises:
        ModelError: it is not one that GGUF files are written for, or one of its settings is not.
    """
    instead = (
        "export it as merged and give that folder to llama.cpp's convert_hf_to_gguf.py instead"
    )
    if config.model_type not in ARCHITECTURES:
        raise ModelError(
            f"GGUF files are written for {', '.join(ARCHITECTURES)}, got a model of type "
            f"{config.model_type}; {instead}"
        )
    found = {name: getattr(config, name, expected) for name, expected in _EXPECTED.items()}
    rope = config.rope_parameters["rope_type"]
    known = ("default", "llama3") if config.model_type == "llama" else ("default",)
    odd = [f"{name}={value}" for name, value in found.items() if value != _EXPECTED[name]]
    if rope not in known:
        odd.append(f"rope_type={rope}")
    if odd:
        raise ModelError(
            f"GGUF files are written for {config.model_type} models with usual settings, got "
            f"{', '.join(odd)}; {instead}"
        )
    return ARCHITECTURES[config.model_type]


def _kind(shape: tuple[int, ...], wanted: QuantizationType) -> QuantizationType:
    if len(shape) == 1:
        return QuantizationType.F32  # llama.cpp computes with norms and biases as they are
    if wanted == QuantizationType.Q8_0 and shape[-1] % 32:
        return QuantizationType.F16
    return wanted


def _weights(model: LanguageModel) -> Iterator[tuple[str, Tensor]]:
    """Yield every weight once, under its first name: a head that is the embedding is not stored."""
    yield from model.causal_lm.named_parameters()


def _tensor_names(model: LanguageModel, architecture: gguf.MODEL_ARCH) -> dict[str, str]:
    known = gguf.get_tensor_name_map(architecture, model.structure.n_layers)
    names = {}
    for name, _ in _weights(model):
        own = known.get_name(name, try_suffixes=(".weight", ".bias"))
        if own is None:
            raise ModelError(
                f"every weight must have a name in llama.cpp's {architecture.name.lower()} models, "
                f"but {name} has none; export it as merged instead"
            )
        names[name] = own
    return names


def _arranged(name: str, weight: Tensor, config: Any) -> np.ndarray[Any, Any]:
    """Return a weight as llama.cpp's graph wants it.

    Rotary embedding turns pairs of rows of each head's queries and keys. transformers pairs row i
    with row i + head_dim / 2; llama.cpp's Llama graph pairs neighbours, so the two halves of each
    head are interleaved. Its Qwen graphs pair as transformers does.
    """
    heads = {
        "self_attn.q_proj.weight": config.num_attention_heads,
        "self_attn.k_proj.weight": config.num_key_value_heads,
    }
    n_heads = heads.get(".".join(name.split(".")[-3:]))
    if config.model_type == "llama" and n_heads is not None:
        halves = weight.reshape(n_heads, 2, -1, weight.shape[1])
        weight = halves.transpose(1, 2).reshape(weight.shape)
    arranged: np.ndarray[Any, Any] = weight.contiguous().numpy()
    return arranged


def _rope_factors(model: LanguageModel) -> dict[str, np.ndarray[Any, Any]]:
    """Return what Llama 3's scaling divides each rotary frequency by; nothing where it is not."""
    config = model.causal_lm.config
    if config.rope_parameters["rope_type"] == "default":
        return {}
    frequencies = model.causal_lm.get_decoder().rotary_emb.inv_freq.detach().cpu().double()
    exponents = torch.arange(len(frequencies), dtype=torch.float64) / len(frequencies)
    plain = config.rope_parameters["rope_theta"] ** -exponents
    return {"rope_freqs.weight": (plain / frequencies).float().numpy()}


def _add_settings(writer: gguf.GGUFWriter, model: LanguageModel, numbers: Numbers) -> None:
    config = model.causal_lm.config
    head_dim = getattr(config, "head_dim", None) or (
        config.hidden_size // config.num_attention_heads
    )
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(model.name)
    if model.source is not None and model.source.license is not None:
        writer.add_license(model.source.license)
    writer.add_file_type(_FILE_TYPE[numbers])
    if numbers == "q8_0":
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
