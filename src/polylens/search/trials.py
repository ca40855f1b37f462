"""What a search finds: a trial has one point a strength, with gain, loss and the gate's verdict.

The **gain** is in percent: of each task of a target language the share of its bits per byte that
went, or the points of accuracy that came; averaged over a language's tasks, then over languages.
The **loss** is the central language's, as a share of what the gate allows: the worst of its checks,
and what is ruled out at its confidence; the gate holds where that is at most 1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from polylens.evaluation.gate import Verdict
from polylens.evaluation.measures import Measure

Outcome = Literal["measured", "previewed", "stopped", "refused"]


@dataclass(frozen=True)
class Figure:
    """A number with its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:+.2f} ({self.low:+.2f} to {self.high:+.2f})"


def target_gain(measures: Sequence[Measure], languages: Sequence[str]) -> Figure:
    """Return the mean gain on some languages, in percent.

    The ends of the interval are averaged like the figures, as if all tasks erred together: rows are
    translations of each other, so no less can be assumed. It is at least as wide as it must be.

    Args:
        measures: of any languages; states are left out, since they are no gain by themselves.
        languages: the targets.
    """
    by_language = []
    for language in languages:
        own = [
            _percent(one)
            for one in measures
            if one.task.language == language and one.task.protocol != "states"
        ]
        if own:
            by_language.append(_mean(own))
    return Figure(*_mean(by_language))


def _percent(one: Measure) -> tuple[float, float, float]:
    """Gain of a task in percent, and the ends of its interval."""
    change = one.change
    unit = change.before / 100 if one.task.metric == "bits_per_byte" else 0.01
    low, high = change.low, change.high
    if not one.task.higher_is_better:
        low, high = -high, -low
    return one.gain / unit, low / unit, high / unit


def _mean(figures: Sequence[tuple[float, float, float]]) -> tuple[float, float, float]:
    value, low, high = (sum(part) / len(figures) for part in zip(*figures, strict=True))
    return value, low, high


def central_loss(verdict: Verdict) -> tuple[float, float]:
    """Return the worst loss of a gate's checks, and what is ruled out, as shares of the margin."""
    results = [check.result for check in verdict.checks]
    return (
        max(-result.difference / result.margin for result in results),
        max(-result.bound / result.margin for result in results),
    )


@dataclass(frozen=True)
class Point:
    """A trained crown at one strength of the dial.

    Attributes:
        strength: the dial.
        gain: of the target languages, in percent.
        loss: of the central language, 1 being what the gate allows.
        loss_bound: a larger loss is ruled out.
        holds: the gate holds here and at every lower strength that was tried.
        gate: what the gate says here.
        measures: each task before and after.
    """

    strength: float
    gain: Figure
    loss: float
    loss_bound: float
    holds: bool
    gate: str
    measures: tuple[Measure, ...]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Point:
        """Make a point from what `dataclasses.asdict` gave."""
        return cls(
            **{
                **values,
                "gain": Figure(**values["gain"]),
                "measures": tuple(map(Measure.from_dict, values["measures"])),
            }
        )


@dataclass(frozen=True)
class Trial:
    """Some settings, and what came of them.

    Attributes:
        number: from 0; that one has the settings that the search started from.
        settings: by dotted key.
        outcome: "measured"; "previewed", that is, no more than trained on a part of the rows;
            "stopped" before all was measured; or "refused" by training.
        reason: why it was not measured.
        points: by rising strength; of a stopped trial on what had been measured, of a previewed
            one of replies alone, on its part of the rows.
        seconds: by piece of work.
    """

    number: int
    settings: Mapping[str, Any]
    outcome: Outcome
    reason: str
    points: tuple[Point, ...]
    seconds: Mapping[str, float]

    @property
    def best(self) -> Point | None:
        """The point of highest gain at which the gate holds; None if there is none."""
        allowed = [point for point in self.points if point.holds]
        if self.outcome != "measured" or not allowed:
            return None
        return max(allowed, key=lambda point: point.gain.value)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Trial:
        """Make a trial from what `to_dict` gave."""
        return cls(**{**values, "points": tuple(map(Point.from_dict, values["points"]))})


def pareto_front(trials: Iterable[Trial]) -> list[tuple[Trial, Point]]:
    """Return the points that none beats in both gain and loss, by rising loss.

    The untouched model, which gains and loses nothing, is one of those that must be beaten.
    """
    points = [(trial, p) for trial in trials if trial.outcome == "measured" for p in trial.points]
    points.sort(key=lambda pair: (pair[1].loss, -pair[1].gain.value))
    front: list[tuple[Trial, Point]] = []
    best = float("-inf")
    for trial, point in points:
        least = max(best, 0.0) if point.loss >= 0 else best
        if point.gain.value > least:
            front.append((trial, point))
            best = point.gain.value
    return front
