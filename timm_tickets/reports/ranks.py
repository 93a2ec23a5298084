"""Which of several tickets can be told apart over their seeds, all compared with one another."""

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from scipy import stats

T = TypeVar("T", bound=Hashable)
ALPHA = 0.05


@dataclass(frozen=True)
class Rank:
    """The places that one of several may have, as far as the seeds tell.

    Attributes:
        best: One more than how many are better beyond noise.
        worst: How many are not worse beyond noise, itself among them.
        of: How many are ranked.
    """

    best: int
    worst: int
    of: int

    def __str__(self) -> str:
        return f"{self.best}" if self.best == self.worst else f"{self.best} to {self.worst}"


def ranks(scores: Mapping[T, Mapping[int, float]], images: int) -> tuple[dict[T, Rank], list[int]]:
    """Ranks by Tukey's range test of all pairs at once: a false difference among all of them in one board of 20.

    Accuracies near 100 % differ by little and low ones by much, so logarithms of the odds of being right are compared,
    whose spread over seeds is alike; what a seed makes harder for all is taken off. With a spread of its own for each
    pair, five seeds would tell next to nothing apart.

    Args:
        scores: Test top-1 in percent by seed, of each that is compared.
        images: How many are in the test set; no errors among them count as half an error.

    Returns:
        Ranks, of those that have at least half the seeds of the one that has most; and the seeds that all these have,
        which are compared. Nothing where fewer than two have two seeds in common.

    >>> found, seeds = ranks({"a": {0: 99, 1: 98, 2: 99}, "b": {0: 98, 1: 99, 2: 98}, "c": {0: 80, 1: 81, 2: 83}}, 1000)
    >>> {name: str(rank) for name, rank in found.items()}, seeds
    ({'a': '1 to 2', 'b': '1 to 2', 'c': '3'}, [0, 1, 2])
    """
    most = max((len(one) for one in scores.values()), default=0)
    names = [name for name, one in scores.items() if len(one) * 2 >= most]
    seeds = sorted(set.intersection(*(set(scores[name]) for name in names))) if names else []
    if len(names) < 2 or len(seeds) < 2:
        return {}, []
    logits = np.array([[logit(scores[name][seed], images) for seed in seeds] for name in names])
    apart, means = told_apart(logits), logits.mean(axis=1)
    out = {}
    for row, name in enumerate(names):
        better, worse = (int(sum(apart[row] & side)) for side in (means > means[row], means < means[row]))
        out[name] = Rank(1 + better, len(names) - worse, len(names))
    return out, seeds


def told_apart(scores: np.ndarray) -> np.ndarray:
    """Whether Tukey's range test tells each pair of rows apart, all pairs at once, seeds being blocks.

    Args:
        scores: A row for each that is compared, a column for each seed.
    """
    count, seeds = scores.shape
    means = scores.mean(axis=1)
    left = scores - means[:, None] - scores.mean(axis=0)[None] + scores.mean()
    free = (count - 1) * (seeds - 1)
    error = math.sqrt(float((left**2).sum()) / free / seeds)
    far = np.abs(means[:, None] - means[None])
    if error < 1e-12:  # no spread, which a test set of so few images has rounded away, gives no interval
        return np.zeros_like(far, dtype=bool)
    return far > error * stats.studentized_range.isf(ALPHA, count, free)


def logit(percent: float, images: int) -> float:
    """Logarithm of the odds of a right answer, half an answer of either kind added."""
    wrong = (100 - percent) / 100 * images
    return math.log((images - wrong + 0.5) / (wrong + 0.5))
