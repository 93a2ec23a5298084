"""Weight-standardised convolutions (NFNet, ResNetV2/BiT, hybrid ViT): how a mask outlasts the standardisation.

timm convolves with ``(w - mean(w)) / sqrt(var(w) + eps)``, mean and variance over all weights of an output channel, so
its zeros move unless their mean is zero. Hence what a channel keeps is held at mean zero as what it does not keep is at
zero: plain timm then computes the sparse kernel from the parameters as they are, whoever saved them. This takes no
freedom but the one that standardising takes too. A channel of which nothing is pruned stays as it is; one that keeps a
single weight is zero, as no kernel of mean zero has a single weight.
"""

from collections.abc import Mapping

import torch
from timm.layers.std_conv import ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame
from torch import Tensor

from ..core.counting import wide
from ..core.errors import SettingError
from ..distributed.fsdp2 import is_split

STANDARDISED = (StdConv2d, StdConv2dSame, ScaledStdConv2d, ScaledStdConv2dSame)


def centred(weight: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """A weight less its mean over what each output channel keeps, and stretched so that this is as long as before.

    The stretch changes nothing of a standardised kernel. Without it, channels that lose much would have large gradients
    and be the first to be pruned by magnitude. A channel stays bit for bit where nothing of it is pruned, and where its
    mean is zero but for rounding: or else it would move with every checkpoint that is read.

    Args:
        weight: Float, (out, ...).
        value: The mask, of its shape: bool, or what a soft one lets through, in [0, 1]; the mean is weighted by it.

    Returns:
        The weight, and by how much each channel was stretched, (out, 1, ...).
    """
    rows, stretch = _centred(weight, value)
    ones = (1,) * (weight.ndim - 1)
    return (rows * stretch).to(weight.dtype).view_as(weight), stretch.to(weight.dtype).view(-1, *ones)


def deviations(gradient: Tensor, value: Tensor) -> Tensor:
    """A gradient less its mean over what each output channel keeps, as a weight in `centred`; not stretched."""
    return _centred(gradient, value)[0].to(gradient.dtype).view_as(gradient)


def _centred(weight: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    exact = wide(weight.device)
    rows, by = weight.flatten(1).to(exact), value.flatten(1).to(exact)
    tiny, rounding = torch.finfo(exact).tiny, max(torch.finfo(weight.dtype).eps, 16 * torch.finfo(exact).eps)
    kept, size = rows * by, by.sum(1, keepdim=True).clamp(min=tiny)
    mean = kept.sum(1, keepdim=True) / size
    moves = (mean.abs() > rounding * kept.abs().sum(1, keepdim=True) / size) & (by < 1).any(1, keepdim=True)
    left = rows - torch.where(moves, mean, 0)
    before, after = (part.norm(dim=1, keepdim=True) for part in (kept, left * by))
    differ = after > rounding * before  # what is left of weights that are all alike is rounding
    left = torch.where(moves & ~differ, 0, left)
    return left, torch.where(moves & differ, before / after.clamp(min=tiny), 1)


@torch.no_grad()
def prune_(weight: Tensor, mask: Tensor, standardised: bool) -> None:
    """Set what a mask prunes to exactly zero; of a standardised weight, centre what is kept.

    Args:
        weight: Float; (out, ...) where it is standardised.
        mask: Bool, of its shape.
        standardised: Whether the layer standardises it.
    """
    weight.masked_fill_(~mask, 0)
    if standardised:
        weight.copy_(centred(weight, mask)[0]).masked_fill_(~mask, 0)


def check_channels(name: str, weight: Tensor) -> None:
    """Refuse a standardised weight that FSDP2 has split within its output channels.

    Raises:
        SettingError: It is one.
    """
    if is_split(weight) and any(place.is_shard() and not place.is_shard(0) for place in weight.placements):
        raise SettingError(
            f"model: {name} is standardised by output channels, and FSDP2 has split these; let `shard_placement_fn` "
            "split it along its first dimension, or leave it out of pruning with exclude"
        )


def only_lone_weights(mask: Tensor) -> bool:
    """Whether no output channel of a standardised layer keeps two weights, so that all of it is zero."""
    return mask[0].numel() > 1 and int(mask.flatten(1).sum(1).max()) < 2


def lone_weights(masks: Mapping[str, Tensor]) -> dict[str, int]:
    """How many output channels of these layers keep a single weight, by name, where any do."""
    alone = {name: int((mask.flatten(1).sum(1) == 1).sum()) for name, mask in masks.items() if mask[0].numel() > 1}
    return {name: count for name, count in alone.items() if count}
