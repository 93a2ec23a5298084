"""Layer-wise rescaled initialisation: GradInit on the masked network.

Source: Zhu et al. 2021, 2102.08098 (GradInit, algorithm 1); for tickets Chen et al. 2021, 2101.03255.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..core.errors import SettingError
from ..distributed.collectives import mean_over_processes
from ..sparse.prunable import MATRICES, norms
from .base import Criterion, Tweak
from .registry import register_tweak

State = dict[str, Tensor]
Batch = tuple[Tensor, Tensor]


@register_tweak("rescaled_init")
class RescaledInit(Tweak):
    """Before training, learn one positive factor a weight tensor and normalisation scale; then multiply them in.

    The factors minimise the loss after one step of length `eta` along the gradient, or, where the gradient is longer
    than `gamma`, that length. Zeros stay zero: the gradients are masked (the paper's released code forgets to, and so
    looks ahead with a dense network).
    Suggested: 180 iterations of Adam at 0.01, gamma 1, eta 0.1, the paper's.
    Cost: `iterations` times two forward passes and a second derivative, about three training steps each.
    Departures: each look-ahead is judged on the next batch; biases are not rescaled. The released code takes the step
    it looks ahead as a constant, keeps a first moment of Adam for each of the two aims, and leaves dropout out; here
    the step is differentiated through, as its algorithm 1 has it, one Adam serves both, and dropout is as in training.
    """

    iterations: Annotated[int, Field(ge=1, description="steps of Adam on the factors")] = 180
    lr: Annotated[float, Field(gt=0, description="learning rate of the factors")] = 1e-2
    eta: Annotated[float, Field(gt=0, description="length of the step looked ahead")] = 0.1
    gamma: Annotated[float, Field(gt=0, description="longest gradient allowed")] = 1.0
    floor: Annotated[float, Field(gt=0, le=1, description="least factor")] = 0.01

    def rescale_(
        self, model: nn.Module, masks: Mapping[str, Tensor], batches: Iterable[tuple[Tensor, Tensor]], loss: Criterion
    ) -> None:
        weights = {n: p.detach().requires_grad_(p.requires_grad) for n, p in model.named_parameters()}
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}  # statistics move meanwhile
        masks = {name: mask.to(weights[name].device) for name, mask in masks.items()}
        trained = [name for name, weight in weights.items() if weight.requires_grad]
        chosen = [name for name in scaled(model) if name in trained]
        if not chosen:
            raise SettingError(
                f"tweaks.rescaled_init: {type(model).__name__} has no convolution, linear layer or normalisation scale "
                "that is trained, so there is nothing to rescale; leave this tweak out"
            )
        factors = {name: torch.ones((), device=weights[name].device, requires_grad=True) for name in chosen}
        adam = torch.optim.Adam(factors.values(), self.lr)
        stream = iter(batches)
        training = model.training
        model.train()

        def loss_at(values: State, batch: Batch) -> Tensor:
            return loss(functional_call(model, (values, buffers), (batch[0],)), batch[1])

        try:
            with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
                for _ in range(self.iterations):
                    now = {name: w * factors[name] if name in factors else w for name, w in weights.items()}
                    aim = self.objective(loss_at, now, trained, masks, next(stream), next(stream))
                    if not aim.isfinite():
                        raise SettingError(
                            f"tweaks.rescaled_init: the look-ahead came to {aim.item()}; lower its lr or eta"
                        )
                    gradients = torch.autograd.grad(aim, list(factors.values()), allow_unused=True)
                    gradients = {n: g for n, g in zip(factors, gradients, strict=True) if g is not None}
                    for name, gradient in mean_over_processes(gradients).items():
                        factors[name].grad = gradient
                    adam.step()
                    with torch.no_grad():
                        for factor in factors.values():
                            factor.clamp_(min=self.floor)
        finally:
            model.train(training)
        with torch.no_grad():
            parameters = dict(model.named_parameters())
            for name, factor in factors.items():
                parameters[name].mul_(factor)

    def objective(
        self,
        loss_at: Callable[[State, Batch], Tensor],
        now: State,
        trained: Sequence[str],
        masks: Mapping[str, Tensor],
        first: Batch,
        second: Batch,
    ) -> Tensor:
        """The gradient's length on the first batch where it is over gamma, else the second's loss one step ahead."""
        gradients = torch.autograd.grad(
            loss_at(now, first), [now[name] for name in trained], create_graph=True, allow_unused=True
        )
        found = {name: g for name, g in zip(trained, gradients, strict=True) if g is not None}
        found = {name: g * masks[name] if name in masks else g for name, g in found.items()}
        length = torch.stack([g.square().sum() for g in found.values()]).sum().sqrt()
        if length > self.gamma:
            return length
        ahead = {name: w - self.eta * found[name] / length if name in found else w for name, w in now.items()}
        return loss_at(ahead, second)


def scaled(model: nn.Module) -> list[str]:
    """Names of what gets a factor: the weights of convolutions and linear layers, and normalisation scales."""
    weights = {id(m.weight) for m in model.modules() if isinstance(m, MATRICES)}
    weights |= {id(norm.weight) for norm in norms(model) if norm.weight is not None}
    return [name for name, parameter in model.named_parameters() if id(parameter) in weights]
