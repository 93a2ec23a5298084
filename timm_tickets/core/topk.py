"""Thresholds: the exact number of highest scores, ties kept in memory order. Pure functions."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

_CHUNK = 1 << 20  # scores that are counted at once
_DIGITS = 1 << 16


def top(scores: Tensor, count: int) -> Tensor:
    """Mask of the ``count`` highest scores, exactly; among equal scores the earlier in memory order is kept.

    Args:
        scores: Any shape, float; ``-inf`` marks what must not be kept.
        count: How many to keep, 0 to ``scores.numel()``.

    Returns:
        Bool tensor of the scores' shape, on their device, with exactly ``count`` True.

    >>> top(torch.tensor([1.0, 3.0, 2.0, 2.0, 2.0]), 3).tolist()
    [False, True, True, True, False]
    """
    flat = scores.detach().flatten()
    check_count(count, flat.numel())
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    _check_numbers(flat)
    threshold = flat.kthvalue(flat.numel() - count + 1).values
    mask = flat > threshold
    return with_ties(mask, flat == threshold, count - int(mask.sum())).view(scores.shape)


def lowest_kept(
    read: Callable[[], Iterable[Tensor]], count: int, dtype: torch.dtype = torch.float32
) -> tuple[float, int]:
    """The lowest of the ``count`` highest values of several tensors together, and how many of those are equal to it.

    The tensors are never held together: every reading counts 16 bits of the values that begin as the one looked for.
    Selecting from all scores in one row would take 20 bytes a weight, more than training does.

    Args:
        read: Gives the tensors, one after the other and the same ones at every call.
        count: 1 to the number of values.
        dtype: What they are compared in: float32 or float64.

    >>> lowest_kept(lambda: [torch.tensor([1.0, 3.0]), torch.tensor([2.0, 2.0, 2.0])], 3)
    (2.0, 2)
    """
    left, first = count, -_DIGITS // 2
    for shift in range(8 * dtype.itemsize - 16, -1, -16):
        found = torch.zeros(_DIGITS, dtype=torch.int64)
        for values in read():
            _check_numbers(values)
            for chunk in values.detach().flatten().split(_CHUNK):
                digits = (_ordered(chunk.to(dtype)) >> shift) - first
                found += digits[(digits >= 0) & (digits < _DIGITS)].bincount(minlength=_DIGITS).cpu()
        reached = found.flip(0).cumsum(0)
        above = int((reached < left).sum())
        left -= int(reached[above - 1]) if above else 0
        first = (first + _DIGITS - 1 - above) * (_DIGITS if shift else 1)
    bits = torch.tensor([first], dtype=torch.int32 if dtype == torch.float32 else torch.int64)
    return float(_flipped(bits).view(dtype)), left


def _ordered(values: Tensor) -> Tensor:
    """Integers of the same size in the order of the values, the same one for both zeros."""
    return _flipped((values + 0).view(torch.int32 if values.dtype == torch.float32 else torch.int64))


def _flipped(bits: Tensor) -> Tensor:
    """The bits of floats as integers of their order, and back: below zero, a larger magnitude is less."""
    return bits ^ ((bits >> (8 * bits.dtype.itemsize - 1)) & torch.iinfo(bits.dtype).max)


def check_count(count: int, size: int) -> None:
    """Refuse a number of scores to keep that is not 0 to their own.

    Raises:
        ValueError: It is not.
    """
    if not 0 <= count <= size:
        raise ValueError(f"count: {count} cannot be kept of {size} scores")


def _check_numbers(scores: Tensor) -> None:
    # Every comparison would place NaN somewhere, kthvalue above all numbers, and so keep it without a word.
    if scores.isnan().any():
        raise ValueError("scores: NaN among them; the weights they come from are probably NaN too")


def with_ties(above: Tensor, equal: Tensor, count: int) -> Tensor:
    """What is above a threshold, and the first so many of those that are equal to it, in memory order."""
    above.view(-1)[equal.flatten().nonzero().flatten()[:count]] = True
    return above
