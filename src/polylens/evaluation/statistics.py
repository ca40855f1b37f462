"""Before and after on the same examples: intervals, tests, and what a sample can show at all.

Outcomes that are 0 or 1 are treated exactly: McNemar's test, and Tango's score interval of the
difference (Statistics in Medicine 17:891, 1998). Other values are bootstrapped: the studentised
interval, and a test that flips the signs of the differences. `non_inferior` is what the gate asks.

Coverage and error rates are measured in tests/evaluation/test_statistics.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, stats

from polylens.errors import UsageError

LEVEL = 0.95

# The bootstrap's error of a 95 % bound is then about a fiftieth of its width.
_N_RESAMPLES = 2000

# Below this, resamples without any spread are too many for a bound to exist.
_N_BOOTSTRAP = 5

# Chance that an effect of the size called detectable is found, as power analyses usually have it.
_POWER = 0.8

# Tango's one-sided test errs up to 6.8 % at a level of 5 % where discordant pairs are few; with a
# continuity correction of a third of a pair it stays under 5 % (4.9 % over 5 margins, 12 sizes).
_CONTINUITY = 1 / 3

Values = NDArray[np.float64]


@dataclass(frozen=True)
class PairedDifference:
    """What changed between two answers to the same examples.

    Attributes:
        n: examples.
        before: mean before.
        after: mean after.
        difference: after - before.
        low: lower end of the 95 % interval of the difference.
        high: upper end.
        p_value: of no difference, two-sided: exact McNemar, or sign flips.
        n_higher: examples whose value rose.
        n_lower: examples whose value fell.
        detectable: the smallest true difference that such a sample finds with a chance of 80 %.
    """

    n: int
    before: float
    after: float
    difference: float
    low: float
    high: float
    p_value: float
    n_higher: int
    n_lower: int
    detectable: float


@dataclass(frozen=True)
class NonInferiority:
    """Whether a loss beyond a margin can be ruled out.

    Attributes:
        n: examples.
        difference: after - before, signed so that more is better.
        bound: a true difference below this is ruled out at the level asked for.
        margin: largest loss that is tolerated, positive.
        holds: bound >= -margin.
        n_needed: examples that would be enough if no outcome changed.
    """

    n: int
    difference: float
    bound: float
    margin: float
    holds: bool
    n_needed: int


def rate_interval(n_passed: int, n: int, level: float = LEVEL) -> tuple[float, float]:
    """Return Wilson's interval of a rate.

    Example:
        >>> low, high = rate_interval(8, 10)
        >>> round(low, 3), round(high, 3)
        (0.49, 0.943)
    """
    interval = stats.binomtest(n_passed, n).proportion_ci(level, method="wilson")
    return float(interval.low), float(interval.high)


def mean_interval(
    values: Sequence[float], level: float = LEVEL, seed: int = 0
) -> tuple[float, float]:
    """Return the interval of a mean: Wilson's where all values are 0 or 1, else bootstrapped.

    Args:
        values: at least one, of independent examples.
        level: of confidence.
        seed: of the bootstrap.
    """
    array = np.asarray(values, dtype=np.float64)
    if _is_binary(array):
        return rate_interval(int(array.sum()), len(array), level)
    return _studentised(array, ((1 - level) / 2, (1 + level) / 2), seed)


def compare_paired(
    before: Sequence[float], after: Sequence[float], *, level: float = LEVEL, seed: int = 0
) -> PairedDifference:
    """Compare values of the same examples before and after.

    Args:
        before: one value an example; 0 and 1 alone are treated as right and wrong.
        after: in the same order.
        level: of confidence.
        seed: of the bootstrap and the sign flips.

    Raises:
        UsageError: the numbers of values differ, or there are none.
    """
    old, new = np.asarray(before, dtype=np.float64), np.asarray(after, dtype=np.float64)
    if len(old) != len(new) or not len(old):
        raise UsageError(
            "before and after must hold one value for each of the same examples, got "
            f"{len(old)} and {len(new)}"
        )
    change = new - old
    n, n_higher, n_lower = len(change), int((change > 0).sum()), int((change < 0).sum())
    if _is_binary(old) and _is_binary(new):
        low, high = _tango_interval(n_higher, n_lower, n, level)
        discordant = n_higher + n_lower
        p_value = stats.binomtest(n_higher, discordant).pvalue if discordant else 1.0
        detectable = _detectable_rate(discordant / n, n, level)
    else:
        low, high = _studentised(change, ((1 - level) / 2, (1 + level) / 2), seed)
        p_value = _sign_flips(change, seed)
        z = stats.norm.ppf((1 + level) / 2) + stats.norm.ppf(_POWER)
        detectable = float(z * change.std(ddof=1) / n**0.5) if n > 1 else math.inf
    return PairedDifference(
        n=n,
        before=float(old.mean()),
        after=float(new.mean()),
        difference=float(change.mean()),
        low=low,
        high=high,
        p_value=float(p_value),
        n_higher=n_higher,
        n_lower=n_lower,
        detectable=detectable,
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct p-values for their number, by Holm's method: the chance of any false finding.

    Example:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]
    """
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    corrected = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected


def non_inferior(
    before: Sequence[float],
    after: Sequence[float],
    margin: float,
    *,
    higher_is_better: bool = True,
    level: float = LEVEL,
    seed: int = 0,
) -> NonInferiority:
    """Test whether a loss beyond a margin can be ruled out, one-sided.

    Args:
        before: one value an example.
        after: in the same order.
        margin: largest mean loss that is tolerated, in units of the values, above 0.
        higher_is_better: whether more is better.
        level: 1 - the chance that a loss of the margin or more passes.
        seed: of the bootstrap.
    """
    sign = 1.0 if higher_is_better else -1.0
    old, new = np.asarray(before, dtype=np.float64), np.asarray(after, dtype=np.float64)
    change = sign * (new - old)
    n = len(change)
    if _is_binary(old) and _is_binary(new):
        z = float(stats.norm.ppf(level))
        n_better, n_worse = int((change > 0).sum()), int((change < 0).sum())
        bound = _root(
            lambda d: _tango_z(n_better, n_worse, n, d, _CONTINUITY) - z, -1.0, change.mean()
        )
        holds = _tango_z(n_better, n_worse, n, -margin, _CONTINUITY) >= z
        needed = _n_needed(margin, z)
    else:
        bound, _ = _studentised(change, (1 - level, level), seed)
        holds, needed = bound >= -margin, 2
    return NonInferiority(n, float(change.mean()), bound, margin, bool(holds), needed)


def _is_binary(values: Values) -> bool:
    return bool(np.isin(values, (0.0, 1.0)).all())


def _tango_z(n_higher: int, n_lower: int, n: int, difference: float, continuity: float) -> float:
    """Score statistic of a true difference: 0 at the estimate, falling with the difference."""
    b = -n_higher - n_lower + (2 * n - n_higher + n_lower) * difference
    c = -n_lower * difference * (1 - difference)
    # The rate of falls that is likeliest, given the difference.
    falls = (math.sqrt(max(b * b - 8 * n * c, 0.0)) - b) / (4 * n)
    variance = n * (2 * falls + difference * (1 - difference))
    distance = n_higher - n_lower - n * difference
    distance = math.copysign(max(abs(distance) - continuity, 0.0), distance)
    if variance <= 0:
        return math.copysign(math.inf, distance) if distance else 0.0
    return distance / math.sqrt(variance)


def _tango_interval(n_higher: int, n_lower: int, n: int, level: float) -> tuple[float, float]:
    z = float(stats.norm.ppf((1 + level) / 2))
    estimate = (n_higher - n_lower) / n
    return (
        _root(lambda d: _tango_z(n_higher, n_lower, n, d, 0.0) - z, -1.0, estimate),
        _root(lambda d: _tango_z(n_higher, n_lower, n, d, 0.0) + z, estimate, 1.0),
    )


def _root(function: Callable[[float], float], low: float, high: float) -> float:
    """Where a falling function crosses 0; the end that is nearer where it does not."""
    if function(low) <= 0:
        return float(low)
    if function(high) >= 0:
        return float(high)
    return float(optimize.brentq(function, low, high, xtol=1e-9))


def _n_needed(margin: float, z: float) -> int:
    """Examples whose outcomes, all unchanged, rule out a loss of the margin."""
    n = 1
    while _tango_z(0, 0, n, -margin, _CONTINUITY) < z:
        n += max(1, n // 100)
    while n > 1 and _tango_z(0, 0, n - 1, -margin, _CONTINUITY) >= z:
        n -= 1
    return n


def _detectable_rate(discordant: float, n: int, level: float) -> float:
    """Difference of rates that McNemar's test finds with a chance of 80 %, at most 1."""
    z_level, z_power = stats.norm.ppf((1 + level) / 2), stats.norm.ppf(_POWER)

    def excess(difference: float) -> float:
        spread = max(discordant, difference)  # as many pairs differ, or as many as must
        power = z_power * math.sqrt(n * max(spread - difference**2, 0.0))
        return float(z_level * math.sqrt(n * spread) + power + 1 - n * difference)

    return _root(excess, 0.0, 1.0)


def _studentised(values: Values, quantiles: tuple[float, float], seed: int) -> tuple[float, float]:
    """Bounds of a mean by the studentised bootstrap (Efron and Tibshirani 1993, chapter 12).

    Fewer than five values have Student's t instead, and a single one has no bounds.
    """
    n = len(values)
    mean = float(values.mean())
    if n < 2:
        return -math.inf, math.inf
    error = float(values.std(ddof=1)) / n**0.5
    if error == 0.0:
        return mean, mean
    if n < _N_BOOTSTRAP:
        low, high = stats.t.ppf(quantiles, n - 1)
        return mean + float(low) * error, mean + float(high) * error
    drawn = np.random.default_rng(seed).integers(0, n, (_N_RESAMPLES, n))
    resampled = values[drawn]  # (n_resamples, n)
    errors = resampled.std(axis=1, ddof=1) / n**0.5
    distance = resampled.mean(axis=1) - mean
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.where(distance == 0, 0.0, distance / errors)
    first, last = np.quantile(t, quantiles, method="inverted_cdf")
    return mean - float(last) * error, mean - float(first) * error


def _sign_flips(values: Values, seed: int) -> float:
    """Chance of a mean as far from 0, if each difference were as likely to have the other sign."""
    changed = values[values != 0]
    if not len(changed):
        return 1.0
    signs = np.random.default_rng(seed).choice((-1.0, 1.0), (5 * _N_RESAMPLES, len(changed)))
    extreme = np.abs(signs @ changed) >= abs(changed.sum()) * (1 - 1e-12)
    return float((1 + extreme.sum()) / (1 + len(signs)))
