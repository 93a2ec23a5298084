"""Random masks beside a ticket's: as many units kept, in all or in every layer. Units move whole."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ..core.errors import SettingError
from ..core.masks import Masks, all_kept, shuffled_masks
from ..core.patterns import blocks
from ..core.scores import random
from ..core.seeds import seed_from
from .units import Channels, Pattern, Weights

_DRAWN = 0xD4A3  # streams of their own: the pruner `random` draws under the same seed
_SHUFFLED = 0x5F1F


def random_masks(units: Weights, masks: Mapping[str, Tensor], seed: int) -> Masks:
    """Random masks that keep as many units as these, each as likely as any other, whatever its layer.

    Args:
        units: What is kept or pruned as one.
        masks: Bool, by parameter name, on the CPU.
        seed: Of the draw.

    Returns:
        New masks. Channels may be of different sizes: of these as near below as they allow.
    """
    whole, keep, seed = all_kept(masks), units.kept(masks), seed_from(seed, _DRAWN)
    if isinstance(units, Channels):  # not by the mean of noise, which is the less extreme the larger a channel is
        generator = torch.Generator().manual_seed(seed)
        return units.cut_by(whole, lambda: torch.rand(len(units.groups), generator=generator), keep, "global")
    return dict(units.cut(whole, random(masks, seed), keep, "global", "uniform", ()))


def shuffled_layers(units: Weights, masks: Mapping[str, Tensor], seed: int) -> Masks:
    """The masks shuffled within each layer, which keeps as many units as before.

    Args:
        units: What is kept or pruned as one.
        masks: Bool, by parameter name, on the CPU.
        seed: Of the shuffle.

    Raises:
        SettingError: They prune what is no whole unit.
    """
    if isinstance(units, Channels):
        return _shuffled_channels(units, masks, torch.Generator().manual_seed(seed_from(seed, _SHUFFLED)))
    if isinstance(units, Pattern):
        generator = torch.Generator().manual_seed(seed_from(seed, _SHUFFLED))
        return {n: _shuffled_pattern(units, m, generator) if n in units.names else m for n, m in masks.items()}
    return shuffled_masks(masks, seed)


def _shuffled_channels(units: Channels, masks: Mapping[str, Tensor], generator: torch.Generator) -> Masks:
    gone = units.gone(masks)
    if any(not torch.equal(masks[name], mask) for name, mask in units.groups.mask(gone).items()):
        raise SettingError(
            "controls: shuffled_layers moves whole channels, and this ticket prunes parts of them; take another control"
        )
    other = gone.clone()
    for number in range(len(units.groups.families)):
        mine = (units.groups.family == number).nonzero().flatten()
        other[mine] = gone[mine[torch.randperm(len(mine), generator=generator)]]
    return units.groups.mask(other)


def _shuffled_pattern(units: Pattern, mask: Tensor, generator: torch.Generator) -> Tensor:
    """Entries within their group of m, or blocks within their layer."""
    kind, first, second = units.granularity
    if kind == "n:m":
        rows = mask.reshape(-1, second)
        return rows.gather(1, torch.rand(rows.shape, generator=generator).argsort(1)).view(mask.shape)
    parts = blocks(mask, first, second)
    down, across, _ = parts.shape
    order = torch.randperm(down * across, generator=generator)
    moved = parts.flatten(0, 1)[order].view(down, across, first, second).transpose(1, 2)
    return moved.reshape(mask.shape)
