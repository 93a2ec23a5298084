"""Thresholds: the exact number of highest scores, ties kept in memory order. Pure functions.

Two ways lead to the same masks. The CPU may be asked: a sample tells about where the threshold lies, and only the few
scores near it are selected from. A card may not, as the host would wait for all that it has been given to do; nor may a
step that is compiled. There `counting` finds the threshold.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from . import counting
from .counting import Piece

Count: TypeAlias = int | Tensor  # a whole number, or one on the scores' device: 0-d, int64

_SMALL = 1 << 14  # so few scores are selected from as they are
_STRIDE = 61  # of the sample: no multiple of what layers are made of
_SURE = 5  # standard deviations of the sample's rank: one in a million misses


def on_host(tensor: Tensor) -> bool:
    """Whether asking for a value costs nothing: on the CPU, outside of a graph that is being compiled."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def top(scores: Tensor, count: Count) -> Tensor:
    """Mask of the ``count`` highest scores, exactly; among equal scores the earlier in memory order is kept.

    Args:
        scores: Any shape, float; ``-inf`` marks what must not be kept.
        count: How many to keep, 0 to ``scores.numel()``; a whole number or an int64 tensor without dimensions.

    Returns:
        Bool tensor of the scores' shape, on their device, with exactly ``count`` True.

    Raises:
        ValueError: NaN is among the scores, or the count is outside its range; on a card a NaN is not kept, and nobody
            is told here.

    >>> top(torch.tensor([1.0, 3.0, 2.0, 2.0, 2.0]), 3).tolist()
    [False, True, True, True, False]
    """
    return tops([scores], [count])[0]


def together(sizes: Sequence[int], like: Tensor) -> Iterator[slice]:
    """Which neighbours among layers of these sizes are best selected from at once, where this tensor is."""
    return counting.grouped(sizes, 0 if on_host(like) else counting.chunk(like.device))


def tops(scores: Sequence[Tensor], counts: Sequence[Count]) -> list[Tensor]:
    """As `top`, of several tensors, each by itself; on a card small ones are counted together."""
    if not scores:
        return []
    for score, count in zip(scores, counts, strict=True):
        if isinstance(count, int):
            check_count(count, score.numel())
    # Half precision is compared in float32: kthvalue lacks it on some devices.
    scores = [score.detach().to(torch.promote_types(score.dtype, torch.float32)) for score in scores]
    if on_host(scores[0]):
        pairs = zip(scores, counts, strict=True)
        return [joint(lambda score=score: [score], int(count))[0] for score, count in pairs]
    out: list[Tensor] = []
    for part in together([score.numel() for score in scores], scores[0]):
        out += _group(scores[part], counts[part])
    return out


def joint(read: Callable[[], Iterable[Tensor]], count: Count) -> list[Tensor]:
    """As `top`, of all values of several tensors together, the earlier tensor's first among equals.

    The tensors are never held together: selecting from all scores in one row would take 20 bytes a weight, more than
    training does.

    Args:
        read: Gives the tensors, one after the other and the same ones at every call.
        count: 0 to the number of values.

    >>> [mask.tolist() for mask in joint(lambda: [torch.tensor([1.0, 3.0]), torch.tensor([2.0, 2.0])], 2)]
    [[False, True], [True, False]]
    """
    first = next(iter(read()), None)
    if first is None:
        return []
    found = _near(read, int(count)) if on_host(first) else None
    return _counted(read, count, first) if found is None else found


def exchange(mask: Tensor, drop: Tensor, grow: Tensor, count: int, kept: int | None = None) -> Tensor:
    """Drop ``count`` kept weights and grow as many of those then pruned: the step of sparse training that moves masks.

    Args:
        mask: Bool, any shape.
        drop: Same shape; of the kept the lowest are dropped.
        grow: Same shape; of the pruned, the just dropped among them, the highest grow.
        count: How many; fewer where not so many are kept.
        kept: How many are kept, where that is known: not asked for then.

    >>> mask = torch.tensor([True, True, False, False])
    >>> exchange(mask, torch.tensor([1.0, 2.0, 0.0, 0.0]), torch.tensor([0.0, 9.0, 3.0, 4.0]), 1).tolist()
    [False, True, False, True]
    """
    kept = int(mask.count_nonzero()) if kept is None else kept
    moved = min(count, kept)
    left = top(drop.float().masked_fill(~mask, -torch.inf), kept - moved)
    return left | top(grow.float().masked_fill(left, -torch.inf), moved)


def swap(mask: Tensor, score: Tensor, rate: float | Tensor) -> Tensor:
    """Exchange the most inverted pairs of a kept and a pruned weight; the number kept stays.

    Sort the pruned by falling and the kept by rising score; a pair is inverted where the pruned one's is higher. Of c
    such pairs the first ceil(rate * c) change places. Equal scores never do.

    Args:
        mask: Bool, any shape.
        score: Float, same shape.
        rate: Share of the inverted pairs to exchange, in [0, 1]; a tensor: 0-d, on the scores' device.

    Raises:
        ValueError: NaN is among the scores; not on a card, as in `top`.

    >>> mask = torch.tensor([True, True, False, False])
    >>> swap(mask, torch.tensor([0.1, 0.9, 0.5, 0.1]), 1.0).tolist()
    [False, True, True, False]
    """
    return swaps([mask], [score], rate)[0]


def swaps(masks: Sequence[Tensor], scores: Sequence[Tensor], rate: float | Tensor) -> list[Tensor]:
    """As `swap`, of several layers, each by itself; on a card small ones are counted together."""
    if not masks:
        return []
    if on_host(scores[0]):
        return [_swapped(mask, score.detach(), float(rate)) for mask, score in zip(masks, scores, strict=True)]
    out: list[Tensor] = []
    for part in together([score.numel() for score in scores], scores[0]):
        out += counting.swapped(masks[part], scores[part], rate)
    return out


def _near(read: Callable[[], Iterable[Tensor]], count: int) -> list[Tensor] | None:
    """What is above the threshold's neighbourhood, and of that the best; None where the sample has missed it."""
    low, high = _bounds(read, count)
    masks: list[NDArray[np.bool_]] = []
    near: list[NDArray[np.intp]] = []
    values: list[NDArray[Any]] = []
    shapes: list[torch.Size] = []
    for score in read():
        flat = _array(score)
        above = flat > high
        # Where the neighbourhood has no lower end, what masks have ruled out (-inf) would be most of it.
        reached = flat > low if low == -math.inf else flat >= low
        at = np.flatnonzero(reached ^ above)
        masks.append(above)
        near.append(at)
        values.append(flat[at])
        shapes.append(score.shape)
    need = count - sum(int(np.count_nonzero(mask)) for mask in masks)
    if not 0 <= need <= sum(map(len, values)):
        return None
    best = np.split(_best(np.concatenate(values), need), np.cumsum([len(one) for one in values])[:-1])
    for mask, at, chosen in zip(masks, near, best, strict=True):
        mask[at[chosen]] = True
    return [torch.from_numpy(mask).view(shape) for mask, shape in zip(masks, shapes, strict=True)]


def _array(tensor: Tensor) -> NDArray[Any]:
    """A tensor of the CPU in a row, as numpy has it: which compares and finds indices in less time."""
    return tensor.detach().flatten().numpy()


def _bounds(read: Callable[[], Iterable[Tensor]], count: int) -> tuple[float, float]:
    """Values between which the threshold almost surely lies."""
    sample, total = [], 0
    for score in read():
        check_numbers(score)
        flat = _array(score)
        sample.append(flat[::_STRIDE].copy())
        total += len(flat)
    if total <= _SMALL:
        return -math.inf, math.inf
    values = np.concatenate(sample)
    share = count / total
    rank, spread = share * len(values), _SURE * math.sqrt(len(values) * share * (1 - share)) + _SURE
    low, high = int(rank + spread) + 1, int(rank - spread)
    return (
        float(_highest(values, low)) if low < len(values) else -math.inf,
        float(_highest(values, high)) if high >= 1 else math.inf,
    )


def _highest(values: NDArray[Any], rank: int) -> Any:
    """The value that so many are as high as, 1 for the highest."""
    # numpy's selection is a little faster, but 20 times slower where most are equal, as jackpot's scores begin.
    return torch.from_numpy(values).kthvalue(len(values) - rank + 1).values.item()


def _best(values: NDArray[Any], count: int) -> NDArray[np.bool_]:
    """Mask of the ``count`` highest of some values in a row, by selecting from all of them."""
    if count == 0:
        return np.zeros(len(values), dtype=np.bool_)
    threshold = _highest(values, count)
    mask = values > threshold
    mask[np.flatnonzero(values == threshold)[: count - int(np.count_nonzero(mask))]] = True
    return mask


def _swapped(mask: Tensor, score: Tensor, rate: float) -> Tensor:
    """As `swap`: those above the threshold of as many as are kept are to be kept, so only what is near it can move."""
    flat, values = _array(mask).copy(), _array(score)
    low, high = _bounds(lambda: [score], kept := int(np.count_nonzero(flat)))
    above, reached = values > high, values >= low
    if np.count_nonzero(above) <= kept <= np.count_nonzero(reached):
        at = np.flatnonzero((above ^ flat) | (reached ^ flat))
    else:  # the sample has missed the threshold
        at = np.arange(len(flat))
    near, was = values[at], flat[at]
    if 0 < (kept := int(np.count_nonzero(was))) < len(at):
        threshold = _highest(near, kept)
        may = np.where(was, near <= threshold, near >= threshold)
        at, near, was = at[may], near[may], was[may]
    pruned, held = np.flatnonzero(~was), np.flatnonzero(was)
    pruned = pruned[np.argsort(-near[pruned], kind="stable")]
    held = held[np.argsort(near[held], kind="stable")]
    pairs = min(len(pruned), len(held))
    count = math.ceil(rate * int(np.count_nonzero(near[pruned[:pairs]] > near[held[:pairs]])))
    flat[at[pruned[:count]]] = True
    flat[at[held[:count]]] = False
    return torch.from_numpy(flat).view(mask.shape)


def _counted(read: Callable[[], Iterable[Tensor]], count: Count, first: Tensor) -> list[Tensor]:
    """As `joint`, on a card."""
    counts, dtype = _counts([count], first.device), first.dtype
    thresholds, ties = counting.lowest_kept(lambda: (Piece(row) for row, _ in _rows(read)), counts, dtype)
    threshold, left = thresholds[0], ties[0]
    out: list[Tensor] = []
    for row, shapes in _rows(read):
        mask, left = counting.kept(row, threshold, left)
        parts = mask.split([shape.numel() for shape in shapes])
        out += [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
    return out


def _rows(read: Callable[[], Iterable[Tensor]]) -> Iterable[tuple[Tensor, list[torch.Size]]]:
    """The values of several tensors in rows, small ones together, and of what shapes they are."""
    held: list[Tensor] = []
    for score in read():
        if held and sum(one.numel() for one in held) + score.numel() > counting.chunk(score.device):
            yield counting.row(held), [one.shape for one in held]
            held = []
        held.append(score.detach())
    yield counting.row(held), [one.shape for one in held]


def _group(scores: Sequence[Tensor], counts: Sequence[Count]) -> list[Tensor]:
    """As `tops`, on a card, all layers at once."""
    sizes = [score.numel() for score in scores]
    values = counting.row([score.detach() for score in scores])
    piece = Piece(values, counting.segments(sizes, values.device))
    found = counting.selected(piece, sizes, _counts(counts, values.device))
    return [part.view(score.shape) for part, score in zip(found.split(sizes), scores, strict=True)]


def _counts(counts: Sequence[Count], device: torch.device) -> Tensor:
    # Filled in by the device: a tensor made of a list would be copied to it.
    found = [torch.full((), one, dtype=torch.int64, device=device) if isinstance(one, int) else one for one in counts]
    return torch.stack([one.long() for one in found])


def check_count(count: int, size: int) -> None:
    """Refuse a number of scores to keep that is not 0 to their own.

    Raises:
        ValueError: It is not.
    """
    if not 0 <= count <= size:
        raise ValueError(f"count: {count} cannot be kept of {size} scores")


def check_numbers(scores: Tensor) -> None:
    """Refuse NaN among scores: every comparison would place it somewhere, and keep it or not without a word.

    Raises:
        ValueError: There is one.
    """
    if math.isnan(float(scores.sum())) and bool(scores.isnan().any()):  # a sum is soon made; infinities make NaN too
        raise ValueError("scores: NaN among them; the weights they come from are probably NaN too")
