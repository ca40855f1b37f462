"""Letters: the share is that of drawn questions, and of a habit only what is new counts."""

from __future__ import annotations

import numpy as np
import pytest

from polylens.evaluation.letters import habit, right_shares

RNG = np.random.default_rng(0)
PREFERENCES = RNG.normal(0.4, 0.3, 32)
LEANS = RNG.normal(0.1, 0.2, 32)


def odds_of(preferences: np.ndarray, leans: np.ndarray) -> list[list[float]]:
    return np.stack([preferences + leans, preferences - leans], 1).tolist()  # type: ignore[no-any-return]


ODDS = odds_of(PREFERENCES, LEANS)


def test_habit_is_the_mean_lean() -> None:
    assert habit(ODDS) == pytest.approx(LEANS.mean())


@pytest.mark.parametrize("shift", [0.0, 0.3, -0.3])
def test_shares_are_those_of_drawn_questions(shift: float) -> None:
    """Pick the likelier letter on questions whose leans are drawn, half of them in each order."""
    shares = right_shares(odds_of(PREFERENCES, LEANS + shift), LEANS.mean())
    leans = RNG.normal(shift, LEANS.std(), 100_000)
    for preference, share in zip(PREFERENCES[:8], shares, strict=False):
        right = np.concatenate([preference + leans > 0, preference - leans > 0])
        assert share == pytest.approx(right.mean(), abs=0.005)


def test_a_habit_that_was_there_does_not_count() -> None:
    expected = right_shares(ODDS)
    assert right_shares(odds_of(PREFERENCES, LEANS - 2)) == pytest.approx(expected)
    assert right_shares(ODDS, habit(ODDS)) == pytest.approx(expected)


def test_a_new_habit_harms_either_way_until_it_is_guessing() -> None:
    before = habit(ODDS)
    means = [
        np.mean(right_shares(odds_of(PREFERENCES, LEANS + shift), before))
        for shift in (0.0, 0.1, 0.3, 1.0, 9.0)
    ]
    assert means == sorted(means, reverse=True)
    assert means[0] > 0.8
    assert means[-1] == pytest.approx(0.5)
    other = right_shares(odds_of(PREFERENCES, LEANS - 0.3), before)
    assert np.mean(other) == pytest.approx(means[2])


def test_who_guesses_has_nothing_to_lose() -> None:
    guesses = odds_of(np.zeros(32), LEANS)
    assert right_shares(guesses) == pytest.approx([0.5] * 32)
    assert right_shares(odds_of(np.zeros(32), LEANS + 3), habit(guesses)) == pytest.approx(
        [0.5] * 32
    )


def test_surer_is_not_better() -> None:
    """The likelier letter is picked, however much likelier it is."""
    doubled = (2 * np.asarray(ODDS)).tolist()
    assert right_shares(doubled) == pytest.approx(right_shares(ODDS))


def test_one_question_and_leans_that_do_not_scatter() -> None:
    assert right_shares([(0.3, 0.1)]) == [1.0]
    assert right_shares([(0.3, 0.1)], 0.0) == [1.0]
    assert right_shares([(0.9, 0.1)], 0.0) == [1.0]
    assert right_shares([(0.9, -0.1)], 0.0) == [0.5]
    assert right_shares([(0.0, 0.0)]) == [0.5]
