"""Masks: which weights may be pruned, which are kept, and exact counts. Pure functions on plain dictionaries.

A mask is ``dict[str, BoolTensor]``: a timm parameter name, and for each weight whether it is kept (True) or pruned.
Scores have the same keys and shapes, floats, higher meaning keep.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from functools import reduce
from typing import Literal

import torch
from torch import Tensor

from .errors import SettingError, shown
from .lazy import Lazy
from .private import changes_of
from .seeds import seed_from
from .topk import exchange, joint, swap, swaps, together, top, tops  # noqa: F401 - documented as `masks.exchange`, `masks.swap`

Masks = dict[str, Tensor]
Scores = dict[str, Tensor]
Scope = Literal["global", "layerwise"]
Distribution = Literal["uniform", "erk", "epl"]

_SHUFFLE = 0x5F1E  # a stream of its own: a model may have been initialised under the same seed


class Counted(dict[str, Tensor]):
    """Masks that say how much they keep, so that their device need not be asked; until one of them is changed.

    Args:
        masks: They.
        counts: How many weights each layer keeps, where that is known.
        kept: How many all of them keep, where that is known.
    """

    def __init__(self, masks: Mapping[str, Tensor], counts: Mapping[str, int] | None = None, kept: int | None = None):
        super().__init__(masks)
        self._counts = None if counts is None else dict(counts)
        self._kept = sum(counts.values()) if counts is not None else kept
        self._then = self._now()

    @property
    def counts(self) -> dict[str, int] | None:
        """How many weights each layer keeps; None where nobody knows."""
        return self._counts if self._same() else None

    @property
    def kept(self) -> int | None:
        """How many all of them keep; None where nobody knows."""
        return self._kept if self._same() else None

    def _same(self) -> bool:
        now = self._now()
        return len(now) == len(self._then) and all(
            a is b and one == other for (a, one), (b, other) in zip(now, self._then, strict=True)
        )

    def _now(self) -> list[tuple[Tensor, int]]:
        if torch.compiler.is_compiling():  # within a step nobody changes what was just cut
            return []
        return [(mask, 0 if mask.is_inference() else changes_of(mask)) for mask in self.values()]


class AllKept(Lazy):
    """Masks that keep every weight of tensors of the same shapes, each made when it is read."""

    def __init__(self, like: Mapping[str, Tensor]):
        self.counts = {name: one.numel() for name, one in like.items()}
        super().__init__(like, lambda name: torch.ones(like[name].shape, dtype=torch.bool, device=like[name].device))


def full_masks(weights: Mapping[str, Tensor]) -> Masks:
    """Masks that keep every weight, on the CPU."""
    return {name: torch.ones(weight.shape, dtype=torch.bool) for name, weight in weights.items()}


def all_kept(like: Mapping[str, Tensor]) -> AllKept:
    """As `full_masks`, of tensors of the same shapes and on their devices, but each is made when it is read."""
    return AllKept(like)


def total(masks: Mapping[str, Tensor]) -> int:
    """Number of weights under the masks, kept or pruned."""
    return sum(masks.counts.values() if isinstance(masks, AllKept) else (mask.numel() for mask in masks.values()))


def kept(masks: Mapping[str, Tensor]) -> int:
    """Number of weights kept."""
    known = getattr(masks, "kept", None)
    return sum(layer_counts(masks).values()) if known is None else known


def layer_counts(masks: Mapping[str, Tensor]) -> dict[str, int]:
    """Number of weights that each layer keeps."""
    known = getattr(masks, "counts", None)
    return {name: int(mask.count_nonzero()) for name, mask in masks.items()} if known is None else known


def sparsity(masks: Mapping[str, Tensor]) -> float:
    """Fraction of the weights under the masks that is pruned, in [0, 1].

    >>> sparsity({"fc.weight": torch.tensor([True, False, False, False])})
    0.75
    """
    return 1 - kept(masks) / total(masks)


def layer_sparsities(masks: Mapping[str, Tensor]) -> dict[str, float]:
    """Sparsity of each layer, in [0, 1]."""
    return {name: 1 - count / masks[name].numel() for name, count in layer_counts(masks).items()}


def keep_count(count: int, sparsity: float) -> int:
    """How many of ``count`` weights an asked sparsity keeps: ``count - round(count * sparsity)``.

    Raises:
        SettingError: The sparsity is outside [0, 1), or would round to keeping nothing.

    >>> keep_count(1000, 0.95)
    50
    """
    if not 0 <= sparsity < 1:
        raise SettingError(f"sparsity: {sparsity} is not valid; it is the pruned fraction, at least 0 and below 1")
    keep = count - round(count * sparsity)
    if keep < 1:
        raise SettingError(
            f"sparsity: {sparsity} would prune all of the {count} prunable weights; "
            f"the most that leaves one is {1 - 1 / count:.6g}"
        )
    return keep


def fill(count: int, shares: Mapping[str, int], caps: Mapping[str, int]) -> dict[str, int]:
    """Split ``count`` in proportion to shares, no part above its cap: what a full part cannot take the others share.

    Exact in sum: fractions go by largest remainder, ties to the first.

    >>> fill(5, {"a": 3, "b": 3, "c": 6}, {"a": 3, "b": 3, "c": 6})
    {'a': 1, 'b': 1, 'c': 3}
    >>> fill(9, {"a": 1, "b": 1, "c": 1}, {"a": 1, "b": 20, "c": 20})
    {'a': 1, 'b': 4, 'c': 4}
    """
    if not 0 <= count <= sum(caps.values()):
        raise ValueError(f"count: {count} cannot be split over parts that hold {sum(caps.values())}")
    out: dict[str, int] = {}
    open_parts = dict(shares)
    while True:
        whole = sum(open_parts.values())
        full = [name for name, share in open_parts.items() if count * share >= caps[name] * whole]
        if not full:
            break
        for name in full:
            out[name] = caps[name]
            del open_parts[name]
        count -= sum(caps[name] for name in full)
    parts = {name: divmod(count * share, whole) for name, share in open_parts.items()}
    rest = count - sum(quotient for quotient, _ in parts.values())
    first = sorted(parts, key=lambda name: -parts[name][1])[:rest]
    out |= {name: quotient + (name in first) for name, (quotient, _) in parts.items()}
    return {name: out[name] for name in shares}


def budgets(
    shapes: Mapping[str, Sequence[int]],
    count: int,
    distribution: Distribution,
    caps: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """How many of ``count`` weights each layer gets.

    Args:
        shapes: Shape of each layer's weight.
        count: How many there are to give.
        distribution: ``uniform``: the same density in every layer; ``erk``: density in proportion to the sum of a
            layer's dimensions over their product, at most 1 (Evci et al. 2020, 1911.11134, section 3); ``epl``: the
            same number in every layer, at most all (Otsuka et al. 2024, 2402.14029).
        caps: The most a layer can take, where it is not all of its weights.
    """
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    shares = {"uniform": sizes, "erk": {n: sum(shape) for n, shape in shapes.items()}, "epl": dict.fromkeys(shapes, 1)}
    return fill(count, shares[distribution], caps or sizes)


def cut(
    masks: Mapping[str, Tensor],
    scores: Mapping[str, Tensor],
    keep: int,
    scope: Scope = "global",
    distribution: Distribution = "uniform",
    spare: Collection[str] = (),
    pairs: Collection[str] = (),
) -> Masks:
    """Of what masks keep, the weights with the highest scores.

    Args:
        masks: Bool, the masks to start from; what they prune stays pruned.
        scores: Float, same keys and shapes, on any device.
        keep: How many to keep, over all layers together.
        scope: ``global`` compares all layers with one another; ``layerwise`` prunes each by itself.
        distribution: Layerwise, ``uniform`` prunes the same fraction of what each layer still keeps; ``erk`` and
            ``epl`` keep what `budgets` gives each layer.
        spare: Layers that keep at least their best weight, whatever the others then lose; those that have none left
            stay empty.
        pairs: Layers in which an output channel's second-best weight ranks with its best: where one alone does nothing.

    Returns:
        New masks, with exactly ``keep`` weights kept.

    Raises:
        SettingError: Fewer weights are to be kept than there are layers to spare.
    """
    if not 0 <= keep <= (left := kept(masks)):
        raise ValueError(f"keep: {keep} weights cannot be kept where the masks keep {left}")
    spare = [name for name in masks if name in spare]
    sizes = layer_counts(masks) if spare or scope == "layerwise" else {}
    spare = [name for name in spare if sizes[name]]
    if keep < len(spare):
        raise SettingError(
            f"sparsity: {keep} weights are to be kept, fewer than the {len(spare)} layers that must keep one; lower "
            "the sparsity, or set collapse=warn to let layers be pruned to nothing"
        )
    if scope == "layerwise":
        if distribution == "uniform":
            cuts = fill(left - keep, sizes, sizes)
            keeps = {name: size - cuts[name] for name, size in sizes.items()}
        else:
            # Of a larger count a layer's rounded share may be smaller, so what it still keeps is its cap.
            keeps = budgets({name: mask.shape for name, mask in masks.items()}, keep, distribution, sizes)
        for name in spare:
            if not keeps[name]:
                keeps[max(keeps, key=lambda one: keeps[one] - (one in spare))] -= 1
                keeps[name] = 1
        ranked = Lazy(masks, lambda n: _paired(_alive(masks, scores[n], n)) if n in pairs else scores[n])
        return keep_best(masks, ranked, keeps)

    def alive(name: str) -> Tensor:
        score = _alive(masks, scores[name], name)
        score = score.masked_fill(top(score, 1), torch.inf) if name in spare else score
        return (_paired(score) if name in pairs else score).to(dtype)

    dtype = reduce(torch.promote_types, (scores[name].dtype for name in masks), torch.float32)
    found = joint(lambda: map(alive, masks), keep)
    return Counted(dict(zip(masks, found, strict=True)), kept=keep)


def keep_best(masks: Mapping[str, Tensor], scores: Mapping[str, Tensor], keeps: Mapping[str, int]) -> Masks:
    """Keep in every layer as many of the best as its budget says.

    Args:
        masks: Bool, the masks to start from; what they prune stays pruned.
        scores: Float, same keys and shapes, on any device.
        keeps: How many weights each layer keeps, 0 to what its mask still keeps.

    Raises:
        SettingError: A layer has fewer weights left than its budget; it is named.
    """
    for name, left in layer_counts(masks).items():
        if not 0 <= keeps[name] <= left:
            raise SettingError(
                f"budget of {name}: {keeps[name]} weights cannot be kept where {left} of {masks[name].numel()} are "
                f"left; give it 0 to {left}, or leave the layer out with exclude"
            )
    names, out = list(masks), dict[str, Tensor]()
    sizes = masks.counts if isinstance(masks, AllKept) else {name: mask.numel() for name, mask in masks.items()}
    for part in together([sizes[name] for name in names], scores[names[0]]) if names else ():
        ranked = [_alive(masks, scores[name], name) for name in names[part]]
        out.update(zip(names[part], tops(ranked, [keeps[name] for name in names[part]]), strict=True))
    return Counted(out, keeps)


def _alive(masks: Mapping[str, Tensor], score: Tensor, name: str) -> Tensor:
    """A layer's scores on its mask's device, -inf where that prunes."""
    score = score.detach().to(dtype=torch.promote_types(score.dtype, torch.float32))
    if isinstance(masks, AllKept):
        return score
    return score.to(masks[name].device).masked_fill(~masks[name], -torch.inf)


def _paired(score: Tensor) -> Tensor:
    """Scores, the second-best of each output channel as high as its best; -inf stays."""
    rows = score.flatten(1)
    best, first = rows.max(1, keepdim=True)
    second, at = rows.scatter(1, first, -torch.inf).max(1, keepdim=True)
    return rows.scatter(1, at, best.where(second > -torch.inf, rows.gather(1, at))).view_as(score)


def collapsed(masks: Mapping[str, Tensor]) -> list[str]:
    """Names of the layers that keep nothing."""
    return [name for name, mask in masks.items() if not mask.any()]


def revived(masks: Mapping[str, Tensor], before: Mapping[str, Tensor], scores: Mapping[str, Tensor]) -> Masks:
    """The masks, and in every layer that keeps nothing the best of those it kept before."""
    out = dict(masks)
    for name in collapsed(masks):
        out[name] = before[name] & top(_alive(before, scores[name], name), 1)
    return out


def intersect(*masks: Mapping[str, Tensor]) -> Masks:
    """Keep what every one of the masks keeps.

    Raises:
        SettingError: They are not masks of the same weights.

    >>> a, b = torch.tensor([True, True, False]), torch.tensor([False, True, True])
    >>> intersect({"w": a}, {"w": b})["w"].tolist()
    [False, True, False]
    """
    first, *others = masks
    out = {name: mask.clone() for name, mask in first.items()}
    for other in others:
        check_same(out, other)
        for name in out:
            out[name] &= other[name]
    return out


def check_same(masks: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> None:
    """Refuse masks that are not of the same weights, by name and shape.

    Raises:
        SettingError: They are not.
    """
    shapes, theirs = ({name: tuple(mask.shape) for name, mask in one.items()} for one in (masks, others))
    if shapes != theirs:
        apart = sorted(name for name in shapes.keys() | theirs.keys() if shapes.get(name) != theirs.get(name))
        raise SettingError(
            f"the masks are not of the same weights: {len(apart)} differ in name or shape, the first is "
            f"{shown(apart[0])} ({shapes.get(apart[0], 'missing')} and {theirs.get(apart[0], 'missing')}); compare "
            "tickets of one model"
        )


def shuffled_masks(masks: Mapping[str, Tensor], seed: int) -> Masks:
    """Random masks with the same number of kept weights in every layer: the control a ticket has to beat."""
    generator = torch.Generator().manual_seed(seed_from(seed, _SHUFFLE))
    return {
        name: mask.flatten()[torch.randperm(mask.numel(), generator=generator)].view(mask.shape)
        for name, mask in masks.items()
    }
