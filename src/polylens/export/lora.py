"""A delta as a LoRA adapter that PEFT loads on the base model.

Each matrix's change is replaced by its best approximation of rank r, `B·A`: with U the leading left
singular vectors of the change D, U·Uᵀ·D (Eckart and Young 1936). A low rank holds what is low-rank,
and full training is not: the error is measured, not assumed. Norms, biases and fused experts have
no LoRA form; PEFT carries them whole, or they are left out and counted as part of the error.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from polylens.artefacts import save_tensors, write_json, writing
from polylens.crown import CrownDelta
from polylens.errors import UsageError
from polylens.models.loading import LanguageModel
from polylens.progress import Progress, silent

# Names of PEFT's file format: the adapter wraps the model twice, and a bias sits on the base layer.
_PREFIX = "base_model.model."
_BIAS = "base_layer.bias"

# In a model with fused experts PEFT takes modules of these names for parts of the experts, wherever
# they are (shared experts, dense layers), so there such layers are held whole.
_NAMES_OF_EXPERTS = {"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"}


@dataclass(frozen=True)
class LoraExport:
    """What an adapter holds, and what it lacks.

    Errors are ‖adapter's change - change‖ / ‖change‖, over all weights that the delta changes.

    Attributes:
        rank: of every matrix.
        full_rank: at which every matrix's change is held exactly.
        n_matrices: weights of linear layers, held as `B·A`.
        carried: names of other weights, held whole.
        left: names of other weights, left out.
        n_carried: numbers in `carried`; `n_left` likewise.
        error: at `rank`.
        errors: rank → error, for some ranks.
    """

    rank: int
    full_rank: int
    n_matrices: int
    carried: tuple[str, ...]
    left: tuple[str, ...]
    n_carried: int
    n_left: int
    error: float
    errors: Mapping[int, float]


@dataclass(frozen=True)
class _Split:
    """The changed weights of a delta, by how an adapter holds them."""

    matrices: tuple[str, ...]  # module names
    biases: tuple[str, ...]  # module names, of matrices
    modules: tuple[str, ...]  # module names, held whole
    left: tuple[str, ...]  # weight names


def save_lora(
    model: LanguageModel,
    delta: CrownDelta,
    folder: str | Path,
    *,
    rank: int | None = None,
    keep: float = 0.9,
    strength: float = 1.0,
    matrices_only: bool = False,
    progress: Progress = silent,
) -> LoraExport:
    """Write a delta as a PEFT adapter, whole or not at all.

    Args:
        model: the untouched model.
        delta: of this model.
        folder: to make or replace; adapter_config.json and adapter_model.safetensors, float32.
        rank: of every matrix; None takes the smallest that keeps `keep`.
        keep: share of the change to keep, 1 - error², above 0 and at most 1.
        strength: the dial; it is part of the weights written.
        matrices_only: leave out what only PEFT loads beside the matrices; vLLM refuses it.
        progress: told the matrices done.

    Raises:
        UsageError: rank or keep is out of range, or the delta changes no matrix.
    """
    if not 0 < keep <= 1:
        raise UsageError(f"keep must be above 0 and at most 1, got {keep:g}; 0.9 is a good start")
    split = _split(model, delta, matrices_only)
    full_rank = max(min(delta.changes[f"{name}.weight"].shape) for name in split.matrices)
    if rank is not None and not 1 <= rank <= full_rank:
        raise UsageError(
            f"rank must be between 1 and {full_rank}, the full rank of the largest change, got "
            f"{rank}; choose one in between"
        )
    bases: dict[str, Tensor] = {}
    energies: list[Tensor] = []  # squared singular values of each matrix, descending
    for number, name in enumerate(split.matrices):
        progress(number, len(split.matrices), "singular vectors")
        change = _oriented(model, name, delta.changes[f"{name}.weight"])
        energy, basis = _singular_basis(change)
        energies.append(energy)
        bases[name] = basis[:, :rank].float()
    progress(len(split.matrices), len(split.matrices), "singular vectors")
    error_at = _errors(delta, split, energies, full_rank)
    if rank is None:
        rank = _smallest_rank(error_at, keep)
    result = _result(delta, split, rank, full_rank, error_at)

    tensors: dict[str, Tensor] = {}
    for name, basis in bases.items():
        change = _oriented(model, name, delta.changes[f"{name}.weight"])
        b, a = _factors(change, basis[:, :rank], rank)
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = a
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = strength * b
    changed = delta.weights(model.structure, strength, torch.float32)
    for name in split.biases:
        tensors[f"{_PREFIX}{name}.{_BIAS}"] = changed[f"{name}.bias"]
    for name in split.modules:
        for key, original in model.causal_lm.get_submodule(name).state_dict().items():
            tensors[f"{_PREFIX}{name}.{key}"] = changed.get(f"{name}.{key}", original)
    with writing(Path(folder)) as temporary:
        temporary.mkdir()
        write_json(temporary / "adapter_config.json", _config(model, split, rank))
        metadata = {
            "kind": "polylens.lora",
            "model": model.name,
            "fingerprint": model.fingerprint,
            "strength": strength,
            "rank": rank,
            "error": result.error,
            "error_by_rank": {str(at): error for at, error in result.errors.items()},
            "carried_whole": result.carried,
            "left_out": result.left,
        }
        save_tensors(temporary / "adapter_model.safetensors", tensors, metadata)
    return result


def _split(model: LanguageModel, delta: CrownDelta, matrices_only: bool) -> _Split:
    by_module: dict[str, list[str]] = {}
    for weight in delta.changes:
        by_module.setdefault(weight.rpartition(".")[0], []).append(weight)
    has_experts = any(change.ndim == 3 for change in delta.changes.values())
    matrices, biases, modules, left = [], [], [], []
    for name, weights in by_module.items():
        module = model.causal_lm.get_submodule(name)
        rest = [weight for weight in weights if weight != f"{name}.weight"]
        is_mistaken = has_experts and name.rpartition(".")[2] in _NAMES_OF_EXPERTS
        if isinstance(module, nn.Linear | Conv1D) and len(rest) < len(weights) and not is_mistaken:
            matrices.append(name)
            if matrices_only:
                left += rest
            elif rest:
                biases.append(name)
        elif matrices_only or any(True for child in module.children() for _ in child.parameters()):
            left += weights  # a module around others cannot be held whole beside them
        else:
            modules.append(name)
    if not matrices:
        raise UsageError(
            "a LoRA adapter needs a changed weight of a linear layer, but the delta changes none; "
            "export it as delta or merged"
        )
    return _Split(tuple(matrices), tuple(biases), tuple(modules), tuple(left))


def _oriented(model: LanguageModel, module: str, change: Tensor) -> Tensor:
    """Return a matrix's change as (out_features, in_features), as LoRA sees it."""
    is_transposed = isinstance(model.causal_lm.get_submodule(module), Conv1D)
    return change.T if is_transposed else change


def _singular_basis(change: Tensor) -> tuple[Tensor, Tensor]:
    """Return squared singular values, descending, and the singular vectors of the shorter side.

    They come from the Gram matrix of that side, (n, n), in float64, whose accuracy is ample here:
    the vectors need only be orthonormal, since the other factor is the change projected on them.
    """
    short = change.double() if change.shape[0] <= change.shape[1] else change.double().T
    energy, vectors = torch.linalg.eigh(short @ short.T)
    return energy.flip(0).clamp(min=0), vectors.flip(1)


def _factors(change: Tensor, basis: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return B (out_features, rank) and A (rank, in_features), of like size in each direction.

    Equal sizes keep both within the range of float16, in which some servers hold them. Directions
    that a small matrix does not have are zero.
    """
    basis, change = basis.double(), change.double()
    is_wide = change.shape[0] <= change.shape[1]
    other = basis.T @ (change if is_wide else change.T)  # (k, longer side)
    root = other.norm(dim=1).sqrt().clamp(min=1e-30)  # singular values, to the half
    mine, other = basis * root, other / root[:, None]
    b, a = (mine, other) if is_wide else (other.T, mine.T)
    missing = rank - a.shape[0]
    b = nn.functional.pad(b, (0, missing))
    a = nn.functional.pad(a, (0, 0, 0, missing))
    return b.float(), a.float()


def _errors(
    delta: CrownDelta, split: _Split, energies: list[Tensor], full_rank: int
) -> list[float]:
    """Return the relative error at each rank, from 0 to the full one."""
    lost = torch.zeros(full_rank + 1, dtype=torch.float64)
    for energy in energies:
        tail = energy.flip(0).cumsum(0).flip(0)  # what ranks 0, 1, … leave out
        lost[: len(tail)] += tail
    lost += sum(float(delta.changes[name].double().square().sum()) for name in split.left)
    total = sum(float(change.double().square().sum()) for change in delta.changes.values())
    return [float(value) for value in (lost / total).sqrt()] if total else [0.0] * (full_rank + 1)


def _smallest_rank(error_at: list[float], keep: float) -> int:
    # Directions of the size of rounding are not worth a rank.
    for rank, error in enumerate(error_at):
        if rank and 1 - error**2 >= keep - 1e-9:
            return rank
    most = 1 - error_at[-1] ** 2
    raise UsageError(
        f"keep must be at most {most:.4f}, what the matrices hold of the change, got {keep:g}; "
        "lower it, or carry the other weights too"
    )


def _result(
    delta: CrownDelta, split: _Split, rank: int, full_rank: int, error_at: list[float]
) -> LoraExport:
    elsewhere = {*split.left, *(f"{module}.weight" for module in split.matrices)}
    carried = tuple(name for name in delta.changes if name not in elsewhere)
    powers = itertools.takewhile(lambda at: at < full_rank, (2**n for n in itertools.count()))
    shown = sorted({*powers, rank, full_rank})
    return LoraExport(
        rank,
        full_rank,
        len(split.matrices),
        carried,
        split.left,
        sum(delta.changes[name].numel() for name in carried),
        sum(delta.changes[name].numel() for name in split.left),
        error_at[rank],
        {at: error_at[at] for at in shown},
    )


def _config(model: LanguageModel, split: _Split, rank: int) -> dict[str, Any]:
    """What adapter_config.json holds; PEFT has defaults for the rest."""
    first = model.causal_lm.get_submodule(split.matrices[0])
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model.name if model.source is None else model.source.spec,
        "revision": None if model.source is None else model.source.revision,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,  # a scale of 1: the strength is in the weights
        "lora_dropout": 0.0,
        "target_modules": list(split.matrices),
        "fan_in_fan_out": isinstance(first, Conv1D),
        "bias": "lora_only" if split.biases else "none",
        "modules_to_save": list(split.modules) or None,
    }
