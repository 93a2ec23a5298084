"""What several seeds say of two networks: paired differences, their interval and tests; functions of numbers alone."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

LEVEL = 0.95
_EXACT = 2**14  # sign flips that are all tried, those of 14 seeds; of more seeds so many are drawn


@dataclass(frozen=True)
class Interval:
    """A mean over seeds and its t interval.

    Attributes:
        mean: Of the values.
        low: Lower end of the interval; None where there is none: one value, or values that are all the same, whose
            spread a finite test set has rounded away.
        high: Its upper end.
        count: How many values.
    """

    mean: float
    low: float | None
    high: float | None
    count: int


@dataclass(frozen=True)
class Difference(Interval):
    """The mean of paired differences, and how surprising they are if there is none.

    Attributes:
        p: Of the two-sided paired t test; None where there is no interval.
        permuted: Of the two-sided permutation test, each pair's two scores exchanged or not: with n pairs it is
            2 / 2^n at least.
        not_worse: Of the one-sided t test against a mean of ``-margin``: small where the first is not worse than the
            second by the margin.
    """

    p: float | None
    permuted: float | None
    not_worse: float | None


def interval(values: Sequence[float]) -> Interval:
    """Mean and 95 % t interval.

    >>> interval([1.0, 2.0, 3.0]).low.__round__(3), interval([1.0]).low
    (-0.484, None)
    """
    mean, count = float(np.mean(values)), len(values)
    if not _spread(values):
        return Interval(mean, None, None, count)
    low, high = stats.t.interval(LEVEL, count - 1, loc=mean, scale=stats.sem(values))
    return Interval(mean, float(low), float(high), count)


def percent(scores: Sequence[float]) -> Interval:
    """`interval` of scores in percent, which are within 0 and 100 whatever few seeds say."""
    found = interval(scores)
    if found.low is None or found.high is None:
        return found
    return Interval(found.mean, max(0.0, found.low), min(100.0, found.high), found.count)


def paired(ones: Mapping[int, float | None], others: Mapping[int, float | None]) -> tuple[list[float], list[int]]:
    """Differences of the seeds that both have, and the seeds that one of them lacks.

    Args:
        ones: Score by seed; None or NaN where the run failed or is missing.
        others: What is taken off, of the same seeds.

    >>> paired({0: 3.0, 1: 4.0, 2: None}, {0: 1.0, 2: 5.0, 7: 1.0})
    ([2.0], [1, 2, 7])
    """

    def there(score: float | None) -> bool:
        return score is not None and math.isfinite(score)

    seeds = sorted(ones.keys() | others.keys())
    both = [seed for seed in seeds if there(ones.get(seed)) and there(others.get(seed))]
    return [ones[seed] - others[seed] for seed in both], [seed for seed in seeds if seed not in both]  # pyright: ignore


def difference(differences: Sequence[float], margin: float) -> Difference:
    """What paired differences say.

    Args:
        differences: Of one seed or more, in points.
        margin: What counts as worse, in points.
    """
    found = interval(differences)
    if found.low is None:
        return Difference(found.mean, None, None, found.count, None, None, None)
    test: Any = stats.ttest_1samp
    exchanged = stats.permutation_test(
        (np.asarray(differences),),
        np.mean,
        permutation_type="samples",
        n_resamples=_EXACT,
        rng=np.random.default_rng(0),
    )
    return Difference(
        *(found.mean, found.low, found.high, found.count),
        p=float(test(differences, 0).pvalue),
        permuted=float(exchanged.pvalue),
        not_worse=float(test(differences, -margin, alternative="greater").pvalue),
    )


def holm(values: Sequence[float]) -> list[float]:
    """p values of several tests, corrected so that one false alarm among all is as rare as in one test (Holm 1979).

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    order = sorted(range(len(values)), key=lambda index: values[index])
    out, least = [0.0] * len(values), 0.0
    for place, index in enumerate(order):
        least = max(least, min(1.0, (len(values) - place) * values[index]))
        out[index] = least
    return out


def _spread(values: Sequence[float]) -> bool:
    """Whether values differ by more than rounding: scores such as 98.6 - 97.2 are the same only up to that."""
    return len(values) > 1 and float(np.ptp(values)) > 1e-9 * max(1.0, float(np.abs(values).max()))
