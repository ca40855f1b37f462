"""Trunk pass and crown training against the floor, in memory and streamed; further candidates.

The floor is what the counted operations take at the rate of a float32 matrix product of 1,024 rows,
measured before and after each piece of work.
"""

from __future__ import annotations

from functools import partial
from statistics import median
from typing import Any

from common import Data, by_language, layer_parameters, open_quietly, record, repeat, timed
from polylens.config import Runtime, TrainSettings
from polylens.crown import CrownDelta, run_crown
from polylens.execution import plan_execution
from polylens.hidden_states import Keep, collect_hidden_states, n_tokens_run
from polylens.machine import keeping_freed_memory
from polylens.models.loading import LanguageModel
from polylens.models.source import describe
from polylens.objective import ParallelStates
from polylens.scratch import Scratch
from polylens.subspaces import probe_subspaces
from polylens.token_budget import best_token_budget
from polylens.training import train_crown

N_CANDIDATES = 4
N_ALTERNATIONS = 3

# For the streamed side; what the plan makes of it is what is measured.
MEMORY = 1_500_000_000


def run(name: str, data: Data) -> None:
    """Measure and record."""
    result: dict[str, Any] = {"model": name, "data": data.name, "memory_allowed": MEMORY}
    models = {}
    for how in ("streamed", "in_memory"):
        models[how], result[how] = measure(name, data, how == "streamed")
    result["streaming_over_memory"] = alternate(models, data)
    record("floor", result)
    print(table(result))


def alternate(models: dict[str, LanguageModel], data: Data) -> float:
    """Return how many times as long a streamed pass takes, from passes that take turns."""
    prompts = data.rows(models["streamed"]).ids[::3]
    keep = Keep(final=True)

    def seconds(how: str) -> float:
        structure = models[how].structure
        collect = partial(collect_hidden_states, structure, prompts, keep, token_budget=1024)
        return repeat(1, collect)[0]

    return median(seconds("streamed") / seconds("in_memory") for _ in range(N_ALTERNATIONS))


def measure(name: str, data: Data, streamed: bool) -> tuple[LanguageModel, dict[str, Any]]:
    """Time a model's passes."""
    with timed() as loading:
        model = open_quietly(name, streamed=streamed)
    structure = model.structure
    dtype = structure.dtype
    texts, prompts = data.texts(model), data.rows(model)
    ids = [one for found in texts.values() for one in found]
    n_layer = layer_parameters(model)
    scratch = Scratch()
    if streamed:
        assert model.source is not None
        runtime = Runtime.model_validate({"memory": MEMORY})
        facts = describe(model.source.folder)
        execution = plan_execution(facts, runtime, n_crown_layers=2, with_head=False)
        scratch = execution.scratch()
    budget = best_token_budget(structure, 10**9, scratch.batch_bytes)

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
    with timed(dtype) as timing:
        pooled = collect_hidden_states(structure, ids, Keep(pooling="last"), **how)
    note("probe", trunk * n_tokens_run(ids, once=True), timing)
    subspaces = probe_subspaces(by_language(pooled, texts), central="en")
    del pooled

    boundary = structure.n_layers - 2
    keep = Keep(boundary_layers=(boundary,), final=True)
    with timed(dtype) as timing:
        states = collect_hidden_states(structure, prompts.ids, keep, **how)
    n_tokens = n_tokens_run(prompts.ids)
    note("trunk", trunk * n_tokens, timing)
    trunk_seconds = timing.seconds

    with timed(dtype) as timing:
        parallel = ParallelStates(states, prompts.rows, "en")
        trained = train_crown(structure, subspaces, parallel, TrainSettings(epochs=1), **how)
    note("crown_epoch", 3 * 2 * n_layer * 2 * n_tokens, timing)

    delta = CrownDelta(trained.changes, {"layers": (boundary, boundary + 1)})
    with timed(dtype) as timing, keeping_freed_memory():
        for _ in range(N_CANDIDATES):
            with delta.applied(structure):
                for _ in run_crown(structure, states, token_budget=budget):
                    pass
    share = 2 / structure.n_layers
    result["candidate"] = {
        "seconds": timing.seconds / N_CANDIDATES,
        "over_share_of_layers": timing.seconds / N_CANDIDATES / trunk_seconds / share,
    }
    result["dtype"] = str(dtype).removeprefix("torch.")
    result["n_tokens"] = {"probe": n_tokens_run(ids, once=True), "train": n_tokens}
    return model, result


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
            f"{a['n_tokens']['train']} tokens after sharing, computed in {a['dtype']}, batches of "
            f"{a['token_budget']} and {b['token_budget']} tokens, matrix product at "
            f"{a['probe']['gflops_per_second']:.0f} GFLOP/s. A further candidate's crown takes "
            f"{a['candidate']['over_share_of_layers']:.2f} times its share of the layers in "
            f"memory, {b['candidate']['over_share_of_layers']:.2f} times streamed. Taking turns, a "
            f"streamed pass takes {result['streaming_over_memory']:.2f} times as long as one in "
            f"memory. The streamed side was allowed {result['memory_allowed'] / 1e9:.1f} GB.",
        ]
    )
