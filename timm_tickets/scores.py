"""Scores: one float for each weight, higher meaning keep. Pure functions; the masks are cut from them in masks.py."""

from collections.abc import Mapping

import torch
from torch import Tensor

from .masks import Scores


def magnitude(weights: Mapping[str, Tensor]) -> Scores:
    """The absolute value of each weight (Han et al. 2015, 1506.02626)."""
    return {name: weight.detach().abs() for name, weight in weights.items()}


def random(weights: Mapping[str, Tensor], seed: int) -> Scores:
    """Uniform noise in [0, 1), of the weights' shapes, on the CPU: the same for a seed whatever the device."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(weight.shape, generator=generator) for name, weight in weights.items()}
