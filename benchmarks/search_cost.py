"""How many settings a search tries in the time that the plain reference trains three times.

The search is `polylens search` as it comes, in seven languages on the starter corpus, with no
states kept from before. The reference probes and trains once with the published settings on the
given data; its cost grows with the tokens, so that it runs on a share of them.
"""

from __future__ import annotations

import contextlib
import copy
import tempfile
import time
from pathlib import Path
from typing import Any

import reference
from common import LANGUAGES, Data, open_quietly, record
from polylens import load_config
from polylens.config import Runtime
from polylens.machine import keeping_freed_memory
from polylens.search import Trial, search
from polylens.states_cache import fresh_hidden_states

N_REFERENCE_RUNS = 3
MAX_TRIALS = 1000


class _Spent(Exception):
    """The time is over."""


def run(name: str, data: Data) -> None:
    """Measure and record."""
    one = data.share * _reference_seconds(name, data)
    print(f"one run of the reference: {one:.0f} s", flush=True)
    trials: list[dict[str, Any]] = []
    started = time.perf_counter()

    def note(trial: Trial) -> None:
        spent = time.perf_counter() - started
        if spent > N_REFERENCE_RUNS * one:
            raise _Spent
        trials.append({"at": spent, **trial.seconds, **_best_gain(trial)})
        print(trial.number, trial.outcome, trials[-1], flush=True)

    config = load_config(None, {"model": name, "languages": ",".join(LANGUAGES[1:])})
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(_Spent):
        search(
            config,
            Path(folder) / "search",
            n_trials=MAX_TRIALS,
            runtime=Runtime(dtype="float32"),
            collect=fresh_hidden_states,
            on_trial=note,
        )
    result = {
        "model": name,
        "data": data.name,
        "share": data.share,
        "reference_run": one,
        "trials": trials,
    }
    record("search", result)
    print(table(result))


def _best_gain(trial: Trial) -> dict[str, float]:
    return {"gain": trial.best.gain.value} if trial.best else {}


def _reference_seconds(name: str, data: Data) -> float:
    model = open_quietly(name, dtype="float32")
    texts, prompts = data.texts(model), data.rows(model)
    trainee = copy.deepcopy(model.causal_lm)
    started = time.perf_counter()
    with keeping_freed_memory():
        found = reference.probe(model.causal_lm, texts)
        reference.train(trainee, model.causal_lm, prompts.ids, prompts.rows, found, LANGUAGES)
    return time.perf_counter() - started


def table(result: dict[str, Any]) -> str:
    """Return the result as it stands in docs/performance.md."""
    trials, one = result["trials"], result["reference_run"]
    whole = [trial for trial in trials if "training" in trial]
    head = "| runs of the reference | minutes | trials in that time | of them trained on all rows |"
    lines = [f"{head} best gain, % |", "|-|-|-|-|-|"]
    for runs in range(1, N_REFERENCE_RUNS + 1):
        n, n_whole = (sum(t["at"] <= runs * one for t in some) for some in (trials, whole))
        gains = [t["gain"] for t in whole if t["at"] <= runs * one and "gain" in t]
        best = f"{max(gains):+.2f}" if gains else "none"
        lines.append(f"| {runs} | {runs * one / 60:.0f} | {n} | {n_whole} | {best} |")

    def mean(what: str, some: list[dict[str, Any]]) -> str:
        return f"{sum(trial.get(what, 0.0) for trial in some) / len(some):.0f} s"

    share = "" if result["share"] == 1 else f" ({result['share']} times what a share of it took)"
    return "\n".join(
        [
            *lines,
            "",
            f"{result['model']}, seven languages, float32. In the mean a preview took "
            f"{mean('preview', trials)}; on all rows, a trial was trained for "
            f"{mean('training', whole)} and measured for {mean('texts', whole)}, "
            "trunk passes among it. The search trains on 64 rows of the starter corpus, the "
            f"reference on the paper's data{share}.",
        ]
    )
