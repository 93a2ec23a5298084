"""Scores: one float for each weight, higher meaning keep. Pure functions; the masks are cut from them in masks.py."""

import copy
from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from .lazy import Lazy
from .masks import Masks, Scores
from .seeds import seed_from

_NOISE = 0x5C02E  # the stream of random scores, told from others of the same seed


def magnitude(weights: Mapping[str, Tensor]) -> Lazy:
    """The absolute value of each weight (Han et al. 2015, 1506.02626), as it is when it is read."""
    return Lazy(weights, lambda name: weights[name].detach().abs())


def random(weights: Mapping[str, Tensor], seed: int) -> Lazy:
    """Uniform noise in [0, 1), of the weights' shapes, on the CPU: the same for a seed whatever the device."""
    # Not the seed itself: a model initialised uniformly under torch.manual_seed(seed) drew the very same numbers, and
    # the largest weights would be kept instead of random ones.
    generator = torch.Generator().manual_seed(seed_from(seed, _NOISE))
    shapes = {name: weight.shape for name, weight in weights.items()}
    order = list(shapes)
    states = [generator.get_state()]  # as each tensor begins, as far as they were drawn

    def make(name: str) -> Tensor:
        at, out = order.index(name), torch.empty(0)
        for number in range(min(at, len(states) - 1), at + 1):
            generator.set_state(states[number])
            out = torch.rand(shapes[order[number]], generator=generator)
            if number + 1 == len(states):
                states.append(generator.get_state())
        return out

    return Lazy(order, make)


def snip(weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> Lazy:
    """Connection sensitivity ``|w * g|`` (Lee et al. 2018, 1810.02340, equation 5, without its normalisation)."""
    return Lazy(gradients, lambda name: (weights[name] * gradients[name]).detach().abs())


def grasp(weights: Mapping[str, Tensor], products: Mapping[str, Tensor]) -> Lazy:
    """What removing a weight would take from the gradient's norm: ``w * Hg``.

    Wang et al. 2020, 2002.07376, equation 8, score ``-w * Hg`` and remove the highest; here higher means keep.

    Args:
        weights: The weights.
        products: The Hessian times the gradient, by name, of the weights' shapes.
    """
    return Lazy(products, lambda name: (weights[name] * products[name]).detach())


def synflow(model: nn.Module, masks: Masks, input_size: Sequence[int]) -> Scores:
    """Synaptic flow ``|w| * dR/d|w|``, R the sum of outputs for an input of ones, absolute weights, no biases or means.

    Works on a copy in double precision, in which the products of many layers do not overflow; the model is unchanged.

    Args:
        model: The model, on any device.
        masks: What is pruned already counts as zero.
        input_size: Channels, height, width.

    Source: Tanaka et al. 2020, 2006.05467, equations 2 and 3 and algorithm 1.
    """
    linear = copy.deepcopy(model).requires_grad_(False).double().eval()
    scores: Scores = {}
    with torch.no_grad():
        for name, value in linear.state_dict().items():
            # R is a product of weights: what biases and means add would let layers before them be cut off unnoticed.
            value.zero_() if name.endswith((".bias", ".running_mean")) else value.abs_()
        weights = {name: parameter for name, parameter in linear.named_parameters() if name in masks}
        for name, weight in weights.items():
            weight.mul_(masks[name].to(weight.device))

    def take(name: str, weight: Tensor) -> None:
        assert weight.grad is not None
        scores[name] = (weight.detach() * weight.grad).cpu()
        weight.grad = None  # freed as soon as it was used: all of them together take as much as the model

    for name, weight in weights.items():
        weight.requires_grad_(True).grad = None
        weight.register_post_accumulate_grad_hook(partial(take, name))
    device = next(linear.parameters()).device
    linear(torch.ones(1, *input_size, dtype=torch.float64, device=device)).sum().backward()
    # Through what the output does not depend on flows nothing.
    nothing = {name: torch.zeros_like(masks[name], dtype=torch.float64) for name in weights if name not in scores}
    return {name: (scores | nothing)[name] for name in weights}


def above_zero(scores: Mapping[str, Tensor]) -> float:
    """Fraction of scores above zero; the hard mask is counted, never zeros of the sigmoid."""
    return sum(int((s > 0).sum()) for s in scores.values()) / sum(s.numel() for s in scores.values())
