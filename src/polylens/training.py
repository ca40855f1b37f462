"""Language subspace manipulation (LSM): train the crown on kept states.

`train_crown` takes boundary states and reference states of parallel prompts (from one trunk pass),
and gives back the change of each weight. No second model, no logits, no trunk: a step costs three
times the crown's forward.

Source: Zhao et al. 2024, Lens (arXiv 2410.04407), section 3.2.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polylens.artefacts import load_tensors, save_tensors
from polylens.config import TrainSettings
from polylens.crown import Crown
from polylens.errors import ConfigError, CorruptFileError, TrainingError
from polylens.hidden_states import HiddenStates, gather, pool, token_batches
from polylens.losses import AlignLoss, RetainLoss, SeparateLoss
from polylens.models.structure import DecoderStructure
from polylens.progress import Progress, silent
from polylens.subspaces import Subspaces

logger = logging.getLogger(__name__)

# A batch loss this many times the first one means that training runs away, not that a batch is
# hard: between batches of one run the loss was seen to vary by less than half.
_DIVERGENCE_FACTOR = 10.0

# A first loss below this is rounding, as when only the retain loss is on; states after the final
# norm are of order 1 a dimension.
_DIVERGENCE_FLOOR = 1e-3

# Checkpoints may cost this share of the time: a write that takes 1 s happens every 20 s.
_CHECKPOINT_COST_RATIO = 0.05


@dataclass(frozen=True)
class ParallelStates:
    """Kept states of parallel prompts.

    Attributes:
        states: boundary and final states of all prompts, in any order.
        rows: for each parallel row, language → index of its prompt in `states`. A row has the
            central language and at least one target; other languages may be missing.
        central: the central language.
    """

    states: HiddenStates
    rows: tuple[Mapping[str, int], ...]
    central: str

    @property
    def targets(self) -> tuple[str, ...]:
        """The target languages, in the order of their first appearance."""
        return tuple(dict.fromkeys(k for row in self.rows for k in row if k != self.central))


@dataclass(frozen=True)
class TrainingResult:
    """What training leaves.

    Attributes:
        changes: parameter name → change, float32.
        log: one entry an optimizer step: step, learning_rate, loss, gradient_norm, and each loss's
            unweighted value as "retain", "align.<language>", "separate.<language>".
    """

    changes: dict[str, Tensor]
    log: list[dict[str, float]]


def trained_layers(settings: TrainSettings, n_layers: int) -> tuple[int, ...]:
    """Return the layers that train, ascending.

    Raises:
        ConfigError: a layer, or that number of layers, does not exist.
    """
    wanted = settings.layers
    if isinstance(wanted, int):
        if not 1 <= wanted <= n_layers:
            raise ConfigError(
                f"train.layers must be between 1 and {n_layers} for a model of {n_layers} layers, "
                f"got {wanted}; lower it"
            )
        return tuple(range(n_layers - wanted, n_layers))
    for layer in wanted:
        if not 0 <= layer < n_layers:
            raise ConfigError(
                f"train.layers must be layers between 0 and {n_layers - 1}, got {layer}; "
                "decoder layers count from 0"
            )
    return tuple(sorted(set(wanted)))


def state_layer(settings: TrainSettings, n_layers: int) -> int:
    """Return the layer, in the package's convention, whose states and subspaces training uses."""
    return n_layers if settings.state == "normed" else n_layers - 1


def train_crown(
    structure: DecoderStructure,
    subspaces: Subspaces,
    parallel: ParallelStates,
    settings: TrainSettings,
    *,
    seed: int = 0,
    token_budget: int,
    checkpoint: Path | None = None,
    progress: Progress = silent,
) -> TrainingResult:
    """Train the top layers so that targets align with, and separate from, the central language.

    Args:
        structure: the untouched model; it is not changed.
        subspaces: of this model, with the layer that `settings.state` reads.
        parallel: states of the training prompts; `boundary_layer` must be the lowest trained layer.
        settings: see `TrainSettings`.
        seed: order of the rows.
        token_budget: padded tokens of a forward.
        checkpoint: a file to write progress to and to continue from, removed by the caller.
        progress: told the steps done.

    Raises:
        TrainingError: the loss is not finite or runs away. The checkpoint, if any, keeps the last
            good state.
    """
    crown = Crown(structure, trained_layers(settings, structure.n_layers))
    assert parallel.states.boundary_layer == crown.boundary_layer
    objective = _Objective(subspaces, parallel, settings, crown, token_budget)
    n_rows = len(parallel.rows)
    n_steps = settings.epochs * math.ceil(n_rows / settings.batch_size)
    named = dict(crown.named_trainable())
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
    )
    log: list[dict[str, float]] = []
    if checkpoint is not None and checkpoint.exists():
        log = _resume(checkpoint, named, optimizer)
    saver = _Saver(checkpoint, named, optimizer)
    progress(len(log), n_steps, "training")
    for step in range(len(log), n_steps):
        rows = _rows_of_step(step, n_rows, settings.batch_size, seed)
        optimizer.zero_grad(set_to_none=True)
        loss, parts = objective(rows)
        _check(float(loss.detach()), log, step, saver)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(named.values(), settings.max_grad_norm)
        if not torch.isfinite(norm):
            raise TrainingError(
                f"gradients must be finite, but are not at step {step}; lower train.learning_rate"
                + saver.where()
            )
        learning_rate = settings.learning_rate * schedule(step, n_steps, settings.warmup_ratio)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer.step()
        log.append(
            {
                "step": step,
                "learning_rate": learning_rate,
                "loss": float(loss.detach()),
                "gradient_norm": float(norm),
                **parts,
            }
        )
        saver.maybe_save(log)
        progress(step + 1, n_steps, "training")
    return TrainingResult(crown.changes(), log)


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


class _Objective:
    """Loss of a batch of rows: forward through the crown, pooling, the three losses."""

    def __init__(
        self,
        subspaces: Subspaces,
        parallel: ParallelStates,
        settings: TrainSettings,
        crown: Crown,
        token_budget: int,
    ) -> None:
        layer = state_layer(settings, crown.structure_[0].n_layers)
        self._parallel = parallel
        self._settings = settings
        self._crown = crown
        self._token_budget = token_budget
        self._offsets = parallel.states.offsets
        self._device = crown.structure_[0].device
        self._align = AlignLoss(subspaces, layer)
        self._separate = {
            language: SeparateLoss(subspaces, layer, language, settings.strength_of(language))
            for language in parallel.targets
        }
        self._retain = RetainLoss()

    def __call__(self, rows: Sequence[int]) -> tuple[Tensor, dict[str, float]]:
        """Return the scalar loss of parallel rows, and each part's unweighted value."""
        settings, central = self._settings, self._parallel.central
        needs_central = settings.align_weight > 0 or settings.retain_weight > 0
        prompts = [
            index
            for row in rows
            for language, index in self._parallel.rows[row].items()
            if language != central or needs_central
        ]
        now = self._states(prompts)
        total = torch.zeros((), device=self._device)
        parts: dict[str, float] = {}
        if settings.retain_weight > 0:
            indices = [self._parallel.rows[row][central] for row in rows]
            before = self._reference(indices)
            value = self._retain(_means([now[i] for i in indices]), _means(before))
            total = total + settings.retain_weight * value
            parts["retain"] = float(value.detach())
        for language in self._parallel.targets:
            present = [self._parallel.rows[r] for r in rows if language in self._parallel.rows[r]]
            if not present:
                continue
            # A row without this language adds nothing: the mean over rows shrinks with them.
            share = len(present) / len(rows)
            target = [now[row[language]] for row in present]
            if settings.align_weight > 0:
                centre = [self._central_goal(now[row[central]], row[language]) for row in present]
                value = self._align(self._pooled(target), torch.cat(centre))
                total = total + settings.align_weight * share * value
                parts[f"align.{language}"] = float(value.detach())
            if settings.separate_weight > 0:
                before = self._reference([row[language] for row in present])
                value = self._separate[language](self._pooled(target), self._pooled(before))
                total = total + settings.separate_weight * share * value
                parts[f"separate.{language}"] = float(value.detach())
        return total, parts

    def _states(self, prompts: Sequence[int]) -> dict[int, Tensor]:
        """Run the crown; return each prompt's states, (n_tokens, hidden_size)."""
        boundary = self._parallel.states.boundary
        assert boundary is not None
        lengths = [self._offsets[i + 1] - self._offsets[i] for i in prompts]
        result: dict[int, Tensor] = {}
        for batch in token_batches(lengths, self._token_budget):
            chosen = [prompts[i] for i in batch]
            padded, rows = gather(boundary, self._offsets, chosen)
            output = self._crown(padded.to(self._device))
            if self._settings.state == "normed":
                output = self._crown.final_norm(output)
            for row, (index, length) in enumerate(zip(chosen, rows.tolist(), strict=True)):
                result[index] = output[row, :length]
        return result

    @torch.no_grad()
    def _reference(self, prompts: Sequence[int]) -> list[Tensor]:
        """The untouched model's states of each prompt, (n_tokens, hidden_size)."""
        final = self._parallel.states.final
        assert final is not None
        result = []
        for index in prompts:
            states = final[self._offsets[index] : self._offsets[index + 1]].to(self._device).float()
            result.append(
                self._crown.final_norm(states) if self._settings.state == "normed" else states
            )
        return result

    def _pooled(self, prompts: Sequence[Tensor]) -> Tensor:
        """Reduce each prompt's states to what the losses compare; "all" keeps every token."""
        if self._settings.position == "all":
            return torch.cat(list(prompts))
        return torch.cat([_pool(states, self._settings.position) for states in prompts])

    def _central_goal(self, central: Tensor, target_prompt: int) -> Tensor:
        """What a target prompt is aligned with: one state, repeated for each token of "all"."""
        if self._settings.position != "all":
            return _pool(central, self._settings.position)
        n_tokens = self._offsets[target_prompt + 1] - self._offsets[target_prompt]
        return central.mean(0, keepdim=True).expand(n_tokens, -1)


def _pool(states: Tensor, position: Any) -> Tensor:
    return pool(states[None], torch.tensor([len(states)], device=states.device), position)


def _means(prompts: Sequence[Tensor]) -> Tensor:
    return torch.stack([states.mean(0) for states in prompts])


def _rows_of_step(step: int, n_rows: int, batch_size: int, seed: int) -> list[int]:
    """Rows of an optimizer step: each epoch visits every row once, in an order of its own.

    It is the order of accelerate's seedable sampler, so that a run of the published code, which
    trained through transformers' Trainer, is repeated with its seed.
    """
    steps_per_epoch = math.ceil(n_rows / batch_size)
    epoch, position = divmod(step, steps_per_epoch)
    generator = torch.Generator().manual_seed(seed + epoch)
    order = torch.randperm(n_rows, generator=generator).tolist()
    return list(order[position * batch_size : (position + 1) * batch_size])


def _check(loss: float, log: Sequence[Mapping[str, float]], step: int, saver: _Saver) -> None:
    if not math.isfinite(loss):
        raise TrainingError(
            f"the loss must be finite, but is {loss} at step {step}; lower train.learning_rate or "
            f"the weights and strengths{saver.where()}"
        )
    if log and loss > _DIVERGENCE_FACTOR * max(log[0]["loss"], _DIVERGENCE_FLOOR):
        raise TrainingError(
            f"the loss must fall, but grew from {log[0]['loss']:.4g} to {loss:.4g} by step {step}; "
            f"lower train.learning_rate or the weights and strengths{saver.where()}"
        )


@dataclass
class _Saver:
    """Writes a checkpoint now and then, so that a killed training goes on where it was."""

    path: Path | None
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
        save_tensors(self.path, tensors, {"kind": "polylens.checkpoint", "log": list(log)})
        self.last_saved = time.monotonic()
        self.cost_seconds = self.last_saved - now
        self.saved_step = len(log)

    def where(self) -> str:
        """Say where the last good state is."""
        if self.path is None or self.saved_step is None:
            return ""
        return f" (the weights after step {self.saved_step} are kept in {self.path})"


def _resume(
    path: Path, named: Mapping[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer
) -> list[dict[str, float]]:
    """Take weights and optimizer state from a checkpoint; a damaged one is ignored."""
    try:
        tensors, metadata = load_tensors(path)
    except CorruptFileError:
        logger.warning("%s is damaged; training starts again", path)
        return []
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(tensors[f"weight.{name}"])
            optimizer.state[parameter] = {
                key: tensors[f"{key}.{name}"].to(parameter.device if key != "step" else "cpu")
                for key in ("step", "exp_avg", "exp_avg_sq")
            }
    return list(metadata["log"])
