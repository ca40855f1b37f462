"""Intervals cover and tests err as often as they say, on simulated pairs."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import optimize, stats

from polylens.errors import UsageError
from polylens.evaluation.statistics import (
    _CONTINUITY,
    _tango_z,
    compare_paired,
    holm,
    mean_interval,
    non_inferior,
    rate_interval,
)


def pairs(rng, n, discordant, difference):
    """Right and wrong, before and after, with a true difference of rates."""
    rise, fall = (discordant + difference) / 2, (discordant - difference) / 2
    kind = rng.choice(4, n, p=[rise, fall, (1 - discordant) / 2, (1 - discordant) / 2])
    return np.isin(kind, (1, 2)).astype(float), np.isin(kind, (0, 2)).astype(float)


@pytest.mark.parametrize(
    ("n", "discordant", "difference"),
    [(50, 0.2, 0.1), (100, 0.1, 0.0), (100, 0.2, 0.1), (200, 0.05, 0.02), (500, 0.1, -0.03)],
)
def test_the_interval_of_rates_covers(n, discordant, difference):
    rng = np.random.default_rng(0)
    drawn = [compare_paired(*pairs(rng, n, discordant, difference)) for _ in range(2000)]
    covered = np.mean([one.low <= difference <= one.high for one in drawn])
    assert 0.93 <= covered <= 0.97


@pytest.mark.parametrize("n", [32, 100])
@pytest.mark.parametrize("shape", ["normal", "exponential", "scaled"])
def test_the_interval_of_other_values_covers(n, shape):
    rng = np.random.default_rng(1)
    covered = 0
    for seed in range(400):
        text = rng.lognormal(0, 0.5, n)  # hard texts are hard before and after
        change = {
            "normal": rng.normal(0.1, 1, n),
            "exponential": rng.exponential(0.1, n),
            "scaled": 0.1 * text / math.exp(0.125) * rng.lognormal(-0.02, 0.2, n),
        }[shape]
        one = compare_paired(text, text + change, seed=seed)
        covered += one.low <= 0.1 <= one.high
    assert 0.925 <= covered / 400 <= 0.975  # the rate itself is uncertain by 1.1 points


@pytest.mark.parametrize("margin", [0.01, 0.02, 0.05])
@pytest.mark.parametrize("n", [200, 350, 500])
def test_the_gate_errs_in_at_most_5_of_100_cases(n, margin):
    # Not simulated: all outcomes of a sample are gone through, at a true loss of the margin.
    worst = 0.0
    for discordant in (margin, 1.5 * margin, 4 * margin, 0.4):
        fall, rise = (discordant + margin) / 2, (discordant - margin) / 2
        error = 0.0
        for n_lower, p_lower in enumerate(stats.binom.pmf(np.arange(n + 1), n, fall)):
            if p_lower < 1e-9:
                continue
            left = n - n_lower
            p = p_lower * stats.binom.pmf(np.arange(left + 1), left, rise / (1 - fall))
            likely = np.flatnonzero(p >= 1e-7)
            error += sum(p[n_higher] for n_higher in likely if _holds(n_higher, n_lower, n, margin))
        worst = max(worst, error)
    assert worst <= 0.05


_BOUND = stats.norm.ppf(0.95)


def _holds(n_higher, n_lower, n, margin):
    return _tango_z(n_higher, n_lower, n, -margin, _CONTINUITY) >= _BOUND


def test_the_gate_on_other_values_errs_in_at_most_5_of_100_cases():
    rng = np.random.default_rng(2)
    passed = 0
    for seed in range(1000):
        before = rng.lognormal(0, 0.3, 64)
        after = before + rng.normal(0.05, 0.1, 64)
        passed += non_inferior(before, after, 0.05, higher_is_better=False, seed=seed).holds
    assert passed / 1000 <= 0.065  # 5 % and two standard errors of the simulation


def test_mcnemar_by_hand():
    # 6 rose, 1 fell: 2 · (1 + 7) / 2^7.
    before = [0.0] * 6 + [1.0] + [1.0] * 13
    after = [1.0] * 6 + [0.0] + [1.0] * 13
    found = compare_paired(before, after)
    assert found.p_value == pytest.approx(2 * 8 / 128)
    assert (found.n, found.n_higher, found.n_lower) == (20, 6, 1)
    assert found.difference == pytest.approx(0.25)
    assert found.low < 0.25 < found.high


def test_the_interval_of_rates_ends_where_the_score_test_rejects():
    before = [0.0] * 9 + [1.0] * 3 + [1.0] * 32
    after = [1.0] * 9 + [0.0] * 3 + [1.0] * 32
    found = compare_paired(before, after)
    for end in (found.low, found.high):
        # Tango's statistic from its definition: the likeliest rate of falls, searched for.
        def unlikely(fall, end=end):
            rise = fall + end
            return -(9 * math.log(rise) + 3 * math.log(fall) + 32 * math.log(1 - rise - fall))

        bounds = (max(0.0, -end) + 1e-9, (1 - end) / 2 - 1e-9)
        fall = optimize.minimize_scalar(unlikely, bounds=bounds, options={"xatol": 1e-10}).x
        z = (9 - 3 - 44 * end) / math.sqrt(44 * (2 * fall + end - end**2))
        assert abs(z) == pytest.approx(1.959964, abs=1e-4)
    assert found.low < 0 < found.high


def test_swapping_before_and_after_mirrors():
    rng = np.random.default_rng(3)
    before, after = pairs(rng, 80, 0.3, 0.1)
    there, back = compare_paired(before, after), compare_paired(after, before)
    assert there.low == pytest.approx(-back.high)
    assert there.p_value == back.p_value


def test_identical_outcomes_pass_where_the_sample_is_large_enough():
    same = [1.0, 0.0] * 250
    found = non_inferior(same, same, 0.01)
    assert found.holds
    assert found.n_needed == 332
    few = non_inferior(same[:300], same[:300], 0.01)
    assert not few.holds  # a loss of 1 point could hide in 300 examples
    assert few.bound < -0.01


def test_a_wreck_fails():
    assert not non_inferior([1.0] * 500, [0.0] * 250 + [1.0] * 250, 0.01).holds


def test_the_detectable_effect_is_found_four_times_in_five():
    rng = np.random.default_rng(4)
    n, discordant = 100, 0.2
    sizes = [compare_paired(*pairs(rng, n, discordant, 0.0)).detectable for _ in range(200)]
    true = float(np.median(sizes))
    found = [compare_paired(*pairs(rng, n, max(discordant, true), true)) for _ in range(1000)]
    assert 0.72 <= np.mean([one.p_value < 0.05 for one in found]) <= 0.9


def test_p_values_of_no_difference_are_uniform():
    rng = np.random.default_rng(5)
    p_values = []
    for seed in range(300):
        before = rng.normal(0, 1, 30)
        p_values.append(compare_paired(before, before + rng.normal(0, 1, 30), seed=seed).p_value)
    assert stats.kstest(p_values, "uniform").pvalue > 0.001


def test_identical_values_have_no_spread():
    found = compare_paired([0.5, 0.7], [0.5, 0.7])
    assert (found.difference, found.low, found.high, found.p_value) == (0.0, 0.0, 0.0, 1.0)


def test_one_example_shows_nothing():
    found = compare_paired([0.5], [0.7])
    assert (found.low, found.high) == (-math.inf, math.inf)


def test_wilson_by_hand():
    low, high = rate_interval(0, 10)
    assert (low, high) == (0.0, pytest.approx(3.8415 / 13.8415, abs=1e-4))
    assert mean_interval([0.0] * 10) == (low, high)


def test_holm_never_goes_down():
    corrected = holm([0.001, 0.5, 0.02, 0.02])
    assert corrected == [0.004, 0.5, 0.06, 0.06]


def test_unequal_numbers_are_refused():
    with pytest.raises(UsageError, match="got 2 and 1"):
        compare_paired([1.0, 0.0], [1.0])
