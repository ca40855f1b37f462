"""What log odds of letters say: what a model prefers, and what it is in the habit of.

A question with two answers is asked twice, with the right one as A and as B. Half of the sum of its
two log odds is what the model prefers, whatever the letters; half of their difference is how far it
leans towards A. Leans scatter from question to question about the model's habit. A model that picks
the likelier letter is right where it prefers the right answer by more than it leans the other way:

    right = ½ Φ((preference + habit) / scatter) + ½ Φ((preference - habit) / scatter)

Every set of questions has a habit of its own: what leans towards A on these may lean nowhere on a
benchmark. So only what a change adds to the habit counts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Odds = Sequence[Sequence[float]]

# Where no lean differs from another.
_LEAST_SCATTER = 1e-9


def habit(odds: Odds) -> float:
    """Return how far a model leans towards A over all questions, in nats.

    Args:
        odds: log odds of the right letter where it is A, and where it is B; (n_questions, 2).
    """
    return float(_leans(odds).mean())


def right_shares(odds: Odds, habit_before: float | None = None) -> list[float]:
    """Return the share of right letters that is to be expected for each question; 0.5 is guessing.

    Args:
        odds: log odds of the right letter where it is A, and where it is B; (n_questions, 2).
        habit_before: the habit that was there, which does not count; None takes the model's own.

    Example:
        >>> right_shares([(0.5, 0.1), (0.1, 0.5)], habit_before=0.0)  # prefers 0.3, leans by ±0.2
        [0.9331927987311419, 0.9331927987311419]
    """
    preferences, leans = np.asarray(odds, dtype=np.float64).mean(1), _leans(odds)
    scatter = max(float(leans.std()), _LEAST_SCATTER)
    shift = 0.0 if habit_before is None else float(leans.mean()) - habit_before
    as_a, as_b = (stats.norm.cdf((preferences + sign * shift) / scatter) for sign in (1, -1))
    shares: list[float] = ((as_a + as_b) / 2).tolist()
    return shares


def _leans(odds: Odds) -> NDArray[np.float64]:
    as_a, as_b = np.asarray(odds, dtype=np.float64).T
    difference: NDArray[np.float64] = (as_a - as_b) / 2
    return difference
