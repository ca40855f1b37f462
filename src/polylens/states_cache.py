"""Trunk states kept between runs, under a key of everything that determines them.

The key covers the model's weights, the prompts' token ids (and so tokenizer, template, corpus and
truncation), what is kept, the dtype, the kind of device and the batches; so a stale entry is
impossible. A damaged entry is noticed by its checksum and made again. Old entries go when the
folder grows past `MAX_BYTES`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path

import torch

from polylens.artefacts import load_tensors, readable_storage_errors, remove_leftovers, save_tensors
from polylens.cache import cache_folder
from polylens.errors import CorruptFileError
from polylens.hidden_states import TOKEN_BUDGET, HiddenStates, Keep, collect_hidden_states
from polylens.models.loading import LanguageModel
from polylens.progress import Progress, silent

logger = logging.getLogger(__name__)

# Raise this when the same key would stand for other numbers.
_FORMAT = 1

MAX_BYTES = 20 * 2**30


def cached_hidden_states(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    keep: Keep,
    *,
    token_budget: int = TOKEN_BUDGET,
    progress: Progress = silent,
) -> HiddenStates:
    """Return states from the cache, or make and keep them; see `collect_hidden_states`.

    Raises:
        StorageError: the cache cannot be read or written.
    """
    folder = cache_folder() / "states"
    path = folder / f"{_key(model, prompts, keep, token_budget)}.safetensors"
    with readable_storage_errors(path):
        if path.exists():
            try:
                tensors, metadata = load_tensors(path)
            except CorruptFileError:
                logger.warning("%s is damaged and is made again", path)
            else:
                path.touch()  # the oldest entries go first
                return HiddenStates(boundary_layer=metadata["boundary_layer"], **tensors)
    states = collect_hidden_states(
        model.structure, prompts, keep, token_budget=token_budget, progress=progress
    )
    tensors = {
        field.name: value
        for field in dataclasses.fields(states)
        if isinstance(value := getattr(states, field.name), torch.Tensor)
    }
    with readable_storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)
    save_tensors(path, tensors, {"boundary_layer": states.boundary_layer, "model": model.name})
    _prune(folder)
    return states


def _key(
    model: LanguageModel, prompts: Sequence[Sequence[int]], keep: Keep, token_budget: int
) -> str:
    determined_by = [
        _FORMAT,
        model.fingerprint,
        str(model.structure.dtype),
        model.structure.device.type,
        model.causal_lm.config._attn_implementation,
        dataclasses.asdict(keep),
        token_budget,
        [list(ids) for ids in prompts],
    ]
    return hashlib.sha256(json.dumps(determined_by).encode()).hexdigest()[:32]


def _prune(folder: Path) -> None:
    """Remove the entries used least recently until the folder is within `MAX_BYTES`."""
    entries = []
    for path in folder.glob("*.safetensors"):
        with contextlib.suppress(FileNotFoundError):  # another run removed it
            stat = path.stat()
            entries.append((stat.st_mtime, stat.st_size, path))
    total = sum(size for _, size, _ in entries)
    for _, size, path in sorted(entries)[:-1]:
        if total <= MAX_BYTES:
            return
        path.unlink(missing_ok=True)
        total -= size
