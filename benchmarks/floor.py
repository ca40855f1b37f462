"""Trunk pass and crown training against the floor, in memory and streamed; further candidates.

The floor is what the counted operations take at the rate of a float32 matrix product of 1,024 rows,
measured before and after each piece of work.
"""

from __future__ import annotations

from typing import Any

from common import CPU, Data, by_language, layer_parameters, open_quietly, record, timed
from polylens.config import TrainSettings
from polylens.crown import CrownDelta, run_crown
from polylens.hidden_states import Keep, collect_hidden_states, n_tokens_run
from polylens.machine import keeping_freed_memory
from polylens.scratch import Scratch
from polylens.subspaces import probe_subspaces
from polylens.token_budget import best_token_budget
from polylens.training import ParallelStates, train_crown

N_CANDIDATES = 4


def run(name: str, data: Data) -> None:
    """Measure and record."""
    result: dict[str, Any] = {"model": name, "data": data.name, "device": CPU.type}
    for streamed in (True, False):
        result["streamed" if streamed else "in_memory"] = measure(name, data, streamed)
    own, plain = result["streamed"]["probe"], result["in_memory"]["probe"]
    result["streaming_over_memory"] = own["over_floor"] / plain["over_floor"]
    record("floor", result)
    print(table(result))


def measure(name: str, data: Data, streamed: bool) -> dict[str, Any]:
    """Time a model's passes."""
    with timed() as loading:
        model = open_quietly(name, dtype="float32", streamed=streamed)
    structure = model.structure
    texts, prompts = data.texts(model), data.rows(model)
    ids = [one for found in texts.values() for one in found]
    n_layer = layer_parameters(model)
    # Without room in memory, states and moments go to files: the leanest way there is.
    scratch = Scratch(0) if streamed else None
    budget = best_token_budget(structure, 10**9, 4 * 10**9)

    result: dict[str, Any] = {"load_seconds": loading.seconds, "token_budget": budget}

    def note(part: str, operations: float, timing: Any) -> None:
        result[part] = {
            "seconds": timing.seconds,
            "over_floor": timing.over_floor(operations),
            "peak_bytes": timing.peak_bytes,
            "gflops_per_second": timing.flops_per_second / 1e9,
        }

    trunk = 2 * n_layer * structure.n_layers
    how: dict[str, Any] = {"token_budget": budget, "scratch": scratch}
    with timed() as timing:
        pooled = collect_hidden_states(structure, ids, Keep(pooling="last"), **how)
    note("probe", trunk * n_tokens_run(ids, once=True), timing)
    subspaces = probe_subspaces(by_language(pooled, texts), central="en")
    del pooled

    boundary = structure.n_layers - 2
    keep = Keep(boundary_layers=(boundary,), final=True)
    with timed() as timing:
        states = collect_hidden_states(structure, prompts.ids, keep, **how)
    n_tokens = n_tokens_run(prompts.ids)
    note("trunk", trunk * n_tokens, timing)
    trunk_seconds = timing.seconds

    with timed() as timing:
        parallel = ParallelStates(states, prompts.rows, "en")
        trained = train_crown(structure, subspaces, parallel, TrainSettings(epochs=1), **how)
    note("crown_epoch", 3 * 2 * n_layer * 2 * n_tokens, timing)

    delta = CrownDelta(trained.changes, {"layers": (boundary, boundary + 1)})
    with timed() as timing, keeping_freed_memory():
        for _ in range(N_CANDIDATES):
            with delta.applied(structure):
                for _ in run_crown(structure, states, token_budget=budget):
                    pass
    share = 2 / structure.n_layers
    result["candidate"] = {
        "seconds": timing.seconds / N_CANDIDATES,
        "over_share_of_layers": timing.seconds / N_CANDIDATES / trunk_seconds / share,
    }
    result["n_tokens"] = {"probe": n_tokens_run(ids, once=True), "train": n_tokens}
    return result


def table(result: dict[str, Any]) -> str:
    """Return the result as it stands in docs/performance.md."""
    lines = [
        "| work | in memory, s | times the floor | streamed, s | times the floor | peak memory |",
        "|-|-|-|-|-|-|",
    ]
    names = {
        "probe": "trunk pass, last tokens of all layers",
        "trunk": "trunk pass, every token at the cut",
        "crown_epoch": "one epoch of training",
    }
    a, b = result["in_memory"], result["streamed"]
    for part, what in names.items():
        lines.append(
            f"| {what} | {a[part]['seconds']:.0f} | {a[part]['over_floor']:.2f} | "
            f"{b[part]['seconds']:.0f} | {b[part]['over_floor']:.2f} | "
            f"{a[part]['peak_bytes'] / 1e9:.1f} and {b[part]['peak_bytes'] / 1e9:.2f} GB |"
        )
    lines.append(
        f"| loading | {a['load_seconds']:.0f} | | {b['load_seconds']:.0f} | | |",
    )
    return "\n".join(
        [
            *lines,
            "",
            f"{result['model']}, {result['data']}, {a['n_tokens']['probe']} and "
            f"{a['n_tokens']['train']} tokens after sharing, computed in float32, batches of "
            f"{a['token_budget']} tokens, matrix product at "
            f"{a['probe']['gflops_per_second']:.0f} GFLOP/s. A further candidate's crown takes "
            f"{a['candidate']['over_share_of_layers']:.2f} times its share of the layers in "
            f"memory, {b['candidate']['over_share_of_layers']:.2f} times streamed. Streaming takes "
            f"{result['streaming_over_memory']:.2f} times as long as running in memory.",
        ]
    )
