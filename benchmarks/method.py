"""The whole method against the plain reference: probing and one epoch of training, same prompts.

Both sides run in float32 on the same texts and rows, one after the other, and their subspaces and
losses are compared.
"""

from __future__ import annotations

import copy
import time
from typing import Any

import torch

import reference
from common import LANGUAGES, Data, by_language, open_quietly, record, timed
from polylens.config import PRESETS, TrainSettings
from polylens.hidden_states import Keep, collect_hidden_states
from polylens.objective import ParallelStates
from polylens.subspaces import Subspaces, probe_subspaces
from polylens.training import train_crown


def run(name: str, data: Data) -> None:
    """Measure and record."""
    model = open_quietly(name, dtype="float32")
    structure = model.structure
    texts, prompts = data.texts(model), data.rows(model)

    with timed() as ours:
        ids = [one for found in texts.values() for one in found]
        states = collect_hidden_states(structure, ids, Keep(pooling="last"))
        subspaces = probe_subspaces(by_language(states, texts), central="en")
        probed = time.perf_counter()
        keep = Keep(boundary_layers=(structure.n_layers - 2,), final=True)
        parallel = ParallelStates(
            collect_hidden_states(structure, prompts.ids, keep), prompts.rows, "en"
        )
        settings = TrainSettings(**PRESETS["paper"]["train"])
        log = train_crown(structure, subspaces, parallel, settings, seed=0).log
        trained = time.perf_counter()
    our_training = trained - probed

    trainee = copy.deepcopy(model.causal_lm)
    with timed() as theirs:
        found = reference.probe(model.causal_lm, texts)
        probed = time.perf_counter()
        expected = reference.train(
            trainee, model.causal_lm, prompts.ids, prompts.rows, found, LANGUAGES
        )
        trained = time.perf_counter()
    their_training = trained - probed

    result = {
        "model": name,
        "data": data.name,
        "n_texts": len(ids),
        "n_rows": len(prompts.rows),
        "seconds": {"probe": ours.seconds - our_training, "train": our_training},
        "reference_seconds": {"probe": theirs.seconds - their_training, "train": their_training},
        "times_faster": theirs.seconds / ours.seconds,
        "probe_times_faster": (theirs.seconds - their_training) / (ours.seconds - our_training),
        "train_times_faster": their_training / our_training,
        "peak_bytes": ours.peak_bytes,
        "reference_peak_bytes": theirs.peak_bytes,
        "largest_projector_difference": projector_difference(subspaces, found),
        "largest_loss_difference": loss_difference(log, expected),
        "gflops_per_second": ours.flops_per_second / 1e9,
    }
    record("method", result)
    print(table(result))


def projector_difference(subspaces: Subspaces, found: tuple[torch.Tensor, ...]) -> float:
    """Return the largest difference, over layers, of a projector on either subspace (norm)."""
    _, agnostic, basis = found
    n_layers = len(agnostic)
    worst = 0.0
    for entry in range(n_layers):
        layer = entry if entry < n_layers - 1 else n_layers  # the last has passed the final norm
        at = subspaces.position(layer)
        own = torch.nn.functional.normalize(subspaces.agnostic_vector[at], dim=0)
        other = torch.nn.functional.normalize(agnostic[entry], dim=0)
        for a, b in ((subspaces.specific_basis[at], basis[entry]), (own[None], other[None])):
            worst = max(worst, float(torch.linalg.matrix_norm(a.T @ a - b.T @ b, ord=2)))
    return worst


def loss_difference(log: list[dict[str, float]], expected: list[dict[str, float]]) -> float:
    """Return the largest difference of any part of the loss of any step, in units of that loss."""
    return max(
        abs(mine[part] - value) / theirs["loss"]
        for mine, theirs in zip(log, expected, strict=True)
        for part, value in theirs.items()
    )


def table(result: dict[str, Any]) -> str:
    """Return the result as it stands in docs/performance.md."""
    own, plain = result["seconds"], result["reference_seconds"]
    rows = [
        ("probing", plain["probe"], own["probe"], result["probe_times_faster"]),
        ("training, one epoch", plain["train"], own["train"], result["train_times_faster"]),
        ("both", sum(plain.values()), sum(own.values()), result["times_faster"]),
    ]
    lines = ["| work | reference, s | PolyLens, s | times faster |", "|-|-|-|-|"]
    lines += [f"| {what} | {a:.0f} | {b:.0f} | {ratio:.1f} |" for what, a, b, ratio in rows]
    return "\n".join(
        [
            *lines,
            "",
            f"{result['model']}, {result['data']} ({result['n_texts']} texts, {result['n_rows']} "
            f"rows in 7 languages), float32. Largest difference of a projector "
            f"{result['largest_projector_difference']:.1e}, of a loss "
            f"{result['largest_loss_difference']:.1e} of it. Peak memory "
            f"{result['reference_peak_bytes'] / 1e9:.1f} GB and {result['peak_bytes'] / 1e9:.1f} "
            "GB.",
        ]
    )
