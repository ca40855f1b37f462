"""A model in memory, ready for the engine: structure, tokenizer, fingerprint, device and dtype.

`load_model` takes anything that `polylens.models.source` can find; `wrap_model` takes a
transformers model that you already hold. Both return a `LanguageModel`, which every later step
takes.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import accelerate
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel

from polylens.errors import ModelError
from polylens.machine import computing_dtype
from polylens.models.source import ModelSource, describe, resolve
from polylens.models.streaming import Streaming
from polylens.models.structure import DecoderStructure, find_structure, stream
from polylens.progress import Progress

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


# Weights that are widened and hashed at a time: the largest matrices are gigabytes.
_PIECE = 2**22

# How a model is run, stored or named, rather than what it computes.
_INERT_SETTINGS = frozenset(
    ("architectures", "dtype", "torch_dtype", "transformers_version", "use_cache", "name_or_path")
)


@dataclass(eq=False)
class LanguageModel:
    """A decoder-only language model with its tokenizer.

    Attributes:
        structure: the model taken apart; `structure.causal_lm` is the transformers model.
        tokenizer: its tokenizer.
        name: a short name for reports.
        source: where the weights came from; None for a model given in memory.
    """

    structure: DecoderStructure
    tokenizer: Any
    name: str
    source: ModelSource | None = None

    @property
    def causal_lm(self) -> PreTrainedModel:
        """The transformers model."""
        return self.structure.causal_lm

    @property
    def context_length(self) -> int | None:
        """Tokens that it can read at once; None where its settings do not tell."""
        settings = self.causal_lm.config.get_text_config()
        return getattr(settings, "max_position_embeddings", None)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over names, shapes and values of all weights.

        Values are hashed as float32, which holds every bfloat16 and float16 exactly, so the
        fingerprint does not depend on the dtype that the weights are held in.
        """
        return _fingerprint(self.causal_lm)


def load_model(
    spec: str | Path,
    *,
    revision: str | None = None,
    device: str = "auto",
    dtype: Dtype | torch.dtype = "auto",
    streamed: bool = False,
    offline: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> LanguageModel:
    """Load a model from a folder, a GGUF file, the registry (see `polylens models`) or the Hub.

    Args:
        spec: folder, `.gguf` file, registry name or Hub id.
        revision: branch, tag or commit of a Hub model.
        device: "auto" (cuda, else mps, else cpu) or a torch device such as "cuda:1".
        dtype: dtype to compute in; "auto" is the stored one, but float32 on a CPU that is not
            faster in the stored one.
        streamed: leave the weights in their files and read each layer when it is needed; for
            models larger than memory, or than the GPU.
        offline: never use the network.
        trust_remote_code: let the model's own Python code run. Off unless you trust its author.
        progress: told about downloads.

    Raises:
        ModelError: no such model, or not a decoder-only language model.
        DownloadError: the weights cannot be fetched.
    """
    where = choose_device(device)
    source = resolve(str(spec), revision=revision, offline=offline, progress=progress)
    facts = describe(source.folder, trust_remote_code=trust_remote_code)
    if dtype == "auto":
        computing = computing_dtype(getattr(torch, facts.dtype), where)
    else:
        computing = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    try:
        opened: Any = AutoModelForCausalLM.from_pretrained(
            source.folder,
            output_loading_info=True,
            # In the stored dtype, weights are mapped from their files rather than read.
            dtype="auto" if streamed else computing,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            local_files_only=True,
        )
    except Exception as error:  # a library boundary: it trusts what files say
        raise ModelError(
            f"{spec} must be a causal language model, but transformers cannot load it "
            f"({_first_line(error)}); check the folder"
        ) from error
    model, found = opened
    if missing := sorted(found["missing_keys"]):
        raise ModelError(
            f"the weights of {spec} must be complete, but {len(missing)} are missing "
            f"({', '.join(missing[:3])}); fetch the model again, or mend its config"
        )
    tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code)
    model.eval().requires_grad_(False)  # crowns train, in copies
    if streamed:
        _make_buffers_anew(model, computing)
        structure = stream(find_structure(model), Streaming(where, computing))
    else:
        model.to(where)  # type: ignore[arg-type] # transformers wraps the method of torch
        structure = find_structure(model)
    return LanguageModel(structure, tokenizer, source.name, source)


def load_tokenizer(source: ModelSource, *, trust_remote_code: bool = False) -> Any:
    """Load a model's tokenizer, without its weights.

    Raises:
        ModelError: there is none.
    """
    try:
        return AutoTokenizer.from_pretrained(
            source.folder, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except Exception as error:  # a library boundary: it trusts what files say
        raise ModelError(
            f"{source.spec} must come with its tokenizer, but transformers cannot load one "
            f"({_first_line(error)}); add the tokenizer's files to the folder"
        ) from error


def wrap_model(model: PreTrainedModel, tokenizer: Any, name: str = "model") -> LanguageModel:
    """Use a transformers model that is already in memory; it is frozen, in evaluation mode.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        name: a short name for reports.

    Raises:
        ModelError: not a decoder-only language model.
    """
    return LanguageModel(find_structure(model.eval().requires_grad_(False)), tokenizer, name)


def choose_device(device: str) -> torch.device:
    """Turn "auto" into the best device at hand, and check any other name.

    Raises:
        ModelError: torch does not know the device, or it is not there.
    """
    if device == "auto":
        if torch.cuda.is_available():
            # In a distributed run each process has a GPU of its own.
            return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(
            f"device must be 'auto' or a torch device of this machine, got {device!r} "
            f"({_first_line(error)}); leave it out to choose automatically"
        ) from error
    return chosen


def _make_buffers_anew(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Give a model the buffers that it works out for itself as it would have them in `dtype`.

    Gemma's scale of the embeddings, say, is rounded to the dtype that a model is loaded in.
    """
    with accelerate.init_empty_weights(include_buffers=False):
        twin = type(model)._from_config(copy.deepcopy(model.config), dtype=dtype)
    stored = model.state_dict().keys()
    for name, buffer in twin.named_buffers():
        if name not in stored:
            owner, _, attribute = name.rpartition(".")
            model.get_submodule(owner)._buffers[attribute] = buffer


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _fingerprint(model: PreTrainedModel) -> str:
    named = sorted(model.named_parameters())  # tied weights come once

    def digest(item: tuple[str, torch.nn.Parameter]) -> bytes:
        name, parameter = item
        values = hashlib.sha256()
        for piece in parameter.detach().reshape(-1).split(_PIECE):
            values.update(piece.float().cpu().numpy().data)
        header = f"{name} {tuple(parameter.shape)}".encode()
        return hashlib.sha256(header + values.digest()).digest()

    with ThreadPoolExecutor(max_workers=min(4, torch.get_num_threads())) as pool:
        parts = list(pool.map(digest, named))
    return hashlib.sha256(b"".join(parts) + _behaviour(model.config).encode()).hexdigest()


def _behaviour(config: PretrainedConfig) -> str:
    """The settings that may change what the weights compute (a rope's base, a window, …)."""

    def telling(settings: dict[str, Any]) -> dict[str, Any]:
        return {
            key: telling(value) if isinstance(value, dict) else value
            for key, value in settings.items()
            if not key.startswith("_") and key not in _INERT_SETTINGS
        }

    # Without defaults, to which a new version of transformers may add.
    return json.dumps(telling(config.to_diff_dict()), sort_keys=True, default=str)
