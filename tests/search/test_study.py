"""Asking Optuna: a planted optimum, a constraint, kills, and several processes."""

from __future__ import annotations

import math
import multiprocessing
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from polylens.config import load_config
from polylens.search import Figure, Point, Trial, read_space
from polylens.search.study import Study

CONFIG = load_config(None, {"languages": "sw,zh", "train.retain_targets": False})
SPACE = read_space(
    CONFIG,
    vary={
        "train.learning_rate": {"low": 1e-6, "high": 1e-2, "log": True},
        "train.position": ["last", "mean", "all"],
        "train.epochs": {"low": 1, "high": 9},
    },
)
START = SPACE.start(CONFIG)
FORKED = multiprocessing.get_context("fork")  # importing everything anew takes seconds
LIMIT = 1e-3  # above it the central language is harmed


def outcome(number: int, settings: Mapping[str, Any]) -> Trial:
    """The further up the learning rate the better, but the gate fails above the limit."""
    rate = math.log10(settings["train.learning_rate"])
    gain = rate + 6 + 2 * (settings["train.position"] == "mean") - abs(settings["train.epochs"] - 6)
    excess = rate - math.log10(LIMIT)
    holds = excess <= 0
    point = Point(1.0, Figure(gain, gain - 1, gain + 1), 1 + excess, 1 + excess, holds, "", ())
    return Trial(number, settings, "measured", "", (point,), {})


def work(folder: Path, n_trials: int, seed: int = 0) -> list[Trial]:
    study = Study(folder, SPACE, START, n_trials=n_trials, seed=seed)
    done = []
    while (claimed := study.claim()) is not None:
        done.append(outcome(*claimed))
        study.tell(done[-1])
    return done


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> list[Trial]:
    return work(tmp_path_factory.mktemp("study"), 45)


def test_the_first_trial_is_the_start(uninterrupted: list[Trial]) -> None:
    assert uninterrupted[0].settings == START
    assert [one.number for one in uninterrupted] == list(range(45))


def test_a_planted_optimum_is_found_within_the_constraint(uninterrupted: list[Trial]) -> None:
    best = max((one for one in uninterrupted if one.best), key=lambda one: one.points[0].gain.value)
    assert best.settings["train.learning_rate"] <= LIMIT
    assert best.settings["train.position"] == "mean"
    assert best.points[0].gain.value > 4  # 5 is the most, and 1.4 the mean of random trials
    late = uninterrupted[25:]
    assert sum(one.points[0].holds for one in late) > 0.7 * len(late)  # 3 in 4 of the space do


def test_the_seed_alone_decides(uninterrupted: list[Trial], tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "same").mkdir()
    assert work(tmp_path / "same", 12) == uninterrupted[:12]
    assert work(tmp_path / "other", 12, seed=1)[1:] != uninterrupted[1:12]


def test_a_killed_search_goes_on_as_if_it_had_not_been(
    uninterrupted: list[Trial], tmp_path: Path
) -> None:
    """A trial that was taken and not told is taken again, with its number and settings."""
    done: list[Trial] = []
    for n in range(14):
        study = Study(tmp_path, SPACE, START, n_trials=14, seed=0)  # as a new process would
        claimed = study.claim()
        assert claimed is not None
        assert claimed[0] == n
        if n % 3 == 0:  # lost: the next process takes it over
            again = Study(tmp_path, SPACE, START, n_trials=14, seed=0)
            assert again.claim() == claimed
            study = again
        done.append(outcome(*claimed))
        study.tell(done[-1])
        with (tmp_path / "optuna.journal").open("ab") as file:
            file.write(b'{"torn')
    assert done == uninterrupted[:14]


def test_processes_share_the_trials(tmp_path: Path) -> None:
    queue: Any = FORKED.Queue()

    def share() -> None:
        queue.put([one.number for one in work(tmp_path, 12)])

    workers = [FORKED.Process(target=share) for _ in range(2)]
    for worker in workers:
        worker.start()
    numbers = [number for _ in workers for number in queue.get()]
    for worker in workers:
        worker.join()
    assert sorted(numbers) == list(range(12))


def test_a_trial_of_another_process_is_left_to_it_while_that_lives(tmp_path: Path) -> None:
    ours, theirs = FORKED.Pipe()

    def hold() -> None:
        theirs.send(Study(tmp_path, SPACE, START, n_trials=2, seed=0).claim())
        time.sleep(600)

    other = FORKED.Process(target=hold)
    other.start()
    assert ours.recv() == (0, START)
    study = Study(tmp_path, SPACE, START, n_trials=2, seed=0)
    claimed = study.claim()
    assert claimed is not None
    assert claimed[0] == 1
    study.tell(outcome(*claimed))
    assert study.claim() is None
    assert study.n_elsewhere == 1
    other.kill()
    other.join()
    assert study.claim() == (0, START)


def test_a_trial_is_stopped_if_it_is_clearly_worse(tmp_path: Path) -> None:
    study = Study(tmp_path, SPACE, START, n_trials=3, seed=0)
    for number, gain in enumerate((5.0, 4.0, 2.0)):
        claimed = study.claim()
        assert claimed is not None
        holding = [Point(1.0, Figure(gain, gain - 1, gain + 1), 0, 0, True, "", ())]
        reason = study.stop("texts", holding)
        study.note(number, "texts", holding)
        assert bool(reason) == (number == 2), "3 is below 5 - 1, and 5 is not"
        study.tell(Trial(number, claimed[1], "measured", "", tuple(holding), {}))


def test_the_best_quarter_of_the_previews_goes_on(tmp_path: Path) -> None:
    gains = (2.0, 1.0, 3.0, 2.5, 2.9, 2.8, 2.7, 2.95, 2.6, 2.5, 2.4, 2.97)
    study = Study(tmp_path, SPACE, START, n_trials=len(gains), seed=0)
    stopped, why = [], ""
    for number, gain in enumerate(gains):
        claimed = study.claim()
        assert claimed is not None
        holding = [Point(1.0, Figure(gain, gain - 9, gain + 9), 0, 0, True, "", ())]
        study.note(number, "preview", holding)
        reason = study.stop("preview", holding)
        stopped.append(bool(reason))
        why = reason or why
        outcome: Any = "previewed" if reason else "measured"
        study.tell(Trial(number, claimed[1], outcome, reason, tuple(holding), {}))
    # The best so far goes on, and the second best, 2.97, where a quarter allows a third: 2.95 came
    # when two of seven had gone on.
    assert [gain for gain, no in zip(gains, stopped, strict=True) if not no] == [2.0, 3.0, 2.97]
    assert "replies gain +2.40 %, less than 8 of the 10 trials before it, of which 2" in why


def test_refused_trials_count_and_do_no_harm(tmp_path: Path) -> None:
    study = Study(tmp_path, SPACE, START, n_trials=12, seed=0)
    while (claimed := study.claim()) is not None:
        study.tell(Trial(*claimed, "refused", "training ran away", (), {}))
    assert study.n_elsewhere == 0
    assert study.importances() == {}
