"""Holding masks: two hooks that keep pruned weights exactly zero while an optimizer steps."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from ..distributed.fsdp2 import is_split, local, shard_of
from .named_weights import NamedWeights
from .optimizers import after_slow, after_step, plain_optimizer
from .standardised import deviations

# The hooks now on each model, so that whoever attaches next takes over instead of adding a second set.
_hooks: WeakKeyDictionary[nn.Module, list[Any]] = WeakKeyDictionary()


class GradientTap:
    """Keeps gradients as they were before the mask, after the steps for which a method opens it.

    Attributes:
        open: Whether the next step's gradients are kept.
        kept: The gradients, by name: on the CPU, or split as FSDP2 has split them.
    """

    def __init__(self) -> None:
        self.open = False
        self.kept: dict[str, Tensor] = {}
        self._of: dict[str, Any] = {}  # the gradients that these are copies of, as weak references

    def close_(self) -> None:
        """Keep no more, and let go of what was kept."""
        self.open = False
        self.kept.clear()

    def keep_(self, name: str, gradient: Tensor, held: Tensor | None) -> None:
        """Keep a gradient from before it is masked.

        Args:
            name: The weight's.
            gradient: Its gradient; under accumulation, with what earlier batches have left of it.
            held: Its mask on the gradient's device; None where it keeps everything.
        """
        dense = gradient.detach()
        # A gradient scaler may skip the step, and what it could not use would stay: the next gradient is another one.
        before = self._of.get(name, lambda: None)()
        if name in self.kept and (before is not gradient or not local(self.kept[name]).isfinite().all()):
            del self.kept[name]
        self._of[name] = ref(gradient)
        # Under accumulation, what was pruned has lost its earlier batches to the mask.
        if held is not None and name in self.kept:
            dense = dense.clone()
            local(dense).add_(local(self.kept[name]).to(held.device) * ~held)
        # On the host, where it will be ranked: a copy on the device would take as much as the gradient itself.
        self.kept[name] = dense.clone() if is_split(dense) else dense.to("cpu", copy=True)


class Holder:
    """Masks the gradients of a model's weights as they come, and the weights after every step.

    Both are needed to equal a parametrized mask bit for bit: with the gradient alone, momentum and decay move pruned
    weights; with the weight alone, gradient clipping has counted their gradients in the norm.

    Args:
        weights: The model's prunable weights; hooks that are on it should have been removed (`release_`). Behind gates
            nothing is held: they do it themselves.
        masks: Bool, the masks to hold, by name. What they keep of a standardised weight is held at mean zero.
        tap: Given the gradients before they are masked, while it is open.
        optimizer: A torch optimizer, or Accelerate's or Lookahead's wrapper of one.
        then: Called after each optimizer step, once the masks are applied.
        before: Called before each, inside any wrapper: what a gradient scaler unscales is unscaled then.
        hooks: Whether hooks do this; else whoever steps calls `mask_gradients_` and `mask_weights_`, and ``then`` and
            ``before`` too.

    Raises:
        ValueError: The optimizer trains another model.
    """

    def __init__(
        self,
        weights: NamedWeights,
        masks: Mapping[str, Tensor],
        tap: GradientTap,
        optimizer: Any,
        then: Callable[[], None] | None = None,
        before: Callable[[], None] | None = None,
        hooks: bool = True,
    ):
        model = weights.model
        weights.check_supported()  # again: it may have been prepared since
        self._weights, self._tap = weights, tap
        now = weights.parameters()  # FSDP2 replaces the objects
        _check_optimizer(model, optimizer)
        self._held: dict[str, Tensor] = {}  # on the weights' devices
        self.take_(masks)
        self._trained = {n: p for n, p in now.items() if p.requires_grad and n not in weights.gates}
        self._all = None if hooks else now
        _hooks[model] = self._hooks(optimizer, then, before) if hooks else []

    def _hooks(self, optimizer: Any, then: Callable[[], None] | None, before: Callable[[], None] | None) -> list[Any]:
        hooks: list[Any] = [
            parameter.register_post_accumulate_grad_hook(partial(self._mask_gradient, name))
            for name, parameter in self._trained.items()
        ]
        plain = plain_optimizer(optimizer)
        if before is not None:
            hooks.append(plain.register_step_pre_hook(lambda *_: before()))
        hooks.append(plain.register_step_post_hook(self.mask_weights_))
        # Slow weights remember what a mask that has since moved let through.
        hooks += after_slow(optimizer, self.mask_weights_)
        if then is not None:
            hooks.append(after_step(optimizer, then))
        return hooks

    def take_(self, masks: Mapping[str, Tensor]) -> None:
        """Hold these masks from here on, beside those held already: themselves, or this process's parts."""
        gated = self._weights.gates
        parameters = self._weights.parameters() if masks else {}
        for name, mask in masks.items():
            if name not in gated:
                part = shard_of(mask, parameters[name])
                if name in self._held and is_split(parameters[name]):
                    self._held[name].copy_(part)
                else:
                    self._held[name] = part

    def shares(self, other: "Holder | None") -> bool:
        """Whether another one holds the very same masks, in the same memory: not only equal ones."""
        if other is None or self._held.keys() != other._held.keys():
            return False
        return all(mask is other._held[name] for name, mask in self._held.items())

    @torch.no_grad()
    def mask_gradients_(self) -> None:
        """Mask the gradients, after each backward pass, where no hooks do."""
        for name, parameter in self._trained.items():
            self._mask_gradient(name, parameter)

    def _mask_gradient(self, name: str, parameter: Tensor) -> None:
        # This hook must return None.
        if parameter.grad is None:
            return
        held = self._on(parameter.grad.device, name) if name in self._held else None
        if self._tap.open:
            self._tap.keep_(name, parameter.grad, held)
        if held is not None:
            self._hold_(name, parameter.grad, held)

    @torch.no_grad()
    def mask_weights_(self, *_: Any) -> None:
        """Mask the weights, after each step, where no hooks do."""
        # After a step FSDP2's parameters are parts already, and to make sure would walk through the whole model.
        parameters = self._all or dict(self._weights.model.named_parameters())
        for name in self._held:
            weight = parameters[name].detach()
            self._hold_(name, weight, self._on(weight.device, name))

    def _hold_(self, name: str, tensor: Tensor, held: Tensor) -> None:
        # On CPUs a product with a bool mask is vectorised, masked_fill_ is not.
        part = local(tensor).mul_(held)
        if name in self._weights.standardised:
            part.copy_(deviations(part, held)).mul_(held)

    def _on(self, device: torch.device, name: str) -> Tensor:
        held = self._held[name]
        if held.device != device:  # the model moved after it was attached
            held = self._held[name] = held.to(device)
        return held


def is_held(model: nn.Module) -> bool:
    """Whether hooks are on a model, whoever put them there."""
    return bool(_hooks.get(model))


def release_(model: nn.Module) -> None:
    """Remove the hooks on a model, whoever put them there. The weights stay as they are."""
    for hook in _hooks.pop(model, []):
        hook.remove()


def _check_optimizer(model: nn.Module, optimizer: Any) -> None:
    stepped = {id(p): p for group in plain_optimizer(optimizer).param_groups for p in group["params"]}
    own = {id(p): p for p in model.parameters()}
    strange = [p for key, p in stepped.items() if key not in own]
    missing = {p.shape for key, p in own.items() if key not in stepped and is_split(p)}
    if any(p.shape in missing and not is_split(p) for p in strange):
        raise ValueError(
            "optimizer: it has whole copies of parameters that FSDP2 has split, as they stand in the model after a "
            "forward pass without a backward one; build it before, or call `model.reshard()` first"
        )
    if len(strange) == len(stepped):
        raise ValueError(
            "optimizer: it has none of this model's parameters, so it would train another model; "
            "build it from the parameters of the model that the pruner was created with"
        )
