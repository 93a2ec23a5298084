"""Random weights, first scores and freezing patterns for a subnet, each layer's from streams of its own (`draws`)."""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from ..core.draws import SCORES, Kind, draw, frozen
from ..core.lazy import Lazy
from .prunable import norms
from .subnet import Subnet

FirstScores = Literal["uniform", "normal"]


def draw_weights_(subnet: Subnet, kind: Kind, seed: int) -> None:
    """Give every prunable weight random values of Kaiming's scale."""
    shapes, numbers = _layers(subnet)
    subnet.set_weights_(Lazy(shapes, lambda name: torch.from_numpy(draw(kind, shapes[name], seed, numbers[name]))))


def draw_scores_(subnet: Subnet, kind: FirstScores, seed: int) -> None:
    """Give every gate its first scores, as `first_scores`."""
    shapes, numbers = _layers(subnet)
    subnet.load_scores_(Lazy(shapes, lambda name: first_scores(kind, shapes[name], seed, numbers[name])))


def _layers(subnet: Subnet) -> tuple[dict[str, torch.Size], dict[str, int]]:
    """Shape and number of each layer."""
    shapes = {name: weight.shape for name, weight in subnet.weights().items()}
    return shapes, {name: number for number, name in enumerate(shapes)}


def first_scores(kind: FirstScores, shape: torch.Size, seed: int, layer: int) -> Tensor:
    """Scores to begin with, float32, the same for a seed on every platform.

    Args:
        kind: ``uniform``: in (-1, 1) / sqrt(fan_in), torch's Kaiming uniform with a = sqrt 5, standard deviation
            0.577 / sqrt(fan_in); ``normal``: Kaiming normal, standard deviation 1.414 / sqrt(fan_in).
        shape: Of the weight.
        seed: 0 to 2^64 - 1.
        layer: Position of the weight among the prunable ones.
    """
    if kind == "normal":
        return torch.from_numpy(draw("kaiming_normal", shape, seed, layer, SCORES))
    return torch.from_numpy(draw("kaiming_uniform", shape, seed, layer, SCORES)) * 6**-0.5


def frozen_patterns(
    subnet: Subnet, counts: Mapping[str, tuple[int, int]], seed: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """For each layer, what leaves a search as pruned and what as kept: bool, of the weight's shape.

    Args:
        subnet: The subnet.
        counts: How many of each layer's weights leave as pruned and as kept.
        seed: 0 to 2^64 - 1.
    """
    out: dict[str, tuple[Tensor, Tensor]] = {}
    for number, (name, weight) in enumerate(subnet.weights().items()):
        pruned, locked = frozen(weight.numel(), *counts[name], seed, number)
        out[name] = (torch.from_numpy(pruned).view(weight.shape), torch.from_numpy(locked).view(weight.shape))
    return out


@torch.no_grad()
def reset_norms_(subnet: Subnet, affine: bool, trained: bool) -> None:
    """Set the scales of normalisation layers to 1 where they would keep a branch shut.

    Args:
        subnet: The subnet.
        affine: False resets all scales to 1 and all shifts to 0.
        trained: Whether they train; where not, a last scale that begins at zero would keep its branch shut, and all
            gradients out, for good.
    """
    for norm in norms(subnet.model):
        if norm.weight is not None and not (affine and (trained or norm.weight.any())):
            norm.weight.fill_(1)
        if norm.bias is not None and not affine:
            norm.bias.zero_()
