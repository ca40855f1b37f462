"""The gate: harm does not pass, what is too small to tell does not pass, the dial finds the end."""

from __future__ import annotations

import json

import numpy as np
import pytest

from polylens.config import GateSettings
from polylens.errors import GateError
from polylens.evaluation.gate import Dial, check_gate, turn_dial
from polylens.evaluation.measures import Example, Protocol, Task, TaskRun, compare_runs

LIKELIHOOD = Task("xcopa_en", "en", "continuation", "acc")
LETTERS = Task("xcopa_en_letters", "en", "chat", "acc")
BITS = Task("bits_per_byte_en", "en", "text", "bits_per_byte", higher_is_better=False)
CHOICES = Task("choices_en", "en", "choice", "right_letters")
SWAHILI = Task("xcopa_sw", "sw", "continuation", "acc")


def make(values: object) -> tuple[Example, ...]:
    return tuple(Example(str(key), float(value)) for key, value in enumerate(values))  # type: ignore[arg-type, var-annotated]


SAME = make([1, 0] * 250)
WRECK = make([0] * 500)


def test_an_identical_model_passes_and_a_wreck_does_not() -> None:
    verdict = check_gate([(LIKELIHOOD, SAME, SAME)], ["en"], GateSettings())
    assert verdict is not None
    assert verdict.holds
    verdict.require()
    verdict = check_gate([(LIKELIHOOD, SAME, WRECK)], ["en"], GateSettings())
    assert verdict is not None
    with pytest.raises(GateError, match=r"English, continuation tasks: -50\.00 points"):
        verdict.require()


def test_too_few_examples_fail_and_tell_how_many_are_needed() -> None:
    few = SAME[:50]
    verdict = check_gate([(LIKELIHOOD, few, few)], ["en"], GateSettings())
    assert verdict is not None
    assert not verdict.holds
    needed = verdict.checks[0].result.n_needed
    assert f"at least {needed} examples are needed" in verdict.sentence()
    enough = make([1] * needed)
    verdict = check_gate([(LIKELIHOOD, enough, enough)], ["en"], GateSettings())
    assert verdict is not None
    assert verdict.holds


def test_each_protocol_has_to_hold() -> None:
    pairs = [(LIKELIHOOD, SAME, SAME), (LETTERS, SAME, WRECK)]
    verdict = check_gate(pairs, ["en"], GateSettings())
    assert verdict is not None
    assert [check.result.holds for check in verdict.checks] == [True, False]
    assert not verdict.holds


def test_tasks_of_a_protocol_are_pooled() -> None:
    halves = [(Task(f"t{k}", "en", "chat", "acc"), SAME[:250], SAME[:250]) for k in range(2)]
    verdict = check_gate(halves, ["en"], GateSettings())
    assert verdict is not None
    assert verdict.checks[0].result.n == 500
    assert verdict.holds


def test_bits_per_byte_are_a_share_of_those_before() -> None:
    generator = np.random.default_rng(0)
    before = generator.normal(2.0, 0.1, 200)
    for rise, holds in ((0.0, True), (0.005, True), (0.015, False)):
        after = make(before * (1 + rise) + generator.normal(0, 0.001, 200))
        verdict = check_gate([(BITS, make(before), after)], ["en"], GateSettings())
        assert verdict is not None
        assert verdict.holds is holds
        assert verdict.checks[0].result.difference == pytest.approx(-rise, abs=1e-3)


def chosen(preferences: np.ndarray, leans: np.ndarray) -> tuple[Example, ...]:
    odds = zip(preferences + leans, preferences - leans, strict=True)
    return tuple(Example(str(k), 0.0, log_odds=one) for k, one in enumerate(odds))


def test_choices_lose_by_preferences_and_by_a_new_habit() -> None:
    """And of a target the texts alone are to hold."""
    generator = np.random.default_rng(0)
    preferences, leans = generator.normal(0.4, 0.3, 32), generator.normal(0.1, 0.2, 32)
    before = chosen(preferences, leans)
    for after, holds in (
        (before, True),
        (chosen(preferences + 0.1, leans), True),
        (chosen(preferences * 3, leans * 3), True),
        (chosen(preferences - 0.1, leans), False),
        (chosen(preferences, leans + 0.3), False),
        (chosen(preferences, leans - 0.3), False),
        (chosen(preferences, 2 * leans), False),
    ):
        pair = (CHOICES, before, after)
        verdict = check_gate([pair], ["en"], GateSettings())
        assert verdict is not None
        assert verdict.holds is holds
        assert check_gate([pair], ["sw"], GateSettings(), texts_of=["en"]) is None
        (measure,) = compare_runs([pair])
        assert measure.gain == pytest.approx(verdict.checks[0].result.difference)
    assert verdict.sentence().startswith("Gate fails. English, choice of letters: -")
    assert verdict.sentence().endswith("is ruled out at 95 %, allowed is 3.")
    wider = check_gate([pair], ["en"], GateSettings(choice_margin=0.3))
    assert wider is not None
    assert wider.holds


@pytest.mark.parametrize("protocol", ["answers", "states"])
def test_what_is_not_the_gates_to_judge(protocol: Protocol) -> None:
    """Nor is another language."""
    assert check_gate([(SWAHILI, SAME, WRECK)], ["en"], GateSettings()) is None
    task = Task("retrieval_en", "en", protocol, "acc")
    assert check_gate([(task, SAME, WRECK)], ["en"], GateSettings()) is None
    verdict = check_gate([(SWAHILI, SAME, WRECK)], ["en", "sw"], GateSettings())
    assert verdict is not None
    assert not verdict.holds


def test_of_targets_only_the_texts_are_to_hold() -> None:
    """English may gain while a target breaks; a target's benchmark is there to show a gain."""
    texts = Task("bits_per_byte_sw", "sw", "text", "bits_per_byte", higher_is_better=False)
    before, after = make(np.linspace(2, 3, 40)), make(np.linspace(2, 3, 40) * 1.02)
    pairs = [(BITS, after, before), (SWAHILI, SAME, WRECK), (texts, before, after)]
    alone = check_gate(pairs, ["en"], GateSettings())
    verdict = check_gate(pairs, ["en"], GateSettings(), texts_of=["sw"])
    assert alone is not None
    assert verdict is not None
    assert alone.holds
    assert verdict.sentence().startswith("Gate fails. Swahili, bits per byte: -2.00 %")
    assert [check.protocol for check in verdict.checks] == ["text", "text"]
    unchanged = [(BITS, before, before), (SWAHILI, SAME, WRECK), (texts, before, before)]
    verdict = check_gate(unchanged, ["en"], GateSettings(), texts_of=["sw"])
    assert verdict is not None
    assert verdict.sentence().endswith("allowed is 1; it holds for Swahili, too.")


def dial(*n_wrong: int) -> Dial:
    """Turn the dial where each strength costs so many of 500 right answers."""
    before = make([1] * 500)
    after = [make([0] * n + [1] * (500 - n)) for n in n_wrong]
    strengths = [(k + 1) / len(after) for k in range(len(after))]
    run = TaskRun(LIKELIHOOD, (before, *after))
    return turn_dial([run], strengths, ["en"], GateSettings())


def test_the_dial_goes_up_to_the_first_strength_that_fails() -> None:
    assert (dial(0, 0, 0, 0).strength, dial(0, 0, 0, 0).holds) == (1, True)
    assert (dial(0, 0, 9, 50).strength, dial(0, 0, 9, 50).holds) == (0.5, True)
    assert dial(0, 50, 0, 0).strength == 0.25  # harm need not be monotone
    assert (dial(50, 50, 0, 0).strength, dial(50, 50, 0, 0).holds) == (1, False)


def test_the_dial_says_what_it_did() -> None:
    assert dial(0, 0).sentence().startswith("Gate holds. ")
    assert dial(0, 50).sentence().endswith("turned down from 1 to 0.5, where the gate holds.")
    with pytest.raises(GateError, match=r"at no strength down to 0\.5\. No model was saved"):
        dial(50, 50).require()
    nothing = turn_dial([TaskRun(SWAHILI, (SAME, SAME))], [1.0], ["en"], GateSettings())
    assert (nothing.holds, nothing.sentence()) == (True, "Gate: nothing to tell by.")


def test_the_dial_survives_json() -> None:
    made = dial(0, 9, 50)
    again = Dial.from_dict(json.loads(json.dumps(made.to_dict())))
    assert again == made
    assert again.sentence() == made.sentence()
