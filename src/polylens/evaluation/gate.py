"""The gate: was a language harmed? And the dial: how far can one go without harm?

A loss beyond the margin has to be ruled out, at 95 %, one-sided: a sample too small to tell fails.
Tasks that are right or wrong are pooled within a protocol (continuations, chat), since few have the
hundreds of examples that a margin of a point takes; each protocol has to hold, since the two can
disagree. Bits per byte have to hold within a relative margin, and the built-in choice of a letter
within one of its own. All checks must hold, so the chance that real harm passes is at most 5 %,
however many there are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from polylens.config import GateSettings
from polylens.errors import GateError
from polylens.evaluation.measures import (
    Example,
    Measure,
    Protocol,
    Task,
    TaskRun,
    compare_runs,
    paired_values,
)
from polylens.evaluation.statistics import NonInferiority, non_inferior
from polylens.languages import language_name

_WHAT = {
    "continuation": "continuation tasks",
    "chat": "chat tasks",
    "choice": "choice of letters",
    "text": "bits per byte",
}
# Unit of a figure, what a value is multiplied by, decimals.
_UNITS = {"text": ("%", 100, 2)}


@dataclass(frozen=True)
class Check:
    """One thing that has to hold.

    Attributes:
        language: that is protected.
        protocol: of the tasks.
        tasks: their names.
        result: in points of accuracy / 100, for texts as a share of the bits per byte before.
    """

    language: str
    protocol: Protocol
    tasks: tuple[str, ...]
    result: NonInferiority

    def sentence(self) -> str:
        """Say what was found."""
        r = self.result
        name = f"{language_name(self.language)}, {_WHAT[self.protocol]}"
        unit, scale, digits = _UNITS.get(self.protocol, ("points", 100, 2))
        text = (
            f"{name}: {scale * r.difference:+.{digits}f} {unit} (n = {r.n}), a loss beyond "
            f"{max(0.0, -scale * r.bound):.{digits}f} is ruled out at 95 %, allowed is "
            f"{scale * r.margin:g}"
        )
        if not r.holds and r.n < r.n_needed:
            return f"{text}; at least {r.n_needed} examples are needed to show that"
        return text


@dataclass(frozen=True)
class Verdict:
    """What the gate says.

    Attributes:
        checks: at least one.
    """

    checks: tuple[Check, ...]

    @property
    def holds(self) -> bool:
        """Whether every check does."""
        return all(check.result.holds for check in self.checks)

    def sentence(self) -> str:
        """Say the outcome: of the first language in full, and what failed."""
        if self.holds:
            first = self.checks[0].language
            own = [check.sentence() for check in self.checks if check.language == first]
            others = dict.fromkeys(c.language for c in self.checks if c.language != first)
            if others:
                own.append(f"it holds for {', '.join(map(language_name, others))}, too")
            return f"Gate holds. {'; '.join(own)}."
        failed = [check.sentence() for check in self.checks if not check.result.holds]
        return "Gate fails. " + "; ".join(failed) + "."

    def require(self) -> None:
        """Raise if the gate fails.

        Raises:
            GateError: harm cannot be ruled out; exit code 3.
        """
        if not self.holds:
            raise GateError(self.sentence())


def check_gate(
    pairs: Sequence[tuple[Task, Sequence[Example], Sequence[Example]]],
    languages: Sequence[str],
    settings: GateSettings,
    *,
    texts_of: Sequence[str] = (),
) -> Verdict | None:
    """Check that languages were not harmed.

    Args:
        pairs: tasks with their examples before and after.
        languages: to protect.
        settings: margins.
        texts_of: languages of which only the bits per byte are to hold: their benchmarks are there
            to show a gain, and one large enough for that need not rule out a loss of a point.

    Returns:
        The verdict; None where there is nothing to tell by.
    """
    checks = []
    for language in (*languages, *texts_of):
        own = [pair for pair in pairs if pair[0].language == language]
        for protocol in ("continuation", "chat") if language in languages else ():
            chosen = [p for p in own if p[0].protocol == protocol and _is_right_or_wrong(p)]
            if chosen:
                before = [one.value for _, old, _ in chosen for one in old]
                after = [one.value for _, _, new in chosen for one in new]
                result = non_inferior(before, after, settings.margin, level=settings.level)
                checks.append(Check(language, protocol, _names(chosen), result))
        texts = [pair for pair in own if pair[0].protocol == "text"]
        if texts:
            before = [one.value for _, old, _ in texts for one in old]
            after = [one.value for _, _, new in texts for one in new]
            mean = float(np.mean(before))
            result = non_inferior(
                [value / mean for value in before],
                [value / mean for value in after],
                settings.text_margin,
                higher_is_better=False,
                level=settings.level,
            )
            checks.append(Check(language, "text", _names(texts), result))
        choices = [pair for pair in own if pair[0].protocol == "choice"]
        if choices and language in languages:
            paired = [paired_values(*pair) for pair in choices]
            result = non_inferior(
                [value for old, _ in paired for value in old],
                [value for _, new in paired for value in new],
                settings.choice_margin,
                level=settings.level,
            )
            checks.append(Check(language, "choice", _names(choices), result))
    return Verdict(tuple(checks)) if checks else None


def _names(pairs: Sequence[tuple[Task, Sequence[Example], Sequence[Example]]]) -> tuple[str, ...]:
    return tuple(task.name for task, _, _ in pairs)


def _is_right_or_wrong(pair: tuple[Task, Sequence[Example], Sequence[Example]]) -> bool:
    task, before, after = pair
    binary = all(one.value in (0.0, 1.0) for one in (*before, *after))
    return binary and task.higher_is_better


@dataclass(frozen=True)
class Dial:
    """What each strength costs and brings, and the one that was chosen.

    Attributes:
        strength: the highest up to which the gate holds; where it holds at none, the one wanted.
        holds: whether the gate holds there.
        verdicts: strength → verdict; None where there was nothing to tell by, which counts as
            holding.
        measures: strength → figures against the untouched model.
    """

    strength: float
    holds: bool
    verdicts: Mapping[float, Verdict | None]
    measures: Mapping[float, tuple[Measure, ...]]

    @property
    def wanted(self) -> float:
        """The highest strength that was tried."""
        return max(self.verdicts)

    def sentence(self) -> str:
        """Say what was chosen, and why."""
        verdict = self.verdicts[self.wanted]
        if verdict is None:
            return "Gate: nothing to tell by."
        if verdict.holds and self.strength == self.wanted:
            return verdict.sentence()
        if self.holds:
            return (
                f"{verdict.sentence()} The dial was turned down from {self.wanted:g} to "
                f"{self.strength:g}, where the gate holds."
            )
        return f"{verdict.sentence()} It holds at no strength down to {min(self.verdicts):g}."

    def require(self) -> None:
        """Raise if the gate holds at no strength.

        Raises:
            GateError: exit code 3.
        """
        if not self.holds:
            raise GateError(
                f"{self.sentence()} No model was saved; lower train.learning_rate or "
                "train.epochs, or give the gate a wider margin"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "strength": self.strength,
            "holds": self.holds,
            "tried": [
                {
                    "strength": strength,
                    "holds": verdict is None or verdict.holds,
                    "verdict": None if verdict is None else dataclasses.asdict(verdict),
                    "measures": [dataclasses.asdict(one) for one in self.measures[strength]],
                }
                for strength, verdict in self.verdicts.items()
            ],
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Dial:
        """Make a dial from what `to_dict` gave."""
        return cls(
            values["strength"],
            values["holds"],
            {
                one["strength"]: None if one["verdict"] is None else _verdict(one["verdict"])
                for one in values["tried"]
            },
            {
                one["strength"]: tuple(map(Measure.from_dict, one["measures"]))
                for one in values["tried"]
            },
        )


def _verdict(values: Mapping[str, Any]) -> Verdict:
    return Verdict(
        tuple(
            Check(
                check["language"],
                check["protocol"],
                tuple(check["tasks"]),
                NonInferiority(**check["result"]),
            )
            for check in values["checks"]
        )
    )


def turn_dial(
    runs: Sequence[TaskRun],
    strengths: Sequence[float],
    languages: Sequence[str],
    settings: GateSettings,
    *,
    texts_of: Sequence[str] = (),
) -> Dial:
    """Choose the strength.

    Harm need not grow evenly with the strength, so one that holds above one that fails is not
    taken.

    Args:
        runs: tasks, answered by the untouched model first and then at each strength.
        strengths: rising, above 0.
        languages: to protect.
        settings: margins.
        texts_of: languages of which only the bits per byte are to hold.
    """
    verdicts: dict[float, Verdict | None] = {}
    measures: dict[float, tuple[Measure, ...]] = {}
    for number, strength in enumerate(strengths, start=1):
        pairs = [(run.task, run.examples[0], run.examples[number]) for run in runs]
        verdicts[strength] = check_gate(pairs, languages, settings, texts_of=texts_of)
        measures[strength] = tuple(compare_runs(pairs))
    chosen = None
    for strength, verdict in verdicts.items():
        if verdict is not None and not verdict.holds:
            break
        chosen = strength
    return Dial(strengths[-1] if chosen is None else chosen, chosen is not None, verdicts, measures)
