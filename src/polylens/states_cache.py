"""Trunk states kept between runs, under a key of everything that determines them.

The key covers the model's weights, the prompts' token ids (and so tokenizer, template, corpus and
truncation), what is kept, the dtype, the kind of device and the batches; so a stale entry is
impossible. A damaged entry is noticed by its checksum and made again. Old entries go when the
folder grows past `MAX_BYTES`.

`cached_hidden_states`, `fresh_hidden_states` and a `KeptStates` are called alike, so whoever needs
states takes one of them as `collect`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from polylens import distributed
from polylens.artefacts import load_tensors, readable_storage_errors, remove_leftovers, save_tensors
from polylens.cache import cache_folder
from polylens.errors import CorruptFileError
from polylens.hidden_states import HiddenStates, Keep, collect_hidden_states
from polylens.models.loading import LanguageModel
from polylens.progress import Progress, silent
from polylens.scratch import Scratch
from polylens.token_budget import best_token_budget

logger = logging.getLogger(__name__)

# Called as `cached_hidden_states` is.
Collect = Callable[..., HiddenStates]

# Raise this when the same key would stand for other numbers.
_FORMAT = 2

MAX_BYTES = 20 * 2**30


def cached_hidden_states(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    keep: Keep,
    *,
    token_budget: int | None = None,
    scratch: Scratch | None = None,
    progress: Progress = silent,
) -> HiddenStates:
    """Return states from the cache, or make and keep them; see `collect_hidden_states`.

    They are mapped from the cache's file, so they cost no memory of their own.

    Raises:
        StorageError: the cache cannot be read or written.
    """
    token_budget = token_budget or best_token_budget(
        model.structure, sum(map(len, prompts)), scratch.batch_bytes if scratch else None
    )
    folder = cache_folder() / "states"
    path = folder / f"{_key(model, prompts, keep, token_budget)}.safetensors"
    states = _load(path)
    # In a distributed run all processes must take part in making states, or none.
    found = torch.tensor([int(states is not None)])
    distributed.add_up([found])
    if states is not None and int(found) == distributed.size():
        return states
    states = collect_hidden_states(
        model.structure,
        prompts,
        keep,
        token_budget=token_budget,
        scratch=scratch,
        progress=progress,
    )
    if distributed.is_first():
        with readable_storage_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            remove_leftovers(folder)
        tensors = {
            **{f"boundary.{layer}": kept for layer, kept in states.boundary.items()},
            **{
                name: kept
                for name in ("lengths", "pooled", "final")
                if (kept := getattr(states, name)) is not None
            },
        }
        save_tensors(path, tensors, {"prefix_length": states.prefix_length, "model": model.name})
        _prune(folder)
    distributed.wait()
    return _load(path, verified=True) or states


def fresh_hidden_states(
    model: LanguageModel, prompts: Sequence[Sequence[int]], keep: Keep, **how: Any
) -> HiddenStates:
    """Make states anew, without the cache; see `collect_hidden_states`."""
    return collect_hidden_states(model.structure, prompts, keep, **how)


class KeptStates:
    """Hands out the states of prompts that it has had before, for as long as it lives.

    Many candidates are trained and scored on the same prompts, but their crowns begin at different
    layers: the first pass over some prompts keeps what enters each of those layers, so there is no
    second one.

    Attributes:
        boundary_layers: layers at which crowns will begin.
        collect: how states are had the first time.
    """

    def __init__(
        self, boundary_layers: Sequence[int], collect: Collect = cached_hidden_states
    ) -> None:
        self.boundary_layers = tuple(boundary_layers)
        self.collect = collect
        self._kept: dict[tuple[Any, ...], HiddenStates] = {}

    def __call__(
        self, model: LanguageModel, prompts: Sequence[Sequence[int]], keep: Keep, **how: Any
    ) -> HiddenStates:
        """Return kept states, or have them now; see `cached_hidden_states`."""
        if keep.boundary_layers:
            wanted = tuple(sorted({*keep.boundary_layers, *self.boundary_layers}))
            keep = dataclasses.replace(keep, boundary_layers=wanted)
        ids = hashlib.sha256(json.dumps([list(one) for one in prompts]).encode()).digest()
        key = (model.fingerprint, ids, keep, how.get("token_budget"))
        if key not in self._kept:
            self._kept[key] = self.collect(model, prompts, keep, **how)
        return self._kept[key]


def _load(path: Path, *, verified: bool = False) -> HiddenStates | None:
    """Read an entry; None if there is none, or if it is damaged.

    Args:
        path: the entry.
        verified: it was written a moment ago; spare the checksum.
    """
    with readable_storage_errors(path):
        if not path.exists():
            return None
        try:
            tensors, metadata = load_tensors(path, verify=not verified)
        except CorruptFileError:
            logger.warning("%s is damaged and is made again", path)
            return None
        path.touch()  # the oldest entries go first
    boundary = {
        int(name.partition(".")[2]): tensors.pop(name)
        for name in list(tensors)
        if name.startswith("boundary.")
    }
    return HiddenStates(prefix_length=metadata["prefix_length"], boundary=boundary, **tensors)


def _key(
    model: LanguageModel, prompts: Sequence[Sequence[int]], keep: Keep, token_budget: int
) -> str:
    determined_by = [
        _FORMAT,
        torch.__version__,
        transformers.__version__,
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
