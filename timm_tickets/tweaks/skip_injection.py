"""Extra shortcuts early in training ("ghost" skips).

Source: Chen et al. 2021, 2101.03255.
"""

from typing import Any

from torch import Tensor, nn

from ..core.errors import SettingError
from ..sparse.prunable import CONVOLUTIONS, MATRICES, classifier_names
from .base import Annealed
from .registry import register_tweak


@register_tweak("skip_injection")
class SkipInjection(Annealed):
    """Add a layer's input to its output, share * x, around every convolution and linear layer that keeps its shape.

    Suggested: for networks pruned hard, where gradients fade.
    Cost: an addition a layer while it lasts; no parameters.
    Departures: the paper's released code injects dense 1x1 convolutions, which stay and make a ticket of 90 % one of
    79 %; layers that change the shape get no shortcut here.
    """

    def inject_(self, model: nn.Module, share: Tensor) -> list[Any]:
        heads = tuple(f"{name}." for name in classifier_names(model))
        layers = {name: module for name, module in model.named_modules() if isinstance(module, MATRICES)}
        places = {n: layer for n, layer in layers.items() if keeps_shape(layer) and not f"{n}.".startswith(heads)}
        if not places:
            raise SettingError(
                f"tweaks.skip_injection: none of the {len(layers)} convolutions and linear layers of "
                f"{type(model).__name__} keeps its input's shape (as many channels out as in, stride 1), so there is "
                "nothing to put a shortcut around; leave this tweak out"
            )

        def add(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            # Without padding a convolution shrinks its images.
            return output + share.to(output.dtype) * inputs[0] if output.shape == inputs[0].shape else output

        return [layer.register_forward_hook(add) for layer in places.values()]


def keeps_shape(layer: nn.Module) -> bool:
    """Whether a layer has as many channels or features out as in, and no stride."""
    if isinstance(layer, nn.Linear):
        return layer.in_features == layer.out_features
    return (
        isinstance(layer, CONVOLUTIONS)
        and not layer.transposed
        and layer.in_channels == layer.out_channels
        and all(stride == 1 for stride in layer.stride)
    )
