"""Comparing tickets: what they share, beside what chance would share."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..core.masks import Masks, check_same
from ..storage.files import replacing


def union(*masks: Mapping[str, Tensor]) -> Masks:
    """Keep what any of the masks keeps.

    Raises:
        SettingError: They are not masks of the same weights; so also `difference`.
    """
    first, *others = masks
    out = {name: mask.clone() for name, mask in first.items()}
    for other in others:
        check_same(out, other)
        for name in out:
            out[name] |= other[name]
    return out


def difference(masks: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> Masks:
    """Keep what the first keep and the second do not."""
    check_same(masks, others)
    return {name: mask & ~others[name] for name, mask in masks.items()}


def overlap(masks: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> dict[str, float]:
    """How alike two masks are: weights kept by both over weights kept by either, and that of chance.

    Args:
        masks: Bool, by name.
        others: Bool, same names and shapes.

    Returns:
        ``iou``: in [0, 1]; ``by_chance``: the same of the expected intersection, n m / N in a layer of N weights, of
        random masks with the same number kept in every layer; ``shared``: the intersection over its expectation, 1
        where the layer counts explain all of it.

    Raises:
        SettingError: They are not masks of the same weights.

    >>> import torch
    >>> a, b = torch.tensor([True, True, False, False]), torch.tensor([True, False, True, False])
    >>> overlap({"w": a}, {"w": b})
    {'iou': 0.3333333333333333, 'by_chance': 0.3333333333333333, 'shared': 1.0}
    """
    check_same(masks, others)
    both = either = 0
    expected = 0.0
    for name, mask in masks.items():
        first, second = int(mask.sum()), int(others[name].sum())
        common = int((mask & others[name]).sum())
        both += common
        either += first + second - common
        expected += first * second / mask.numel()
    kept = both + either  # of both masks together
    return {
        "iou": both / either if either else 1.0,
        "by_chance": expected / (kept - expected) if kept else 1.0,
        "shared": both / expected if expected else 1.0,
    }


def layer_overlaps(masks: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> dict[str, dict[str, float]]:
    """`overlap` of each layer by itself."""
    check_same(masks, others)
    return {name: overlap({name: mask}, {name: others[name]}) for name, mask in masks.items()}


def heat_map(names: Sequence[str], masks: Sequence[Mapping[str, Tensor]], path: str | Path) -> None:
    """Draw the overlap (iou) of every pair of masks as a PNG."""
    from matplotlib.figure import Figure

    values = [[overlap(one, other)["iou"] for other in masks] for one in masks]
    size = 2.5 + 0.7 * len(names)
    figure = Figure((size, size), layout="constrained")
    axes: Any = figure.subplots()
    image = axes.imshow(values, vmin=0, vmax=1, cmap="viridis")
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axes.set_yticks(range(len(names)), names)
    for row, line in enumerate(values):
        for column, value in enumerate(line):
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", color="black" if value > 0.6 else "white")
    axes.set_title("kept by both / kept by either")
    figure.colorbar(image, shrink=0.7)
    with replacing(Path(path)) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
