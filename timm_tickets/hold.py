"""Holding masks: two hooks that keep pruned weights exactly zero while an optimizer steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from .sharded import check_supported, is_split, local, part
from .wrappers import after_slow, after_step, plain_optimizer

if TYPE_CHECKING:
    from .subnet import Subnet

# The hooks now on each model, so that whoever attaches next takes over instead of adding a second set.
_hooks: WeakKeyDictionary[nn.Module, list[Any]] = WeakKeyDictionary()


class Holder:
    """Masks the gradients of a subnet's weights as they come, and the weights after every step.

    Both are needed to equal a parametrized mask bit for bit: with the gradient alone, momentum and decay move pruned
    weights; with the weight alone, gradient clipping has counted their gradients in the norm.

    Args:
        subnet: The subnet, released; behind gates nothing is held, they do it themselves.
        optimizer: A torch optimizer, or Accelerate's or Lookahead's wrapper of one.
        then: Called after each optimizer step, once the masks are applied.

    Raises:
        ValueError: The optimizer trains another model.
    """

    def __init__(self, subnet: Subnet, optimizer: Any, then: Callable[[], None] | None = None):
        check_supported(subnet.model)  # again: it may have been prepared since
        self.subnet = subnet
        parameters = subnet.parameters()
        _check_optimizer(subnet.model, optimizer)
        self._held: dict[str, Tensor] = {}  # on the weights' devices
        self._kept_of: dict[str, Any] = {}  # the gradients that `dense_gradients` remembers, as weak references
        self.take_(subnet.mask)
        hooks: list[Any] = [
            parameter.register_post_accumulate_grad_hook(partial(self._mask_gradient, name))
            for name, parameter in parameters.items()
            if parameter.requires_grad and name not in subnet.gates
        ]
        hooks.append(plain_optimizer(optimizer).register_step_post_hook(self._mask_weights))
        # Slow weights remember what a mask that has since moved let through.
        hooks += after_slow(optimizer, self._mask_weights)
        if then is not None:
            hooks.append(after_step(optimizer, then))
        _hooks[subnet.model] = hooks

    def take_(self, masks: Mapping[str, Tensor]) -> None:
        """Hold these masks from here on. A layer that keeps everything needs none."""
        gates = self.subnet.gates
        moved = {n: mask for n, mask in masks.items() if n not in gates and (n in self._held or not bool(mask.all()))}
        if not moved:  # as after every step behind gates
            return
        parameters = self.subnet.parameters()
        for name, mask in moved.items():
            now = part(mask, parameters[name])
            if name in self._held:
                self._held[name].copy_(now)
            else:
                self._held[name] = now.clone()

    def _mask_gradient(self, name: str, parameter: Tensor) -> None:
        # This hook must return None. On CPUs a product with a bool mask is vectorised, masked_fill_ is not.
        if parameter.grad is None:
            return
        held = self._on(parameter.grad.device, name) if name in self._held else None
        if self.subnet.tap:
            self._keep(name, parameter.grad, held)
        if held is not None:
            local(parameter.grad).mul_(held)

    def _keep(self, name: str, gradient: Tensor, held: Tensor | None) -> None:
        """Remember a gradient from before it is masked."""
        dense = gradient.detach()
        kept = self.subnet.dense_gradients
        # A gradient scaler may skip the step, and what it could not use would stay: the next gradient is another one.
        before = self._kept_of.get(name, lambda: None)()
        if name in kept and (before is not gradient or not local(kept[name]).isfinite().all()):
            del kept[name]
        self._kept_of[name] = ref(gradient)
        # Under accumulation, what was pruned has lost its earlier batches to the mask.
        if held is not None and name in kept:
            dense = dense.clone()
            local(dense).add_(local(kept[name]).to(held.device) * ~held)
        # On the host, where it will be ranked: on the device it would be a second gradient beside the masked one.
        kept[name] = dense.clone() if is_split(dense) else dense.to("cpu", copy=True)

    @torch.no_grad()
    def _mask_weights(self, *_: Any) -> None:
        # After a step FSDP2's parameters are parts already, and to make sure would walk through the whole model.
        parameters = dict(self.subnet.model.named_parameters())
        for name in self._held:
            weight = parameters[name].detach()
            local(weight).mul_(self._on(weight.device, name))

    def _on(self, device: torch.device, name: str) -> Tensor:
        held = self._held[name]
        if held.device != device:  # the model moved after it was attached
            held = self._held[name] = held.to(device)
        return held


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
