"""Grades for open answers: what a judge makes of one model's, or of two models' before and after.

A judge grades each answer from 1 to 10, or says which of two answers is better; a preference counts
only if it survives swapping their positions (Zheng et al. 2023, https://arxiv.org/abs/2306.05685).
Start with `judge_answers`. The answers are `polylens.evaluation.mt_bench`'s, the asking is
`polylens.evaluation.judgements`'s.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polylens.errors import UsageError
from polylens.evaluation.judgements import Judge, Judgements, ask_all, judgement_key
from polylens.evaluation.measures import Example, Measure, Task, compare_runs
from polylens.evaluation.mt_bench import Conversation
from polylens.evaluation.statistics import PairedDifference, compare_paired, holm, mean_interval
from polylens.evaluation.verdicts import (
    PAIRWISE,
    SINGLE,
    JudgeQuestion,
    Mode,
    ask_for_grade,
    ask_for_preference,
    render,
)
from polylens.progress import Progress, silent


@dataclass(frozen=True)
class Usage:
    """What judging took.

    Attributes:
        requests: answers of the judge; those asked again for want of a verdict count twice.
        input_tokens: of prompts, as far as the server tells.
        output_tokens: of the judge's answers, as far as the server tells.
        cost: by the judge's prices; None if there are none, or the server tells no tokens.
    """

    requests: int
    input_tokens: int
    output_tokens: int
    cost: float | None


@dataclass(frozen=True)
class Grade:
    """Mean grade of a group of answers.

    Attributes:
        side: "before" or "after".
        group: "overall", "turn 1", "category math", "language zh", …
        n: questions of which every turn of the group has a grade. A question counts once: its
            turns are not independent, and are averaged first.
        mean: from 1 to 10. Higher is better.
        low: lower end of the 95 % interval.
        high: upper end.
    """

    side: str
    group: str
    n: int
    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Preference:
    """Wins of the answers after over those before.

    Attributes:
        group: as in `Grade`.
        wins: answers that are better after, in both orders.
        ties: neither is better in both orders.
        losses: answers that are better before, in both orders.
        rates: of losses ("before") and wins ("after"), a question counted once; the difference is
            the win rate less the loss rate.
        p_corrected: of equal rates, by Holm's method over the groups.
    """

    group: str
    wins: int
    ties: int
    losses: int
    rates: PairedDifference
    p_corrected: float


@dataclass(frozen=True)
class JudgeSummary:
    """What a judge found.

    Attributes:
        judge: name of its model.
        models: whose answers were judged, by side.
        grades: of each side alone.
        changes: grades before and after, on the questions that both have grades of.
        preferences: of pairs; empty if they were not compared.
        n_pairs: pairs that were judged in both orders.
        n_agreeing: of these, pairs on which both orders agree.
        n_identical: pairs of identical conversations: ties that no judge was asked about.
        unreadable: judgements without a verdict, even when asked again; they count nowhere else.
        total: what all judgements took, kept ones too.
        now: what was asked this time.
    """

    judge: str
    models: Mapping[str, str]
    grades: tuple[Grade, ...]
    changes: tuple[Measure, ...]
    preferences: tuple[Preference, ...]
    n_pairs: int
    n_agreeing: int
    n_identical: int
    unreadable: tuple[str, ...]
    total: Usage
    now: Usage

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return dataclasses.asdict(self)


def judge_answers(
    judge: Judge,
    before: Sequence[Conversation],
    after: Sequence[Conversation] | None,
    path: Path,
    *,
    modes: Sequence[Mode] = (SINGLE, PAIRWISE),
    progress: Progress = silent,
) -> JudgeSummary:
    """Judge a model's answers, or two models' answers to the same questions.

    Args:
        judge: who judges.
        before: a model's answers.
        after: another's to the same questions; None grades the first alone.
        path: JSONL of judgements; what is in it is not asked again.
        modes: grade each answer, compare pairs, or both.
        progress: told the judgements done.

    Raises:
        UsageError: the questions differ, there is nothing to compare, or the judge cannot be
            reached or refuses.
        MissingExtraError: the client is not installed.
        CorruptFileError: `path` is damaged.

    Note:
        Runs an event loop of its own, so it cannot be called from within one.
    """
    sides = {"before": before}
    if after is not None:
        sides["after"] = _matching(before, after)
    elif SINGLE not in modes:
        raise UsageError("pairs must have answers of two models, got one; add those after")
    graded = {side: _gradings(side, of) for side, of in sides.items() if SINGLE in modes}
    pairs = {} if PAIRWISE not in modes or after is None else _pairs(before, sides["after"])
    asked = [one for of_side in graded.values() for one in of_side.values()]
    asked += [one for orders in pairs.values() for one in orders]
    kept = Judgements(path)
    n_before = len(kept)
    ask_all(judge, asked, kept, progress)

    grades = {
        side: _grouped(before, {place: kept.verdict(judge, one) for place, one in of_side.items()})
        for side, of_side in graded.items()
    }
    verdicts = {
        place: tuple(kept.verdict(judge, one) for one in orders) for place, orders in pairs.items()
    }
    outcomes = {place: _outcome(*of_pair) for place, of_pair in verdicts.items()}
    both = [of_pair for of_pair in verdicts.values() if of_pair and None not in of_pair]
    keys = {judgement_key(judge, one, prompt) for one in asked for prompt in one.wordings}
    return JudgeSummary(
        judge=judge.model,
        models={side: ", ".join(sorted({one.model for one in of})) for side, of in sides.items()},
        grades=tuple(_grades(grades)),
        changes=tuple(_changes(grades)),
        preferences=tuple(_preferences(_grouped(before, outcomes))),
        n_pairs=len(both),
        n_agreeing=sum(of_pair in _AGREEING for of_pair in both),
        n_identical=sum(not orders for orders in pairs.values()),
        unreadable=tuple(
            f"{one.mode}: {one.label}" for one in asked if kept.verdict(judge, one) is None
        ),
        total=_usage(judge, [one for key in sorted(keys) if (one := kept.get(key)) is not None]),
        now=_usage(judge, kept.newest(len(kept) - n_before)),
    )


# A question's and a turn's number, both from 0.
_Place = tuple[int, int]

# Verdicts with the answer before as A, and as B.
_AGREEING = (("A", "B"), ("B", "A"), ("C", "C"))


def _matching(
    before: Sequence[Conversation], after: Sequence[Conversation]
) -> Sequence[Conversation]:
    """Return the answers after in the order of those before.

    Raises:
        UsageError: they do not answer the same questions.
    """
    theirs = {one.question.key: one for one in after}
    ours = {one.question.key for one in before}
    for what, missing in (
        ("after", [key for key in ours if key not in theirs]),
        ("before", [key for key in theirs if key not in ours]),
    ):
        if missing:
            raise UsageError(
                f"both sides must answer the same questions, but {len(missing)} have no answer "
                f"{what}, the first is {' '.join(min(missing))}; answer them with `polylens "
                "mt-bench`"
            )
    for one in before:
        if theirs[one.question.key].question.turns != one.question.turns:
            raise UsageError(
                f"both sides must answer the same questions, but {one.question.id} has other "
                "texts before than after; answer one file with both models"
            )
    return [theirs[one.question.key] for one in before]


def _gradings(side: str, conversations: Sequence[Conversation]) -> dict[_Place, JudgeQuestion]:
    return {
        (number, turn): ask_for_grade(one, turn, f"{_label(one, turn)}, {side}")
        for number, one in enumerate(conversations)
        for turn in range(len(one.answers))
    }


def _pairs(
    before: Sequence[Conversation], after: Sequence[Conversation]
) -> dict[_Place, tuple[JudgeQuestion, ...]]:
    """Return what is asked of each pair: both orders, or nothing if its sides are identical."""
    found: dict[_Place, tuple[JudgeQuestion, ...]] = {}
    for number, (old, new) in enumerate(zip(before, after, strict=True)):
        for turn in range(len(old.answers)):
            label = _label(old, turn)
            found[number, turn] = (
                ()
                if render(old, turn) == render(new, turn)
                else (
                    ask_for_preference(old, new, turn, f"{label}, before as A"),
                    ask_for_preference(new, old, turn, f"{label}, after as A"),
                )
            )
    return found


def _label(conversation: Conversation, turn: int) -> str:
    question = conversation.question
    return f"{question.language} {question.id}, turn {turn + 1}"


def _outcome(*verdicts: object) -> float | None:
    """Return 1 if the answer after wins in both orders, -1 if it loses in both, else 0.

    Args:
        verdicts: with the answer before as A, and as B; none for identical answers.

    Returns:
        None if one of the verdicts is unreadable.
    """
    if None in verdicts:
        return None
    if verdicts == ("B", "A"):
        return 1.0
    return -1.0 if verdicts == ("A", "B") else 0.0


_Groups = dict[str, dict[int, tuple[float, ...]]]


def _grouped(conversations: Sequence[Conversation], values: Mapping[_Place, Any]) -> _Groups:
    """Return group → question → values of its turns; questions that lack one are left out.

    Args:
        conversations: the questions.
        values: of each question and turn; None where the judge gave none.
    """
    groups: _Groups = {"overall": {}}
    by_turn: _Groups = {}
    by_kind: _Groups = {}
    languages = {one.question.language for one in conversations}
    for number, one in enumerate(conversations):
        turns: list[Any] = [values.get((number, turn)) for turn in range(len(one.answers))]
        for turn, value in enumerate(turns, start=1):
            if value is not None:
                by_turn.setdefault(f"turn {turn}", {})[number] = (value,)
        if None in turns:
            continue
        kinds = [f"category {one.question.category}"]
        if len(languages) > 1:
            kinds.append(f"language {one.question.language}")
        groups["overall"][number] = tuple(turns)
        for kind in kinds:
            by_kind.setdefault(kind, {})[number] = tuple(turns)
    ordered = {**groups, **dict(sorted(by_turn.items())), **dict(sorted(by_kind.items()))}
    return {name: members for name, members in ordered.items() if members}


def _mean(turns: Sequence[float]) -> float:
    return sum(turns) / len(turns)


def _grades(values: Mapping[str, _Groups]) -> Iterator[Grade]:
    for side, groups in values.items():
        for group, members in groups.items():
            means = [_mean(turns) for turns in members.values()]
            yield Grade(side, group, len(means), _mean(means), *mean_interval(means))


def _changes(values: Mapping[str, _Groups]) -> list[Measure]:
    """Compare the groups that both sides have, on the questions that both have grades of."""
    if len(values) < 2:
        return []
    old, new = values.values()
    pairs = []
    for group in old.keys() & new.keys():
        shared = [number for number in old[group] if number in new[group]]
        if shared:
            before, after = (
                [Example(str(number), _mean(side[group][number])) for number in shared]
                for side in (old, new)
            )
            pairs.append((Task(group, None, "answers", "grade"), before, after))
    pairs.sort(key=lambda pair: list(old).index(pair[0].name))
    return compare_runs(pairs)


def _preferences(groups: _Groups) -> list[Preference]:
    found = []
    for group, members in groups.items():
        outcomes = list(members.values())
        flat = [outcome for turns in outcomes for outcome in turns]
        rates = compare_paired(
            [_mean([outcome < 0 for outcome in turns]) for turns in outcomes],
            [_mean([outcome > 0 for outcome in turns]) for turns in outcomes],
        )
        wins, ties, losses = (flat.count(outcome) for outcome in (1.0, 0.0, -1.0))
        found.append(Preference(group, wins, ties, losses, rates, 1.0))
    corrected = holm([one.rates.p_value for one in found])
    return [
        dataclasses.replace(one, p_corrected=p) for one, p in zip(found, corrected, strict=True)
    ]


def _usage(judge: Judge, judgements: Sequence[Mapping[str, Any]]) -> Usage:
    n_input = [one["input_tokens"] for one in judgements]
    n_output = [one["output_tokens"] for one in judgements]
    totals = [sum(n or 0 for n in side) for side in (n_input, n_output)]
    cost = None
    if (
        judge.input_price is not None
        and judge.output_price is not None
        and None not in n_input + n_output
    ):
        cost = (totals[0] * judge.input_price + totals[1] * judge.output_price) / 1e6
    return Usage(len(judgements), totals[0], totals[1], cost)
