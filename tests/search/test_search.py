"""Whole searches on a tiny model: what is left, kills, second runs, and the run that follows."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_workbench import RUNTIME, SETTINGS

from polylens.config import RunConfig, load_config
from polylens.corpora import ParallelCorpus, read_parallel, starter_corpus
from polylens.crown import CrownDelta
from polylens.errors import CorpusError, RunError, UsageError
from polylens.plan import make_plan
from polylens.run import enhance
from polylens.search import SearchFolder, SearchResult, read_space, search
from polylens.search.split import split_rows, write_split

# Learning rates of which one changes next to nothing, and the others do harm: the start most.
VARY: dict[str, Any] = {
    "train.learning_rate": [0.3, 0.02, 1e-9],
    "train.layers": [1, 2],
}
N_TRIALS = 4


def configure(folder: Path, **changes: Any) -> RunConfig:
    start = {"train.learning_rate": 0.3, "train.retain_weight": 0.0}
    return load_config(None, {**SETTINGS, **start, "model": str(folder), **changes})


def run(config: RunConfig, out: Path, **options: Any) -> SearchResult:
    given: dict[str, Any] = {"n_trials": N_TRIALS, "n_development": 4, **options}
    space = read_space(config, vary=VARY)
    return search(config, out, space=space, strengths=(0.5, 1.0), runtime=RUNTIME, **given)


@pytest.fixture(scope="module")
def finished(taught_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> SearchResult:
    """A finished search; do not write to it."""
    os.environ["POLYLENS_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    return run(configure(taught_folder), tmp_path_factory.mktemp("searches") / "first")


def contents(folder: SearchFolder) -> dict[str, Any]:
    """What must not depend on when and how often a search was started."""
    trials = [{**one.to_dict(), "seconds": None} for one in folder.finished()]
    found = {path.name: path.read_text() for path in (folder.front, folder.best)}
    own = str(folder.path)
    return {"trials": trials, **{name: text.replace(own, "OUT") for name, text in found.items()}}


def test_a_search_leaves_what_it_promises(finished: SearchResult) -> None:
    folder = finished.folder
    lines = [json.loads(line) for line in folder.trials.read_text().splitlines()]
    assert [line["number"] for line in lines] == list(range(N_TRIALS))
    assert lines[0]["settings"] == {"train.learning_rate": 0.3, "train.layers": 2}
    (first, *_) = lines[0]["points"]
    assert {"strength", "gain", "loss", "holds", "gate", "measures"} <= first.keys()
    assert {"training", "texts"} == lines[0]["seconds"].keys()
    front = json.loads(folder.front.read_text())
    assert finished.best is not None
    assert front["best"]["trial"] == finished.best.trial
    assert {"development", "report"} <= front["best"].keys()
    page = folder.page.read_text()
    assert "Every trial" in page
    assert str(folder.path) not in page
    assert not list(folder.path.rglob("*.part"))


def test_the_gate_is_kept_and_the_harmless_value_found(finished: SearchResult) -> None:
    assert finished.best is not None
    assert finished.best.settings["train.learning_rate"] == 1e-9
    assert finished.holds
    assert finished.default is not None
    assert finished.default.settings["train.learning_rate"] == 0.3
    assert not finished.default.report.holds
    for trial in finished.trials:
        rate = trial.settings["train.learning_rate"]
        if rate != 0.02:  # harm may be too small to tell
            assert (trial.best is None) == (rate == 0.3)
    for one in finished.front:
        assert one.development.holds
    assert "report rows" in finished.sentence()


def test_no_text_is_in_two_parts(finished: SearchResult) -> None:
    rows = finished.folder.rows
    parts = [
        {text for row in read_parallel(rows / f"{name}.jsonl").rows for text in row.values()}
        for name in ("training", "development", "report")
    ]
    assert all(parts)
    training, development, report = parts
    assert not training & development
    assert not training & report
    assert not development & report
    heldout = starter_corpus().select(("en", "sw")).split(4)[1]
    assert report == {text for row in heldout.rows for text in row.values()}


def test_answers_are_kept_with_the_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"en": f"text {n}", "sw": f"maandishi {n}", "answer_sw": f"{n}"} for n in range(30)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = load_config(None, {"languages": "sw", "train.corpus": str(path), "evaluate.rows": 6})
    split = split_rows(config, 6)
    assert split.training.n_answers == {"en": 0, "sw": 18}
    write_split(split, tmp_path)
    for name in ("training", "development", "report"):
        kept = read_parallel(tmp_path / f"{name}.jsonl", ["en", "sw"])
        assert kept.fingerprint == getattr(split, name).fingerprint


def test_rows_that_repeat_a_text_are_in_one_part(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"en": f"text {n if n > 20 else n // 3}", "sw": f"maandishi {n}"} for n in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = load_config(None, {"languages": "sw", "train.corpus": str(path), "evaluate.rows": 6})
    split = split_rows(config, 12)

    def central(corpus: ParallelCorpus) -> set[str]:
        return {row["en"] for row in corpus.rows}

    training, development, report = map(central, (split.training, split.development, split.report))
    assert all((training, development, report))
    assert not training & development
    assert not training & report
    assert not development & report


def test_best_yaml_is_the_run_that_was_measured(finished: SearchResult, tmp_path: Path) -> None:
    """`enhance` reads it, trains the same crown to the bit, and reports on the report rows."""
    config = load_config(finished.folder.best)
    assert finished.best is not None
    for key, value in finished.best.settings.items():
        section, name = key.split(".")
        assert getattr(getattr(config, section), name) == value
    assert config.output.strength == finished.best.development.strength
    plan = make_plan(config, RUNTIME)
    assert plan.heldout.corpus.rows == read_parallel(finished.folder.rows / "report.jsonl").rows
    assert len(plan.training.rows) == SETTINGS["train.rows"]
    result = enhance(config, tmp_path / "run", runtime=RUNTIME)
    delta = CrownDelta.load(result.folder.delta)
    before = {one.task.name: one for one in finished.best.report.measures}
    (strength, *_) = [s for s in result.dial.measures if s == config.output.strength]
    for one in result.dial.measures[strength]:
        if one.task.protocol == "choice":  # half of the questions were searched on
            assert (before[one.task.name].change.n, one.change.n) == (16, 32)
        else:
            assert one.change == before[one.task.name].change
    assert any(torch.count_nonzero(change) for change in delta.changes.values())


def test_a_finished_search_does_nothing_again(
    finished: SearchResult, taught_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("a trial was repeated")

    monkeypatch.setattr("polylens.search.run.run_trial", never)
    monkeypatch.setattr("polylens.search.workbench.Workbench.train", never)
    before = contents(finished.folder)
    again = run(configure(taught_folder), finished.folder.path)
    assert contents(again.folder) == before
    assert again.best == finished.best


_KILLED = """
import json, os, signal, sys
sys.path[:0] = json.loads(sys.argv[3])
import torch
torch.set_num_threads(1)
import polylens.machine
polylens.machine.matmul_flops = lambda *_, **__: 1.0
from pathlib import Path
from test_search import configure, run
import polylens.search.run as module

write = module.write_json

def write_and_die(path, value):
    write(path, value)
    if path.name == "0001.json":
        os.kill(os.getpid(), signal.SIGKILL)

module.write_json = write_and_die
run(configure(Path(sys.argv[1])), Path(sys.argv[2]))
"""


def test_a_search_killed_before_optuna_was_told_ends_as_one_that_was_not(
    finished: SearchResult, taught_folder: Path, tmp_path: Path
) -> None:
    script = tmp_path / "killed.py"
    script.write_text(_KILLED)
    here = Path(__file__).parent
    paths = json.dumps([str(here), str(here.parent)])
    environment = {**os.environ, "POLYLENS_CACHE": str(tmp_path / "cache")}
    out = tmp_path / "search"
    command = [sys.executable, str(script), str(taught_folder), str(out), paths]
    code = subprocess.run(command, env=environment, check=False).returncode
    assert code == -signal.SIGKILL
    done: list[int] = []
    result = run(configure(taught_folder), out, on_trial=lambda trial: done.append(trial.number))
    assert done == [1, 2, 3]  # the second was written, and Optuna not told
    assert contents(result.folder) == contents(finished.folder)


@pytest.mark.parametrize(
    ("changes", "options", "error", "message"),
    [
        ({"seed": 3}, {}, RunError, "config, rows in"),
        ({}, {"answers": True}, RunError, "answers in"),
        ({}, {"n_development": 95}, CorpusError, "needs 95 rows to compare trials on"),
        ({}, {"n_trials": 0}, UsageError, "at least one trial"),
    ],
)
def test_a_folder_of_another_search_is_refused(
    finished: SearchResult,
    taught_folder: Path,
    changes: dict[str, Any],
    options: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        run(configure(taught_folder, **changes), finished.folder.path, **options)


def test_a_folder_of_something_else_is_refused(taught_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(RunError, match="holds other files"):
        run(configure(taught_folder), tmp_path)
