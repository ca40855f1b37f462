"""Measures and scorecards: nothing is compared that does not belong together, nothing is lost."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from polylens.errors import CorruptFileError, UsageError
from polylens.evaluation.letters import right_shares
from polylens.evaluation.measures import (
    Example,
    Measure,
    Scorecard,
    Task,
    compare_runs,
    compare_scorecards,
)

TASK = Task("xcopa_sw", "sw", "continuation", "acc")
IDENTITY = {"model": "one", "tokenizer": "t"}


def examples(*values: float) -> tuple[Example, ...]:
    return tuple(Example(str(key), value, "猫は", 1, [-1.5]) for key, value in enumerate(values))


def scorecard(folder: Path, *values: float, **identity: Any) -> Scorecard:
    card = Scorecard(folder)
    card.open({**IDENTITY, **identity})
    card.add("xcopa", [(TASK, examples(*values))], with_samples=True)
    return card


def test_p_values_are_corrected_over_everything_compared() -> None:
    before, after = examples(*[0.0] * 12), examples(*[1.0] * 8, *[0.0] * 4)
    alone = compare_runs([(TASK, before, after)])[0]
    assert alone.p_corrected == alone.change.p_value == pytest.approx(2 / 2**8)
    three = compare_runs([(TASK, before, after)] * 3)
    assert [one.p_corrected for one in three] == pytest.approx([6 / 2**8] * 3)


def test_a_gain_is_positive_where_less_is_better() -> None:
    bits = Task("bits_per_byte_sw", "sw", "text", "bits_per_byte", higher_is_better=False)
    (measure,) = compare_runs([(bits, examples(2.0, 3.0), examples(1.0, 2.5))])
    assert measure.gain == pytest.approx(0.75)


def test_a_measure_survives_json() -> None:
    from dataclasses import asdict

    (measure,) = compare_runs([(TASK, examples(0, 1, 1), examples(1, 1, 1))])
    assert Measure.from_dict(json.loads(json.dumps(asdict(measure)))) == measure


def test_other_examples_are_refused() -> None:
    with pytest.raises(UsageError, match="must have answered the same examples of xcopa_sw"):
        compare_runs([(TASK, examples(1, 0), examples(1, 0, 1))])


def test_a_scorecard_gives_back_what_it_was_given(tmp_path: Path) -> None:
    card = scorecard(tmp_path / "a", 1, 0, 1, 1)
    assert card.examples("xcopa_sw") == examples(1, 0, 1, 1)
    assert card.tasks == {"xcopa_sw": TASK}
    assert card.finished == {"xcopa"}
    ((task, n, mean, low, high),) = card.figures()
    assert (task, n, mean) == (TASK, 4, 0.75)
    assert 0 < low < 0.75 < high < 1
    card.open(IDENTITY)  # to go on
    assert card.finished == {"xcopa"}


def test_samples_can_be_left_out(tmp_path: Path) -> None:
    card = Scorecard(tmp_path)
    card.open(IDENTITY)
    card.add("xcopa", [(TASK, examples(1, 0))], with_samples=False)
    assert "猫" not in (tmp_path / "xcopa_sw.jsonl").read_text(encoding="utf-8")
    assert [one.value for one in card.examples("xcopa_sw")] == [1, 0]


def test_answers_of_another_model_are_not_mixed_in(tmp_path: Path) -> None:
    card = scorecard(tmp_path, 1, 0)
    with pytest.raises(UsageError, match="hold answers of the same model and settings"):
        card.open({**IDENTITY, "model": "two"})


@pytest.mark.parametrize("content", ["", "{}", "not json", "[]"])
def test_a_damaged_scorecard(tmp_path: Path, content: str) -> None:
    card = scorecard(tmp_path, 1, 0)
    card.path.write_text(content)
    with pytest.raises(CorruptFileError, match=r"scorecard\.json"):
        _ = card.tasks


@pytest.mark.parametrize("line", ["{", '{"key": "0"}', '{"key": "0", "value": 1, "odd": 1}'])
def test_a_damaged_line(tmp_path: Path, line: str) -> None:
    card = scorecard(tmp_path, 1, 0)
    (tmp_path / "xcopa_sw.jsonl").write_text(line)
    with pytest.raises(CorruptFileError, match="one example a line"):
        card.examples("xcopa_sw")


CHOICES = Task("choices_en", "en", "choice", "right_letters")


def choices_in(folder: Path, model: str, odds: Sequence[tuple[float, float]]) -> Scorecard:
    card = Scorecard(folder)
    card.open({**IDENTITY, "model": model})
    chosen = tuple(Example(str(k), 0.5, log_odds=one) for k, one in enumerate(odds))
    card.add("choices", [(CHOICES, chosen)], with_samples=False)
    return card


def test_choices_of_two_models_are_compared_by_log_odds(tmp_path: Path) -> None:
    """Which are kept without samples, too: neither model's own value knows of a new habit."""
    odds = [(0.6, 0.2), (0.3, 0.5), (0.8, 0.6), (-0.1, 0.3)]
    before = choices_in(tmp_path / "a", "one", odds)
    after = choices_in(tmp_path / "b", "two", [(a + 0.4, b - 0.4) for a, b in odds])
    (measure,) = compare_scorecards(before, after)
    assert measure.change.before == pytest.approx(np.mean(right_shares(odds)))
    assert measure.gain < -0.05
    (same,) = compare_scorecards(before, before)
    assert same.gain == 0


@pytest.mark.parametrize("odds", ["", ', "log_odds": null', ', "log_odds": [1]'])
def test_a_damaged_choice(tmp_path: Path, odds: str) -> None:
    card = choices_in(tmp_path, "one", [(0.1, 0.2)])
    (tmp_path / "choices_en.jsonl").write_text(f'{{"key": "0", "value": 1{odds}}}')
    with pytest.raises(CorruptFileError, match="one example a line"):
        card.examples("choices_en")


def test_scorecards_are_compared_task_by_task(tmp_path: Path) -> None:
    one, two = scorecard(tmp_path / "a", 1, 0, 0), scorecard(tmp_path / "b", 1, 1, 0, model="two")
    (measure,) = compare_scorecards(one, two)
    assert (measure.change.n_higher, measure.change.n_lower) == (1, 0)


def test_scorecards_that_cannot_be_compared(tmp_path: Path) -> None:
    one = scorecard(tmp_path / "a", 1, 0)
    other = scorecard(tmp_path / "b", 1, 0, model="two", tokenizer="u")
    with pytest.raises(UsageError, match="must have the same tokenizer"):
        compare_scorecards(one, other)
    empty = Scorecard(tmp_path / "c")
    empty.open(IDENTITY)
    with pytest.raises(UsageError, match="must have a task in common"):
        compare_scorecards(one, empty)
