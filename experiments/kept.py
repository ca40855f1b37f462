"""The values that experiments/run.py kept, and the figures that are made of them.

A row of the corpus is the unit of every interval: its languages and seeds are averaged first, so
that a row's translations do not count as independent examples.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from polylens.artefacts import read_json
from polylens.evaluation.choices import CHOICES
from polylens.evaluation.letters import habit, right_shares
from polylens.evaluation.statistics import PairedDifference, compare_paired
from polylens.evaluation.suite import BITS_PER_BYTE

RESULTS = Path(__file__).parent / "results"


def folder(model: str) -> Path:
    """Where what was measured of a model is kept."""
    return RESULTS / model


@dataclass(frozen=True)
class Side:
    """What was measured of one setting, seed by seed; of the untouched model there is one."""

    contents: tuple[Mapping[str, Any], ...]

    @cached_property
    def tasks(self) -> list[dict[str, Mapping[str, Any]]]:
        """For each seed: task → its values."""
        return [
            {task["task"]: task for part in content["parts"].values() for task in part}
            for content in self.contents
        ]

    def rows(self, names: Sequence[str], base: Side | None = None) -> np.ndarray | None:
        """Mean over tasks and seeds of each row's value; None where one was not measured.

        Of choices, what has been added to the habit of `base` counts.
        """
        seeds = [seed for seed in self.tasks if all(name in seed for name in names)]
        if not seeds or not names:
            return None
        before = (base or self).tasks[0]
        values = [[_values(seed[name], before[name]) for name in names] for seed in seeds]
        return np.mean(values, axis=(0, 1))

    def of_seeds(self, names: Sequence[str]) -> list[float]:
        """The mean of each seed."""
        return [
            float(np.mean([seed[name]["values"] for name in names]))
            for seed in self.tasks
            if all(name in seed for name in names)
        ]


def _values(task: Mapping[str, Any], before: Mapping[str, Any]) -> list[float]:
    if "log_odds" in task:
        return right_shares(task["log_odds"], habit(before["log_odds"]))
    return list(task["values"])


def read(model: str, split: str) -> dict[str, Side]:
    """Return setting → what was measured."""
    found: dict[str, list[tuple[int, Any]]] = {}
    for path in sorted((folder(model) / split).glob("*.json")):
        name, _, seed = path.stem.rpartition("-")
        if path.stem == "base":
            name, seed = "base", "0"
        found.setdefault(name, []).append((int(seed), read_json(path)))
    return {
        name: Side(tuple(content for _, content in sorted(seeds, key=lambda one: one[0])))
        for name, seeds in found.items()
    }


def compare(base: Side, side: Side, names: Sequence[str]) -> PairedDifference | None:
    """Compare rows; of texts and replies in percent of the base's mean."""
    before, after = base.rows(names), side.rows(names, base)
    if before is None or after is None:
        return None
    scale = 100.0 / float(before.mean()) if metric(base, names) == BITS_PER_BYTE else 1.0
    return compare_paired(list(before * scale), list(after * scale))


def metric(side: Side, names: Sequence[str]) -> str:
    return str(side.tasks[0][names[0]]["metric"])


@dataclass(frozen=True)
class Column:
    """A figure of the tables."""

    title: str
    prefix: str
    suffix: str = ""
    percent: bool = True

    def of(self, languages: Sequence[str], side: Side) -> list[str]:
        """Names of the tasks in these languages that there are."""
        wanted = [f"{self.prefix}_{k}{self.suffix}" for k in languages]
        return [name for name in wanted if any(name in seed for seed in side.tasks)]

    def cell(
        self, base: Side, side: Side, languages: Sequence[str], *, with_interval: bool = True
    ) -> str:
        """The difference with its interval; of the base, the figure."""
        names = self.of(languages, base)
        if not names:
            return ""
        if side is base:
            rows = base.rows(names)
            assert rows is not None
            return f"{rows.mean():.3f}" if self.percent else f"{rows.mean():.0f}"
        found = compare(base, side, names)
        if found is None:
            return ""
        factor, digits = self._unit(base, names)
        low, high = found.low * factor, found.high * factor
        text = f"{found.difference * factor:+.{digits}f}"
        if with_interval:
            # Rows that hardly differ bound nothing on one side.
            from_, to = f"{low:+.{digits}f}", f"{high:+.{digits}f}"
            interval = f"{from_} to {to}"
            if math.inf in (-low, high):
                interval = f"at least {from_}" if low > -math.inf else f"at most {to}"
            text = f"{text} ({interval})"
        return f"**{text}**" if low > 0 or high < 0 else text

    def _unit(self, base: Side, names: Sequence[str]) -> tuple[float, int]:
        if metric(base, names) == BITS_PER_BYTE:
            return 1.0, 2  # percent already
        return (100.0, 1) if self.percent else (1.0, 0)


REPLIES = Column("replies, %", "replies")
TEXTS = Column("texts, %", "bits_per_byte")
FIDELITY = Column("in language, points", "fidelity")
REPEATING = Column("repeating, points", "repeating")
ECHOING = Column("echoing, points", "echoing")
SOUND = Column("sound, points", "sound")
LENGTH = Column("length, characters", "length", percent=False)
LETTERS = Column("XCOPA letters, points", "xcopa", "_letters")
CHOICE = Column("choice, points", CHOICES)
CONTINUATION = Column("XCOPA continuation, points", "xcopa")
COLUMNS = (
    REPLIES,
    TEXTS,
    CHOICE,
    FIDELITY,
    REPEATING,
    ECHOING,
    SOUND,
    LENGTH,
    LETTERS,
    CONTINUATION,
)
# Of answers under a repetition penalty, the same for every side.
PENALISED = tuple(
    dataclasses.replace(one, suffix="_penalised")
    for one in (FIDELITY, REPEATING, ECHOING, SOUND, LENGTH)
)
