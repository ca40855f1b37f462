"""Language subspace manipulation (LSM): train the crown on kept states.

`train_crown` takes boundary states and reference states of parallel prompts (from one trunk pass),
and gives back the change of each weight. No second model, no trunk: a step costs three times the
crown's forward, and the head where next tokens are retained or answers learned.

Source: Zhao et al. 2024, Lens (arXiv 2410.04407), section 3.2.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from polylens.config import CrownSettings, TrainSettings
from polylens.crown import Crown
from polylens.errors import ConfigError
from polylens.low_rank import LowRankCrown
from polylens.models.structure import DecoderStructure
from polylens.objective import LensObjective, ParallelStates
from polylens.optimization import optimize
from polylens.progress import Progress, silent
from polylens.scratch import Scratch
from polylens.subspaces import Subspaces
from polylens.token_budget import best_graph_tokens, best_token_budget


@dataclass(frozen=True)
class TrainingResult:
    """What training leaves.

    Attributes:
        changes: parameter name → change, float32.
        log: one entry an optimizer step: step, learning_rate, loss, gradient_norm, and each loss's
            unweighted value as "retain", "retain.choices", "retain.<language>",
            "align.<language>", "separate.<language>", "answer.<language>" (nats a token).
    """

    changes: dict[str, Tensor]
    log: list[dict[str, float]]


def trained_layers(settings: CrownSettings, n_layers: int) -> tuple[int, ...]:
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


def state_layers(settings: TrainSettings, n_layers: int) -> tuple[int, ...]:
    """Return the layers, in the package's convention, whose states and subspaces training uses.

    The last layer's state, with or without the final norm, comes last.
    """
    last = n_layers if settings.state == "normed" else n_layers - 1
    if settings.loss_layers == "last":
        return (last,)
    below = [layer for layer in trained_layers(settings, n_layers) if layer < n_layers - 1]
    return (*below, last)


def boundary_layers(settings: TrainSettings, n_layers: int) -> tuple[int, ...]:
    """Return the layers, ascending, of which training must have what enters them.

    The lowest is where the crown begins; what enters the others is what a layer that the losses
    read leaves in the untouched model.
    """
    above = (layer + 1 for layer in state_layers(settings, n_layers)[:-1])
    return tuple(sorted({min(trained_layers(settings, n_layers)), *above}))


def train_crown(
    structure: DecoderStructure,
    subspaces: Subspaces,
    parallel: ParallelStates,
    settings: TrainSettings,
    *,
    seed: int = 0,
    token_budget: int | None = None,
    scratch: Scratch | None = None,
    checkpoint: Path | None = None,
    progress: Progress = silent,
) -> TrainingResult:
    """Train the top layers so that targets align with, and separate from, the central language.

    In a distributed run each process takes its share of the rows of a step; the sum of their
    gradients is that of the whole step.

    Args:
        structure: the untouched model; it is not changed.
        subspaces: of this model, with the layers that `state_layers` tells.
        parallel: states of the training prompts, with what enters those that `boundary_layers`
            tells.
        settings: see `TrainSettings`.
        seed: order of the rows.
        token_budget: padded tokens of a forward; None takes what is fastest on this machine.
        scratch: room for the optimizer's moments; None takes memory without limit.
        checkpoint: a file to write progress to and to continue from, removed by the caller.
        progress: told the steps done.

    Raises:
        TrainingError: the loss is not finite or runs away. The checkpoint, if any, keeps the last
            good state.
        ConfigError: the checkpoint is of another training.
    """
    scratch = scratch or Scratch()
    n_tokens = settings.epochs * int(parallel.states.lengths.sum())
    token_budget = token_budget or best_token_budget(structure, n_tokens, scratch.batch_bytes)
    layers = trained_layers(settings, structure.n_layers)
    rank = settings.update_rank
    crown = (
        Crown(structure, layers)
        if rank is None
        else LowRankCrown(structure, layers, rank=rank, alpha=rank, seed=seed)
    )
    graph_tokens = best_graph_tokens(structure, len(crown.layers), scratch.batch_bytes)
    read = state_layers(settings, structure.n_layers)
    objective = LensObjective(
        subspaces, parallel, settings, crown, token_budget, graph_tokens, read
    )
    with structure.loaded_head() if objective.reads_logits else contextlib.nullcontext():
        log = optimize(
            dict(crown.named_trainable()),
            objective,
            len(parallel.rows),
            settings,
            identity=[
                [dict(row) for row in parallel.rows],
                parallel.choices,
                parallel.states.lengths.tolist(),
                parallel.n_answer,
                parallel.answers,
            ],
            usual_loss=objective.usual_loss,
            seed=seed,
            scratch=scratch,
            roomy=structure.streaming is None,
            checkpoint=checkpoint,
            progress=progress,
        )
    return TrainingResult(crown.into_changes(), log)
