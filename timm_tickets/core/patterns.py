"""Patterns within a matrix: n of every m entries of a row, and blocks. Pure functions on plain dictionaries.

A weight is taken as the matrix (out, in * kernel) that multiplies columns of activations, in memory order. It is what
torch's semi-structured tensors take, and what BSR tensors do; a layer whose matrix a pattern does not fit stays whole.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from .errors import SettingError
from .lazy import Lazy
from .masks import Distribution, Masks, Scope, cut
from .masks import kept as kept_of


class Granularity(NamedTuple):
    """What is cut as one: ``weight``, ``channel``, ``head``, ``n:m`` or ``block``, and its two numbers.

    Attributes:
        kind: Which of them.
        first: n, or the rows of a block.
        second: m, or the columns of a block.
    """

    kind: str
    first: int = 0
    second: int = 0


def parsed(text: str) -> Granularity:
    """A granularity as it is written.

    Raises:
        ValueError: It is none; the message says what is valid.

    >>> parsed("2:4"), parsed("block 8x1")
    (Granularity(kind='n:m', first=2, second=4), Granularity(kind='block', first=8, second=1))
    """
    if text in ("weight", "channel", "head"):
        return Granularity(text)
    if found := re.fullmatch(r"(\d+):(\d+)", text):
        n, m = int(found[1]), int(found[2])
        if 0 < n < m:
            return Granularity("n:m", n, m)
    elif (found := re.fullmatch(r"block(?: (\d+)x(\d+))?", text)) and "0" not in found.groups():
        return Granularity("block", int(found[1] or 4), int(found[2] or 4))
    raise ValueError(
        f"{text!r} is not valid; it is weight, channel, head, n of m consecutive entries such as 2:4, or blocks of "
        "rows x columns such as 'block 4x4'"
    )


def matrix(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of the matrix that a weight is.

    >>> matrix((8, 4, 3, 3))
    (8, 36)
    """
    return shape[0], prod(shape[1:])


def fitting(shapes: Mapping[str, Sequence[int]], granularity: Granularity) -> list[str]:
    """Names of the weights whose matrix the pattern divides.

    >>> fitting({"a": (4, 8), "b": (4, 9)}, parsed("2:4")), fitting({"a": (4, 8), "b": (6, 8)}, parsed("block"))
    (['a'], ['a'])
    """
    rows = granularity.first if granularity.kind == "block" else 1
    return [n for n, s in shapes.items() if not matrix(s)[0] % rows and not matrix(s)[1] % granularity.second]


def best_of(mask: Tensor, score: Tensor, n: int, m: int) -> Tensor:
    """Of each m consecutive entries the n best that the mask keeps; among equals the earlier ones.

    >>> best_of(torch.ones(8, dtype=torch.bool), torch.tensor([1.0, 4, 2, 3, 5, 5, 5, 0]), 2, 4).int().tolist()
    [0, 1, 0, 1, 1, 1, 0, 0]
    """
    score = score.detach().to(mask.device, torch.promote_types(score.dtype, torch.float32))
    rows = score.masked_fill(~mask, -torch.inf).reshape(-1, m)
    best = rows.argsort(dim=1, descending=True, stable=True)[:, :n]
    return torch.zeros(rows.shape, dtype=torch.bool, device=mask.device).scatter_(1, best, True).view(mask.shape) & mask


def cut_n_of_m(
    masks: Mapping[str, Tensor],
    scores: Mapping[str, Tensor],
    keep: int,
    n: int,
    m: int,
    scope: Scope = "global",
    spare: Collection[str] = (),
) -> Masks:
    """As `core.masks.cut`, but the n best of each m consecutive entries stay: the last cut leaves n of every m.

    Args:
        masks: Bool, of weights that the pattern fits; what they prune stays pruned.
        scores: Float, same keys and shapes, on any device.
        keep: How many to keep, n / m of all at least.
        n: Entries that stay.
        m: Of so many consecutive ones.
        scope: As in `cut`.
        spare: As in `cut`.
    """

    def lifted(name: str) -> Tensor:
        score = scores[name].detach().to(masks[name].device)
        if score.isnan().any():
            raise ValueError("scores: NaN among them; the weights they come from are probably NaN too")
        score = score.to(torch.promote_types(score.dtype, torch.float32))
        return score.masked_fill(best_of(masks[name], score, n, m), torch.inf)

    return cut(masks, Lazy(masks, lifted), keep, scope, "uniform", spare)


def filled_up(
    masks: Mapping[str, Tensor], before: Mapping[str, Tensor], scores: Mapping[str, Tensor], n: int, m: int
) -> Masks:
    """The masks, and where of m consecutive entries fewer than n are left, the best of those that were kept before.

    Masks that each keep n of m may have fewer in common.
    """

    def filled(name: str) -> Tensor:
        score = scores[name].detach().float().to(masks[name].device)
        return masks[name] | best_of(before[name], score.masked_fill(masks[name], torch.inf), n, m)

    return {name: filled(name) for name in masks}


def blocks(values: Tensor, rows: int, columns: int) -> Tensor:
    """A weight's entries by block: (blocks down, blocks across, rows * columns).

    >>> blocks(torch.arange(8).view(2, 4), 2, 2).tolist()
    [[[0, 1, 4, 5], [2, 3, 6, 7]]]
    """
    down, across = matrix(values.shape)
    parts = values.reshape(down // rows, rows, across // columns, columns)
    return parts.transpose(1, 2).reshape(down // rows, across // columns, rows * columns)


def whole(kept: Tensor, rows: int, columns: int, shape: Sequence[int]) -> Tensor:
    """The mask of a weight of this shape, of which blocks are kept: bool (blocks down, blocks across)."""
    return kept.repeat_interleave(rows, 0).repeat_interleave(columns, 1).reshape(tuple(shape))


def cut_blocks(
    masks: Mapping[str, Tensor],
    scores: Mapping[str, Tensor],
    keep: int,
    rows: int,
    columns: int,
    scope: Scope = "global",
    distribution: Distribution = "uniform",
    spare: Collection[str] = (),
) -> Masks:
    """As `core.masks.cut`, but whole blocks by their mean score; of ``keep`` as many weights as fill blocks.

    Raises:
        SettingError: Not one block is to be kept.
    """
    size = rows * columns
    if keep < size:
        raise SettingError(f"sparsity: {keep} weights are to be kept and a block has {size}; lower the sparsity")
    kept = {name: blocks(mask, rows, columns).any(2) for name, mask in masks.items()}
    wide = torch.promote_types

    def mean(name: str) -> Tensor:
        score = scores[name].detach()
        return blocks(score.to(wide(score.dtype, torch.float32)), rows, columns).mean(2)

    found = cut(kept, Lazy(kept, mean), min(keep // size, kept_of(kept)), scope, distribution, spare)
    return {name: whole(found[name], rows, columns, masks[name].shape) for name in masks}
