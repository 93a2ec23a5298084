"""Scores: one float for each weight, higher meaning keep. Pure functions; the masks are cut from them in masks.py."""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from .masks import Masks, Scores
from .seeds import seed_from

_NOISE = 0x5C02E  # the stream of random scores, told from others of the same seed


class Lazy(Mapping[str, Tensor]):
    """Tensors that are made when they are read: a cut reads a layer at a time, and all at once are a model's size.

    Args:
        names: Their names.
        make: Given a name, makes the tensor; every time the same one.
    """

    def __init__(self, names: Iterable[str], make: Callable[[str], Tensor]):
        self._names, self._make = dict.fromkeys(names), make

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._make(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def magnitude(weights: Mapping[str, Tensor]) -> Lazy:
    """The absolute value of each weight (Han et al. 2015, 1506.02626), as it is when it is read."""
    return Lazy(weights, lambda name: weights[name].detach().abs())


def random(weights: Mapping[str, Tensor], seed: int) -> Scores:
    """Uniform noise in [0, 1), of the weights' shapes, on the CPU: the same for a seed whatever the device."""
    # Not the seed itself: a model initialised uniformly under torch.manual_seed(seed) drew the very same numbers, and
    # the largest weights would be kept instead of random ones.
    generator = torch.Generator().manual_seed(seed_from(seed, _NOISE))
    return {name: torch.rand(weight.shape, generator=generator) for name, weight in weights.items()}


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
    """Synaptic flow ``|w| * dR/d|w|``, R the sum of outputs for an input of ones, absolute weights and no biases.

    Works on a copy in double precision, in which the products of many layers do not overflow; the model is unchanged.

    Args:
        model: The model, on any device.
        masks: What is pruned already counts as zero.
        input_size: Channels, height, width.

    Source: Tanaka et al. 2020, 2006.05467, equations 2 and 3 and algorithm 1.
    """
    linear = copy.deepcopy(model).double().eval()
    with torch.no_grad():
        for name, value in linear.state_dict().items():
            # R is a product of weights: what biases add would let layers before them be cut off unnoticed.
            value.zero_() if name.endswith(".bias") else value.abs_()
        weights = {name: parameter for name, parameter in linear.named_parameters() if name in masks}
        for name, weight in weights.items():
            weight.requires_grad_(True)
            weight.mul_(masks[name].to(weight.device))
    device = next(linear.parameters()).device
    output = linear(torch.ones(1, *input_size, dtype=torch.float64, device=device))
    gradients = torch.autograd.grad(output.sum(), list(weights.values()))
    products = zip(weights.items(), gradients, strict=True)
    return {name: (weight * gradient).detach().cpu() for (name, weight), gradient in products}
