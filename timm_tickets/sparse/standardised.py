"""Masks on weight-standardised convolutions (NFNet, ResNetV2/BiT, hybrid ViT).

Standardising a weight moves its zeros: a mask on the raw weight alone prunes nothing. Such a layer keeps its keys and
parameters and gets a class that computes ``mask * standardise(mask * w)``, the raw pruned weights also being zero. Only
a layer of this class reads its checkpoint as the ticket means it.
"""

from typing import Any

import torch
from timm.layers.padding import pad_same
from timm.layers.std_conv import ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame
from torch import Tensor, nn
from torch.nn import functional

from .gates import Gate


class _Masked(nn.Module):
    """The common forward of timm's four standardised convolutions, with a mask before and after standardising."""

    prune_mask: Tensor

    def forward(self, x: Tensor) -> Tensor:
        layer: Any = self
        if getattr(layer, "same_pad", False):
            x = pad_same(x, layer.kernel_size, layer.stride, layer.dilation)
        weight = layer.weight
        gate = self._gate()
        if gate is None:
            value = self.prune_mask.to(weight.dtype)
            weight = weight * value
        else:  # already before the weight; its scale goes in standardising
            value = gate.value(weight.dtype)
            if gate.soft:  # a soft mask starts at 1 / scale
                value = value * gate.scale
        weight = functional.batch_norm(
            weight.reshape(1, layer.out_channels, -1),
            None,
            None,
            weight=(layer.gain * layer.scale).view(-1) if hasattr(layer, "gain") else None,
            training=True,
            momentum=0.0,
            eps=layer.eps,
        ).reshape_as(weight)
        return functional.conv2d(
            x, weight * value, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups
        )

    def _gate(self) -> Gate | None:
        layer: Any = self
        return layer.parametrizations.weight[0] if hasattr(layer, "parametrizations") else None


class MaskedStdConv2d(_Masked, StdConv2d):
    """timm's StdConv2d under a mask."""


class MaskedStdConv2dSame(_Masked, StdConv2dSame):
    """timm's StdConv2dSame under a mask."""


class MaskedScaledStdConv2d(_Masked, ScaledStdConv2d):
    """timm's ScaledStdConv2d under a mask."""


class MaskedScaledStdConv2dSame(_Masked, ScaledStdConv2dSame):
    """timm's ScaledStdConv2dSame under a mask."""


_MASKED: dict[type, type] = {
    masked.__mro__[2]: masked
    for masked in (MaskedStdConv2d, MaskedStdConv2dSame, MaskedScaledStdConv2d, MaskedScaledStdConv2dSame)
}


def with_mask_(module: nn.Module) -> "_Masked | None":
    """Give a standardised convolution its masked class; None for any other layer."""
    if type(module) in _MASKED:
        module.__class__ = _MASKED[type(module)]
        weight: Any = module.weight
        module.register_buffer(
            "prune_mask", torch.ones(weight.shape, dtype=torch.bool, device=weight.device), persistent=False
        )
    return module if isinstance(module, _Masked) else None
