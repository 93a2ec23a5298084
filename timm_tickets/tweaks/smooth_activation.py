"""Smooth activations early in training ("ghost" neurons).

Source: Chen et al. 2021, 2101.03255; swish: Ramachandran et al. 2017, 1710.05941; mish: Misra 2019, 1908.08681.
"""

from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from timm.layers import activations
from torch import Tensor, nn
from torch.nn import functional

from ..core.errors import SettingError
from .base import Annealed
from .registry import register_tweak

# Without parameters, and of unbounded range: sigmoids and their kin are gates, not activations.
_ACTIVATIONS = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish),
    *(activations.Swish, activations.Mish, activations.HardSwish, activations.HardMish),
    *(activations.GELU, activations.GELUTanh, activations.QuickGELU),
)
_SAME = {"swish": (nn.SiLU, activations.Swish), "mish": (nn.Mish, activations.Mish), "sigmoid": ()}


@register_tweak("smooth_activation")
class SmoothActivation(Annealed):
    """Blend every activation of the model with a smooth one, which falls away: share * smooth + (1 - share) * own.

    Suggested: swish. ``sigmoid`` is x * sigmoid(beta x), which is swish at beta 1 and nears ReLU as beta grows.
    Cost: both activations are computed while it lasts.
    Departures: any activation of the model is blended, the paper has ReLU only; the paper's released code keeps the
    smooth one to the end. Activations with a scale of their own (NFNet's), and such that are no modules, stay.
    """

    function: Annotated[Literal["swish", "mish", "sigmoid"], Field(description="the smooth activation")] = "swish"
    beta: Annotated[float, Field(gt=0, description="of x * sigmoid(beta x); only with function=sigmoid")] = 1.0

    def inject_(self, model: nn.Module, share: Tensor) -> list[Any]:
        places = [m for m in model.modules() if isinstance(m, _ACTIVATIONS) and not isinstance(m, _SAME[self.function])]
        if not places:
            kinds = ", ".join(sorted({kind.__name__ for kind in _ACTIVATIONS}))
            raise SettingError(
                f"tweaks.smooth_activation: {type(model).__name__} has no activation module to blend with "
                f"{self.function} (one of {kinds}); leave this tweak out"
            )
        return [_Blend(place, self.smooth, share) for place in places]

    def smooth(self, x: Tensor) -> Tensor:
        if self.function == "mish":
            return functional.mish(x)
        return functional.silu(x) if self.function == "swish" else x * torch.sigmoid(self.beta * x)


class _Blend:
    """The hook on one activation, which must not overwrite its input meanwhile."""

    def __init__(self, module: Any, smooth: Any, share: Tensor):
        self.module, self.inplace = module, getattr(module, "inplace", None)
        if self.inplace:
            module.inplace = False

        # A function, not a method: a copy of the model (an average of weights) then shares `share`.
        def blend(_: nn.Module, inputs: tuple[Tensor, ...], own: Tensor) -> Tensor:
            part = share.to(own.dtype)
            return (1 - part) * own + part * smooth(inputs[0])

        self.handle = module.register_forward_hook(blend)

    def remove(self) -> None:
        self.handle.remove()
        if self.inplace:
            self.module.inplace = True
