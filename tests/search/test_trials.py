"""Gains and fronts, against what is worked out by hand or tried out in full."""

from __future__ import annotations

import random
from typing import Any

import pytest

from polylens.config import GateSettings
from polylens.evaluation.gate import check_gate
from polylens.evaluation.measures import Example, Task, compare_runs
from polylens.search.trials import Figure, Point, Trial, central_loss, pareto_front, target_gain


def point(gain: float, loss: float, *, strength: float = 1.0, holds: bool = True) -> Point:
    return Point(strength, Figure(gain, gain - 1, gain + 1), loss, loss + 0.1, holds, "", ())


def trial(number: int, *points: Point, outcome: Any = "measured") -> Trial:
    return Trial(number, {"train.epochs": number}, outcome, "", points, {})


def pair(name: str, language: str, before: list[float], after: list[float], **task: Any) -> Any:
    sides = [[Example(str(i), v) for i, v in enumerate(values)] for values in (before, after)]
    return Task(name, language, **task), *sides


BITS: dict[str, Any] = {"protocol": "text", "metric": "bits_per_byte", "higher_is_better": False}
RIGHT: dict[str, Any] = {"protocol": "continuation", "metric": "acc"}


def test_the_gain_is_a_mean_over_tasks_then_languages() -> None:
    measures = compare_runs(
        [
            pair("bits_sw", "sw", [4.0, 2.0], [3.0, 1.5], **BITS),  # a quarter of the bits
            pair("acc_sw", "sw", [0, 0, 0, 1], [1, 0, 0, 1], **RIGHT),  # 25 points
            pair("bits_zh", "zh", [2.0, 2.0], [2.2, 2.2], **BITS),  # 10 % worse
            pair("bits_en", "en", [1.0, 1.0], [9.0, 9.0], **BITS),  # no target
            pair("near_sw", "sw", [0, 0], [1, 1], protocol="states", metric="acc"),  # no gain
        ]
    )
    found = target_gain(measures, ["sw", "zh"])
    assert found.value == pytest.approx(((25 + 25) / 2 - 10) / 2)
    assert found.low < found.value < found.high


def test_the_interval_holds_the_gain_with_its_sign() -> None:
    rising = compare_runs([pair("b", "sw", [1.0, 1.1, 1.2, 1.0, 1.3, 1.1], [1.5] * 6, **BITS)])
    found = target_gain(rising, ["sw"])
    assert found.low < found.value < found.high < 0


def test_the_loss_is_in_units_of_the_margin() -> None:
    before, after = [1.0, 2.0, 3.0, 2.0, 1.0], [1.02, 2.05, 3.05, 2.04, 1.02]
    settings = GateSettings(text_margin=0.04)
    verdict = check_gate([pair("b", "en", before, after, **BITS)], ["en"], settings)
    assert verdict is not None
    loss, bound = central_loss(verdict)
    assert loss == pytest.approx((sum(after) / sum(before) - 1) / 0.04)
    assert bound > loss
    assert (bound <= 1) == verdict.holds


def test_nothing_beats_the_front_and_the_front_beats_the_rest() -> None:
    draw = random.Random(0)
    trials = [
        trial(n, *(point(draw.uniform(-1, 2), draw.uniform(-0.5, 2)) for _ in range(3)))
        for n in range(12)
    ]
    everything = [p for one in trials for p in one.points]
    untouched = point(0.0, 0.0)

    def beats(a: Point, b: Point) -> bool:
        return a.gain.value >= b.gain.value and a.loss <= b.loss and a != b

    expected = {
        (p.loss, p.gain.value)
        for p in everything
        if not any(beats(other, p) for other in (*everything, untouched))
    }
    front = pareto_front(trials)
    assert {(p.loss, p.gain.value) for _, p in front} == expected
    assert [p.loss for _, p in front] == sorted(p.loss for _, p in front)


def test_trials_that_were_not_measured_have_no_best_point() -> None:
    assert trial(0, point(1, 0), outcome="stopped").best is None
    assert trial(0, point(1, 0, holds=False)).best is None
    assert pareto_front([trial(0, point(1, 0), outcome="stopped")]) == []
    best = trial(0, point(1, 0), point(2, 0.5), point(9, 2, holds=False)).best
    assert best is not None
    assert best.gain.value == 2


def test_a_trial_survives_json() -> None:
    measures = compare_runs([pair("b", "sw", [1.0, 2.0, 1.5], [1.0, 1.8, 1.5], **BITS)])
    whole = Point(1.0, Figure(1.0, 0.0, 2.0), 0.5, 0.9, True, "Gate holds.", tuple(measures))
    one = Trial(3, {"train.layers": 2}, "measured", "", (whole,), {"training": 1.5})
    assert Trial.from_dict(one.to_dict()) == one
