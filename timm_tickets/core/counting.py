"""Thresholds on a card, which is not asked anything: scores are counted by their bits. Pure functions.

Every reading counts 11 bits of the scores that begin as the one looked for: three readings of float32, six of float64.
All shapes are known beforehand, counts are whole numbers, exact in any order, and none of it is read by the host, so
that a captured step can hold it. Scores are read in pieces (`Piece`), several small layers together.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

CHUNK = 1 << 19  # scores that are counted at once: 35 MB beside them
_BITS = 11
_COLUMNS = 64  # counters of a digit: with one alone, all that have the digit would wait for one another


class Piece(NamedTuple):
    """Scores in a row.

    Attributes:
        values: Float, one dimension.
        segment: Of each, the number of the selection that it belongs to, int64; None where there is only one.
    """

    values: Tensor
    segment: Tensor | None = None


Read = Callable[[], Iterable[Piece]]


def chunk(device: torch.device) -> int:
    """How many scores are counted at once: more on a card, where every operation is a kernel and 280 MB are at hand."""
    return CHUNK * 8 if device.type == "cuda" else CHUNK


def lowest_kept(read: Read, counts: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The lowest of the highest values of every selection, and how many of those kept are equal to it.

    Args:
        read: Gives the pieces, the same ones at every call.
        counts: How many each selection keeps, int64, (selections,); at most as many as it has.
        dtype: What values are compared in: float32 or float64.

    Returns:
        Thresholds in that dtype, and int64 numbers of ties, each (selections,). Where none is kept, no value is above
        the threshold and no tie is kept.
    """
    left, width = counts, _BITS
    shift = 8 * dtype.itemsize - width
    first = torch.full_like(counts, -(1 << (width - 1)), dtype=_integer(dtype))  # the least that has the sought bits
    while True:
        size = 1 << width
        reached = counted(read, first, shift, size, dtype).flip(1).cumsum(1)
        above = (reached < left[:, None]).sum(1, keepdim=True)
        passed = reached.gather(1, (above - 1).clamp(min=0)).where(above > 0, 0)
        left, first = left - passed[:, 0], first + (size - 1 - above[:, 0]).to(first.dtype)
        if not shift:
            break
        width = min(_BITS, shift)
        shift, first = shift - width, first << width
    return flipped(first).view(dtype), left


def counted(read: Read, first: Tensor, shift: int, size: int, dtype: torch.dtype) -> Tensor:
    """Of every selection how many values have each digit, int64, (selections, size)."""
    rows = len(first) * size
    out = torch.zeros(rows + 1, _COLUMNS, dtype=torch.int32, device=first.device)  # the last is of what is not counted
    one = torch.ones((), dtype=torch.int32, device=first.device)
    for values, segment in read():
        # What has segments is no longer than a chunk already.
        for part in values.split(chunk(values.device)) if segment is None else (values,):
            digits = (ordered(part.to(dtype)) >> shift) - (first if segment is None else first[segment])
            row = digits.long() if segment is None else digits + segment * size
            row = row.where((digits >= 0) & (digits < size), rows)
            whole = len(row) // _COLUMNS * _COLUMNS
            for block in (row[:whole].view(-1, _COLUMNS), row[None, whole:]):
                out[:, : block.shape[1]].scatter_add_(0, block, one.expand(block.shape))
    return out[:-1].sum(1).view(-1, size)


def kept(values: Tensor, threshold: Tensor, ties: Tensor) -> tuple[Tensor, Tensor]:
    """Of scores in a row those above a threshold and the first so many that are equal to it; and the ties left then.

    Args:
        values: Float, one dimension.
        threshold: 0-d, of their dtype.
        ties: 0-d, int64.
    """
    out: list[Tensor] = []
    for part in values.split(chunk(values.device)):
        equal = part == threshold
        rank = equal.cumsum(0)
        out.append((part > threshold) | (equal & (rank <= ties)))
        ties = ties - rank[-1:].sum().minimum(ties)
    return torch.cat(out), ties


def selected(piece: Piece, sizes: Sequence[int], counts: Tensor) -> Tensor:
    """Mask of the highest so many of every selection in a row.

    Args:
        piece: All of them, one after the other.
        sizes: Of the selections.
        counts: How many to keep of each, int64, (selections,).
    """
    values, segment = piece
    thresholds, ties = lowest_kept(lambda: [piece], counts, values.dtype)
    if segment is None:
        return kept(values, thresholds[0], ties[0])[0]
    threshold = thresholds[segment]
    equal = values == threshold
    rank = equal.cumsum(0)
    before = torch.cat([rank.new_zeros(1), ends(rank, sizes)[:-1]])  # ties that earlier selections have
    return (values > threshold) | (equal & (rank <= (ties + before)[segment]))


def swapped(masks: Sequence[Tensor], scores: Sequence[Tensor], rate: float | Tensor) -> list[Tensor]:
    """As `topk.swap`, of several layers at once.

    As many as are kept, the highest of all, those kept now first among equals: the pruned among them are the pruned
    ones of the inverted pairs.
    """
    sizes = [mask.numel() for mask in masks]
    values, now = row([score.detach() for score in scores]), row(masks)
    segment = segments(sizes, values.device)
    thresholds, ties = lowest_kept(lambda: [Piece(values, segment)], sums(now, sizes), values.dtype)
    threshold = thresholds[0] if segment is None else thresholds[segment]
    inverted = sums((values > threshold) & ~now, sizes)
    inverted += (ties - sums((values == threshold) & now, sizes)).clamp(min=0)
    count = (inverted.to(wide(inverted.device)) * rate).ceil().long()
    grown = selected(Piece(values.masked_fill(now, -torch.inf), segment), sizes, count)
    dropped = selected(Piece((-values).masked_fill(~now, -torch.inf), segment), sizes, count)
    found = ((now | grown) & ~dropped).split(sizes)
    return [part.view(mask.shape) for part, mask in zip(found, masks, strict=True)]


def row(tensors: Sequence[Tensor]) -> Tensor:
    """The values of tensors, one after the other."""
    return tensors[0].flatten() if len(tensors) == 1 else torch.cat([one.flatten() for one in tensors])


def ends(running: Tensor, sizes: Sequence[int]) -> Tensor:
    """Where runs of these sizes end, the values of a running sum: without an index that would come from the host."""
    at, found = 0, []
    for size in sizes:
        at += size
        found.append(running[at - 1] if at else running.new_zeros(()))
    return torch.stack(found)


def sums(values: Tensor, sizes: Sequence[int]) -> Tensor:
    """Sums of the runs of these sizes, int64."""
    if len(sizes) == 1:
        return values.sum()[None]
    found = ends(values.cumsum(0), sizes)
    return found - torch.cat([found.new_zeros(1), found[:-1]])


def segments(sizes: Sequence[int], device: torch.device) -> Tensor | None:
    """Of every value of several selections in a row its number; None of one alone."""
    if len(sizes) == 1:
        return None
    numbers = torch.arange(len(sizes), device=device)
    return torch.cat([number.expand(size) for number, size in zip(numbers.unbind(), sizes, strict=True)])


def grouped(sizes: Sequence[int], most: int) -> Iterator[slice]:
    """Neighbours that are read together: as many as have no more values than this, at least one."""
    start, held = 0, 0
    for number, size in enumerate(sizes):
        if number > start and held + size > most:
            yield slice(start, number)
            start, held = number, 0
        held += size
    if sizes:
        yield slice(start, len(sizes))


def ordered(values: Tensor) -> Tensor:
    """Integers of the same size in the order of the values, the same one for both zeros."""
    return flipped((values + 0).view(_integer(values.dtype)))


def flipped(bits: Tensor) -> Tensor:
    """The bits of floats as integers of their order, and back: below zero, a larger magnitude is less."""
    return bits ^ ((bits >> (8 * bits.dtype.itemsize - 1)) & torch.iinfo(bits.dtype).max)


def wide(device: torch.device) -> torch.dtype:
    """Double precision, where a device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def _integer(dtype: torch.dtype) -> torch.dtype:
    return torch.int32 if dtype == torch.float32 else torch.int64
