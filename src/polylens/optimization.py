"""AdamW on the weights of a crown, whatever the objective.

`optimize` takes an `Objective`, which adds up gradients for the rows of a step, and does the rest:
order of the rows, schedule, clipping, checkpoints, a stop when the loss runs away. Weights,
gradients and moments may lie in files. Losses are the business of `polylens.objective`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from polylens import distributed
from polylens.artefacts import load_tensors, save_tensors
from polylens.config import OptimizerSettings
from polylens.errors import ConfigError, CorruptFileError, TrainingError
from polylens.machine import keeping_freed_memory
from polylens.progress import Progress, silent
from polylens.scratch import Scratch

logger = logging.getLogger(__name__)

# A batch loss this many times the first one means that training runs away, not that a batch is
# hard: between batches of one run the loss was seen to vary by less than half.
_DIVERGENCE_FACTOR = 10.0

# A first loss below this is rounding, as when only the retain loss is on; states after the final
# norm are of order 1 a dimension.
LEAST_LOSS = 1e-3

# Checkpoints may cost this share of the time: a write that takes 1 s happens every 20 s.
_CHECKPOINT_COST_RATIO = 0.05


class Objective(Protocol):
    """What is minimised."""

    def backward(self, rows: Sequence[int]) -> tuple[float, dict[str, float]]:
        """Add the gradient of a step's loss to the weights in training.

        Args:
            rows: of the step, over all processes.

        Returns:
            The loss, and each part's unweighted value, over all processes.
        """
        ...


def optimize(
    named: Mapping[str, torch.nn.Parameter],
    objective: Objective,
    n_rows: int,
    settings: OptimizerSettings,
    *,
    identity: Sequence[Any],
    usual_loss: float = LEAST_LOSS,
    seed: int = 0,
    scratch: Scratch | None = None,
    roomy: bool = True,
    checkpoint: Path | None = None,
    progress: Progress = silent,
) -> list[dict[str, float]]:
    """Train weights, step by step.

    Args:
        named: the weights in training, by name; they are changed in place.
        objective: of these weights.
        n_rows: rows that an epoch visits, each once.
        settings: see `OptimizerSettings`.
        identity: plain values; what makes two trainings the same one beside shapes and seed, so
            that one can go on from the other's checkpoint.
        usual_loss: a batch may have such a loss however small the first one's was.
        seed: order of the rows.
        scratch: room for weights, gradients and moments; None takes memory without limit.
        roomy: memory is not short, so freed blocks may be kept for the next step.
        checkpoint: a file to write progress to and to continue from, removed by the caller.
        progress: told the steps done.

    Returns:
        One entry a step: step, learning_rate, loss, gradient_norm, and the objective's parts.

    Raises:
        TrainingError: the loss is not finite or runs away. The checkpoint, if any, keeps the last
            good state.
        ConfigError: the checkpoint is of another training.
    """
    scratch = scratch or Scratch()
    n_steps = settings.epochs * math.ceil(n_rows / settings.batch_size)
    with scratch.borrowed():
        _make_room(named, scratch)
        optimizer = _optimizer(named, settings, scratch)
    log: list[dict[str, float]] = []
    training = _digest(named, n_rows, [*identity, settings.model_dump(mode="json"), seed])
    if checkpoint is not None and checkpoint.exists():
        log = _resume(checkpoint, training, named, optimizer)
    saver = _Saver(checkpoint if distributed.is_first() else None, training, named, optimizer)
    progress(len(log), n_steps, "training")
    # Freed blocks that are kept do not always fit what is asked for next: where memory is short,
    # speed gives way.
    with keeping_freed_memory() if roomy else contextlib.nullcontext():
        for step in range(len(log), n_steps):
            rows = rows_of_step(step, n_rows, settings.batch_size, seed)
            optimizer.zero_grad(set_to_none=False)
            loss, parts = objective.backward(rows)
            _check(loss, log, step, usual_loss, saver)
            norm = torch.nn.utils.clip_grad_norm_(named.values(), settings.max_grad_norm)
            if not torch.isfinite(norm):
                raise TrainingError(
                    f"gradients must be finite, but are not at step {step}; lower "
                    f"train.learning_rate{saver.where()}"
                )
            learning_rate = settings.learning_rate * schedule(step, n_steps, settings.warmup_ratio)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            optimizer.step()
            log.append(
                {
                    "step": step,
                    "learning_rate": learning_rate,
                    "loss": loss,
                    "gradient_norm": float(norm),
                    **parts,
                }
            )
            saver.maybe_save(log)
            progress(step + 1, n_steps, "training")
    optimizer.zero_grad()
    optimizer.state.clear()
    return log


def add_up_step(sums: Tensor, named: Mapping[str, torch.nn.Parameter]) -> Tensor:
    """Add up what each process has of a step: its sums, which are returned, and its gradients.

    Args:
        sums: any shape, float64, on the CPU.
        named: the weights in training, by name; their gradients are changed in place.
    """
    if distributed.size() > 1:
        weights = list(named.values())
        device = weights[0].device
        sums = sums.to(device, torch.float32 if device.type == "mps" else None)
        distributed.add_up([sums, *(w.grad for w in weights if w.grad is not None)])
    return sums


def schedule(step: int, n_steps: int, warmup_ratio: float) -> float:
    """Share of the peak learning rate at a step: linear warm-up, then half a cosine down to zero.

    A function of the step alone, so that a resumed training needs no state for it. The published
    runs used transformers' schedule of the same form, which starts at 0.
    """
    if n_steps == 1:
        return 1.0  # a warm-up from 0 would leave nothing
    n_warmup = math.ceil(warmup_ratio * n_steps)
    if step < n_warmup:
        return step / n_warmup
    return 0.5 * (1 + math.cos(math.pi * (step - n_warmup) / max(1, n_steps - n_warmup)))


def rows_of_step(step: int, n_rows: int, batch_size: int, seed: int) -> list[int]:
    """Rows of an optimizer step: each epoch visits every row once, in an order of its own.

    It is the order of accelerate's seedable sampler, so that a run of the published code, which
    trained through transformers' Trainer, is repeated with its seed.
    """
    steps_per_epoch = math.ceil(n_rows / batch_size)
    epoch, position = divmod(step, steps_per_epoch)
    generator = torch.Generator().manual_seed(seed + epoch)
    order = torch.randperm(n_rows, generator=generator).tolist()
    return list(order[position * batch_size : (position + 1) * batch_size])


def _make_room(named: Mapping[str, torch.nn.Parameter], scratch: Scratch) -> None:
    """Give weights in training, and their gradients, places that may lie in files."""
    for parameter in named.values():
        if parameter.device.type != "cpu":
            parameter.grad = torch.zeros_like(parameter)
            continue
        shape = tuple(parameter.shape)
        parameter.data = scratch.empty(shape, parameter.dtype).copy_(parameter.data)
        parameter.grad = scratch.zeros(shape, parameter.dtype)


def _optimizer(
    named: Mapping[str, torch.nn.Parameter], settings: OptimizerSettings, scratch: Scratch
) -> torch.optim.AdamW:
    """AdamW whose moments, two thirds of what a crown in training takes, may lie in files."""
    optimizer = torch.optim.AdamW(
        [
            # As transformers' Trainer: no decay of norms and biases.
            {
                "params": [p for p in named.values() if p.ndim > 1],
                "weight_decay": settings.weight_decay,
            },
            {"params": [p for p in named.values() if p.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=settings.learning_rate,
        fused=True,  # one pass over weights, gradients and moments, without copies of them
    )
    for parameter in named.values():
        on_cpu = parameter.device.type == "cpu"
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            **{
                name: scratch.zeros(tuple(parameter.shape), parameter.dtype)
                if on_cpu
                else torch.zeros_like(parameter)
                for name in ("exp_avg", "exp_avg_sq")
            },
        }
    return optimizer


def _check(
    loss: float, log: Sequence[Mapping[str, float]], step: int, usual_loss: float, saver: _Saver
) -> None:
    if not math.isfinite(loss):
        raise TrainingError(
            f"the loss must be finite, but is {loss} at step {step}; lower train.learning_rate or "
            f"the weights and strengths{saver.where()}"
        )
    if log and loss > _DIVERGENCE_FACTOR * max(log[0]["loss"], usual_loss):
        raise TrainingError(
            f"the loss must fall, but grew from {log[0]['loss']:.4g} to {loss:.4g} by step {step}; "
            f"lower train.learning_rate or the weights and strengths{saver.where()}"
        )


@dataclass
class _Saver:
    """Writes a checkpoint now and then, so that a killed training goes on where it was."""

    path: Path | None
    training: str
    named: Mapping[str, torch.nn.Parameter]
    optimizer: torch.optim.Optimizer
    last_saved: float = dataclasses.field(default_factory=time.monotonic)
    cost_seconds: float = 0.0
    saved_step: int | None = None

    def maybe_save(self, log: Sequence[Mapping[str, float]]) -> None:
        """Save if the last write's cost allows it."""
        now = time.monotonic()
        if self.path is None or now - self.last_saved < self.cost_seconds / _CHECKPOINT_COST_RATIO:
            return
        tensors: dict[str, Tensor] = {}
        for name, parameter in self.named.items():
            tensors[f"weight.{name}"] = parameter
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"{key}.{name}"] = value
        metadata = {
            "kind": "polylens.checkpoint",
            "training": self.training,
            "log": list(log),
        }
        save_tensors(self.path, tensors, metadata)
        self.last_saved = time.monotonic()
        self.cost_seconds = self.last_saved - now
        self.saved_step = len(log)

    def where(self) -> str:
        """Say where the last good state is."""
        if self.path is None or self.saved_step is None:
            return ""
        return f" (the weights after step {self.saved_step} are kept in {self.path})"


def _digest(named: Mapping[str, Tensor], n_rows: int, identity: Sequence[Any]) -> str:
    """What makes two trainings the same one, so that one can go on from the other's checkpoint."""
    shapes = [(name, list(parameter.shape)) for name, parameter in named.items()]
    return hashlib.sha256(json.dumps([shapes, n_rows, identity]).encode()).hexdigest()[:32]


def _resume(
    path: Path,
    training: str,
    named: Mapping[str, torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
) -> list[dict[str, float]]:
    """Take weights and optimizer state from a checkpoint; a damaged one is ignored."""
    try:
        tensors, metadata = load_tensors(path)
    except CorruptFileError:
        logger.warning("%s is damaged; training starts again", path)
        return []
    if metadata.get("training") != training:
        raise ConfigError(
            f"a training must go on from a checkpoint of its own, but {path} is of one with other "
            "settings, rows, seed or model; delete it or give another path"
        )
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(tensors[f"weight.{name}"])
            for key, value in optimizer.state[parameter].items():
                value.copy_(tensors[f"{key}.{name}"])
    return list(metadata["log"])
