"""Gates: parametrizations that compute a weight from a learned score. They live only inside a search.

A gate is attached with torch's parametrize, so that models which read ``layer.weight`` outside its forward see it too.
"""

from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..core import topk
from ..core.counting import wide
from ..core.private import changes_of, forget_flat_weights_
from ..distributed.fsdp2 import gathered, is_split
from .standardised import centred, deviations, prune_

# Of each module with gates: the order of its parameters, and a hook where it is recurrent.
_before: WeakKeyDictionary[nn.Module, tuple[list[str], Any]] = WeakKeyDictionary()


def new_scores(weight: Tensor, size: int | None = None) -> Tensor:
    """Zeros for a weight's scores, one each or as many as `size` says: as exact as the weight, at least float32."""
    return torch.zeros(weight.shape if size is None else size, dtype=torch.promote_types(weight.dtype, torch.float32))


class Gate(nn.Module):
    """``weight * scale * mask``, whose gradient reaches the scores straight through the mask.

    A method computes the mask from the scores after each step, and gives it to `Subnet.set_mask_`. With
    ``by_magnitude`` the gradient is ``dL/ds = sign(s) * w * scale * dL/d(w m)`` (Ramanujan et al. 2020, 1911.13299,
    with scores ranked by |s|), without it ``dL/ds = w * scale * dL/d(w m)`` (Zhang et al. 2021, 2104.08700).

    Args:
        score: Float; of the weight's shape, or flat, one for each True of ``free`` in memory order.
        mask: Bool, of the weight's shape: what is kept now.
        by_magnitude: Whether scores are ranked by their absolute value.
        free: Bool, of the weight's shape: what the search may still choose; everything where None. Frozen weights have
            no score at all, so they get no gradient and take no memory in the optimizer.

    Attributes:
        soft: Whether the weight passes a soft mask instead of the hard one; `Subnet.hard` says for how long it does
        not.
        standardised: Whether the layer standardises the weight: what passes has mean zero in each output channel then.
    """

    soft: bool = False
    standardised: bool = False
    mask: Tensor
    scale: Tensor
    free: Tensor | None

    def __init__(self, score: Tensor, mask: Tensor, by_magnitude: bool, free: Tensor | None = None):
        super().__init__()
        self.score = nn.Parameter(score)
        self.by_magnitude = by_magnitude
        # Not persistent: the mask is data of the search, and a state dict has no place for it.
        self.register_buffer("mask", mask.clone(), persistent=False)
        self.register_buffer("free", free, persistent=False)
        self.register_buffer("scale", torch.ones((), dtype=score.dtype), persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        through = self.by_magnitude, self.standardised
        return _Straight.apply(weight, self.scale, self.score, self.mask, self.free, *through)

    @torch.no_grad()
    def kept(self, weight: Tensor) -> Tensor:
        """What the mask keeps of the weight."""
        return (weight * self.scale).masked_fill(~self.mask, 0)

    @torch.no_grad()
    def hard(self, weight: Tensor) -> Tensor:
        """The weight that stays when the gate goes."""
        hard = weight * self.scale
        prune_(hard, self.mask, self.standardised)
        return hard

    def full_score(self) -> Tensor:
        """The scores in the weight's shape; zero where nothing is free."""
        score = gathered(self.score.detach())
        return (
            score
            if self.free is None
            else torch.zeros_like(self.mask, dtype=score.dtype).masked_scatter(self.free, score)
        )


def ranked_gate(weight: Tensor, pattern: tuple[Tensor, Tensor] | None = None) -> Gate:
    """A gate whose scores are ranked by magnitude and begin at zero.

    Args:
        weight: The weight that it is for.
        pattern: What leaves the search as pruned and as kept: bool, of its shape. Nothing does where None.
    """
    if pattern is None:
        return Gate(new_scores(weight), torch.ones(weight.shape, dtype=torch.bool), by_magnitude=True)
    pruned, locked = pattern
    free = ~(pruned | locked)
    return Gate(new_scores(weight, int(free.sum())), ~pruned, by_magnitude=True, free=free)


def scale_of(mask: Tensor) -> Tensor:
    """The factor that makes up for what a mask prunes, 1 / sqrt(density), where it is; 1 where it keeps nothing."""
    density = mask.sum().to(wide(mask.device)) / mask.numel()
    return torch.where(density > 0, 1 / density.sqrt(), 1.0)


class _Straight(torch.autograd.Function):
    """``weight * scale * mask``, whose gradient reaches the scores as if the mask were they.

    Nothing is kept for the backward pass but what is there. Where the layer standardises it, ``weight * scale`` is
    `centred`; the stretch is a constant to the backward, as standardising takes it out again.
    """

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, scale: Tensor, score: Tensor, mask: Tensor, free: Tensor | None, *how: bool
    ) -> Tensor:
        ctx.save_for_backward(weight, scale, score, mask, free)
        ctx.how = how
        scaled = weight * scale
        return (centred(scaled, mask)[0] if how[1] else scaled).mul_(mask)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        weight, scale, score, mask, free = ctx.saved_tensors
        by_weight, _, by_score, *_ = ctx.needs_input_grad
        by_magnitude, standardised = ctx.how
        scaled = weight * scale
        if standardised:
            gradient = deviations(gradient, mask)
            scaled, stretch = centred(scaled, mask)
            scale = scale * stretch
        to_weight = times(gradient * mask, scale) if by_weight else None
        if not by_score:
            return to_weight, *(None,) * 6
        to_score = times(scaled, gradient).to(score.dtype)
        to_score = to_score if free is None else only(to_score, free, score.numel())
        return to_weight, None, times(to_score, score.sgn()) if by_magnitude else to_score, *(None,) * 4


def times(made: Tensor, other: Tensor) -> Tensor:
    """Their product, in the memory of the first, unless it is to be differentiated."""
    return made * other if torch.is_grad_enabled() else made.mul_(other)


def only(values: Tensor, where: Tensor, count: int) -> Tensor:
    """The values where a mask is True, in memory order; it is known how many, so that no device is asked."""
    if topk.on_host(values):
        return values[where]
    place = torch.where(where, where.flatten().cumsum(0).view_as(where) - 1, count)
    return values.new_zeros(count + 1).scatter(0, place.flatten(), values.flatten())[:count]


class _Product(torch.autograd.Function):
    """``weight * scale * value``, whose backward makes ``weight * scale`` again instead of keeping it.

    Where the layer standardises it, ``weight * scale`` is `centred`; the stretch is a constant to the backward, as
    standardising takes it out again.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scale: Tensor, value: Tensor, standardised: bool) -> Tensor:
        ctx.save_for_backward(weight, scale, value if weight.requires_grad or standardised else None)
        ctx.standardised = standardised
        scaled = weight * scale
        return (centred(scaled, value)[0] if standardised else scaled).mul_(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, Tensor | None, None]:
        (gradient,) = gradients
        weight, scale, value = ctx.saved_tensors
        by_weight, _, by_value, _ = ctx.needs_input_grad
        scaled = weight * scale
        if ctx.standardised:
            gradient = deviations(gradient, value)
            scaled, stretch = centred(scaled, value)
            scale = scale * stretch
        return (
            times(gradient * value, scale) if by_weight else None,
            None,
            times(scaled, gradient) if by_value else None,
            None,
        )


class SigmoidSum(torch.autograd.Function):
    """The sum of ``sigmoid(beta * score)``, whose backward makes the sigmoids again instead of keeping them."""

    @staticmethod
    def forward(ctx: Any, beta: Tensor, score: Tensor) -> Tensor:
        ctx.save_for_backward(beta, score)
        return (beta * score).sigmoid_().sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        (gradient,) = gradients
        beta, score = ctx.saved_tensors
        soft = (beta * score).sigmoid_()
        return None, times(torch.ops.aten.sigmoid_backward(gradient.expand_as(soft), soft), beta)


class SigmoidGate(Gate):
    """``weight * scale * sigmoid(beta * score)`` in training and evaluation; ``weight * scale * mask`` if not soft.

    Source: Savarese et al. 2019, 1912.04427, section 3.

    Attributes:
        early: Whether the sum is made before the forward pass, which takes less memory; a captured step has to make it
            within.
    """

    beta: Tensor
    early: bool = True

    def __init__(self, score: Tensor, mask: Tensor):
        super().__init__(score, mask, by_magnitude=False)
        self.register_buffer("beta", torch.ones((), dtype=score.dtype), persistent=False)
        self.soft = True
        self._sum: tuple[Tensor, Any] | None = None

    def harden_(self, beta: float | Tensor) -> None:
        """Set beta for the next step; to what a tensor holds without reading it."""
        self.beta.fill_(beta)
        self._sum = None
        if is_split(self.score) or not self.early or torch.compiler.is_compiling():
            return
        # Backward goes by age. From a sum that is older than the forward pass it reaches the scores last, when the
        # layers have let go of what they held; otherwise all their gradients come first and wait beside that. So it is
        # for the first batch of a step; under accumulation the gradients wait there anyway.
        with torch.enable_grad():
            self._sum = SigmoidSum.apply(self.beta, self.score), self._now()

    def sum(self) -> Tensor:
        """The sum of ``sigmoid(beta * score)``, a scalar to go backward from."""
        if torch.compiler.is_compiling():
            return SigmoidSum.apply(self.beta, self.score)
        (early, then), self._sum = self._sum or (None, None), None
        if early is not None and then == self._now():
            return early
        return gathered(SigmoidSum.apply(self.beta, self.score))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_sum": None}  # what has a graph cannot be copied

    def _now(self) -> Any:
        # What the model is wrapped in, a move to a device or loaded scores may have changed.
        return id(self.score), self.score.device, changes_of(self.score), changes_of(self.beta)

    def forward(self, weight: Tensor) -> Tensor:
        value = (self.beta * self.score).sigmoid_() if self.soft else self.mask
        return _Product.apply(weight, self.scale, value.to(weight.dtype), self.standardised)


def harden_(gates: Mapping[str, Any], beta: float | Tensor) -> None:
    """Set beta of soft gates; a tensor's is not read."""
    for gate in gates.values():
        gate.harden_(beta)


def soft_sum(gates: Mapping[str, Any]) -> Tensor:
    """The sum of all soft masks, differentiable."""
    return torch.stack([gate.sum() for gate in gates.values()]).sum()


def put_gate_(module: nn.Module, leaf: str, gate: Gate) -> None:
    """Put a gate before a module's weight. Where modules share the weight, each gets the same gate."""
    if module not in _before:
        hook = module.register_forward_hook(forget_flat_weights_) if isinstance(module, nn.RNNBase) else None
        _before[module] = [name for name, _ in module.named_parameters(recurse=False, remove_duplicate=False)], hook
    parametrize.register_parametrization(module, leaf, gate, unsafe=True)


@torch.no_grad()
def take_gate_(module: Any, leaf: str, value: Tensor) -> None:
    """Take the gate away and give the weight this value; the parameter is the one from before the gate."""
    parametrize.remove_parametrizations(module, leaf, leave_parametrized=False)
    module.get_parameter(leaf).copy_(value)
    if isinstance(module, nn.RNNBase):
        setattr(module, leaf, module.get_parameter(leaf))  # into the list that its forward reads
    if not parametrize.is_parametrized(module):
        order, hook = _before.pop(module)
        # Removing put the weight behind the bias, and optimizer states are saved by position.
        found = {name: module.get_parameter(name) for name in order}
        for name, parameter in found.items():
            delattr(module, name)
            module.register_parameter(name, parameter)
        if hook is not None:
            hook.remove()
