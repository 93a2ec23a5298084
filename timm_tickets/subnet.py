"""Subnet: a model, its mask and its rewind point, addressed by parameter name.

The invariant it keeps: outside a search that learns its masks, the model is a plain timm model whose pruned weights
are exactly zero. Nothing is wrapped and no key is renamed; two hooks do the work while an optimizer steps.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .masks import Masks, full_masks, sparsity
from .wrappers import StepHook, plain_model, plain_optimizer

State = dict[str, Tensor]

# The hooks now on each model, so that whoever attaches next takes over instead of adding a second set.
_hooks: WeakKeyDictionary[nn.Module, list[Any]] = WeakKeyDictionary()


class Subnet:
    """A model with a mask over its prunable weights and the state they rewind to.

    Args:
        model: The model, wrapped or not; it is changed in place.
        names: Names of the prunable weights.

    Attributes:
        model: The plain model.
        names: Names of the prunable weights, in the model's order.
        start: The rewind point: a state dict on the CPU. None until a pruner sets it.
        notes: What a method has to tell of its search, one record after the other, in JSON types; kept in the ticket.
        dense_gradients: The last step's gradients before they were masked, by name, while `tap` is set.
        tap: Whether to keep them: a method that grows weights sets it for the step before it looks.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]):
        self.model = plain_model(model)
        self.names = tuple(names)
        self.start: State | None = None
        self.notes: list[dict[str, Any]] = []
        self.tap = False
        self.dense_gradients: dict[str, Tensor] = {}
        self._mask = full_masks(self.weights())
        self._held: Masks = {}  # copies on the weights' devices, only while hooks hold the masks

    def parameters(self) -> dict[str, nn.Parameter]:
        """The prunable parameters by name, looked up afresh: wrappers such as FSDP2 replace the objects."""
        parameters = dict(self.model.named_parameters())
        return {name: parameters[name] for name in self.names}

    def weights(self) -> dict[str, Tensor]:
        """The prunable weights, detached, not copied."""
        return {name: parameter.detach() for name, parameter in self.parameters().items()}

    def weights_on_cpu(self) -> dict[str, Tensor]:
        """The prunable weights on the CPU, where scores are compared."""
        return {name: weight.cpu() for name, weight in self.weights().items()}

    @property
    def mask(self) -> Masks:
        """The present mask, bool on the CPU; replace it with `set_mask_`."""
        return self._mask

    @property
    def sparsity(self) -> float:
        """Fraction of the prunable weights now pruned, in [0, 1)."""
        return sparsity(self._mask)

    def set_mask_(self, masks: Mapping[str, Tensor]) -> None:
        """Replace the mask and zero what it prunes. During a run the hooks follow from the next step on."""
        self._mask = {name: masks[name].detach().to("cpu", torch.bool) for name in self.names}
        for name, held in self._held.items():
            held.copy_(self._mask[name])
        self.apply_()

    @torch.no_grad()
    def apply_(self) -> None:
        """Set every pruned weight to exactly zero."""
        for name, weight in self.weights().items():
            weight.masked_fill_(~self._mask[name].to(weight.device), 0)

    def state(self) -> State:
        """A copy of the whole state dict, contiguous, on the CPU."""
        return {
            name: value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
            for name, value in self.model.state_dict().items()
        }

    def load_(self, state: Mapping[str, Tensor]) -> None:
        """Copy a state into the model, in place, and apply the mask."""
        self.model.load_state_dict(state)
        self.apply_()

    def rewind_(self) -> None:
        """Return to the rewind point: weights, biases, normalisation and buffers; then apply the mask."""
        if self.start is None:
            raise RuntimeError("the subnet has no rewind point yet; a pruner sets `start` when its search begins")
        self.load_(self.start)

    def hold_(self, optimizer: Any, after_step: Callable[[], None] | None = None) -> None:
        """Keep pruned weights exactly zero from here on: their gradients before, their values after every step.

        Both are needed to equal a parametrized mask bit for bit: with the gradient alone, momentum and decay move
        pruned weights; with the weight alone, gradient clipping has counted their gradients in the norm.

        Args:
            optimizer: A torch optimizer, or Accelerate's or Lookahead's wrapper of one.
            after_step: Called after each optimizer step, once the masks are applied.

        Raises:
            ValueError: The optimizer trains another model.
        """
        self.release_()
        stepped = {id(p) for group in plain_optimizer(optimizer).param_groups for p in group["params"]}
        if not any(id(p) in stepped for p in self.model.parameters()):
            raise ValueError(
                "optimizer: it has none of this model's parameters, so it would train another model; "
                "build it from the parameters of the model that the pruner was created with"
            )
        parameters = self.parameters()
        self._held = {name: self._mask[name].to(parameter.device, copy=True) for name, parameter in parameters.items()}
        hooks: list[Any] = [
            parameter.register_post_accumulate_grad_hook(partial(self._mask_gradient, name))
            for name, parameter in parameters.items()
            if parameter.requires_grad
        ]

        @torch.no_grad()
        def mask_weights(*_: Any) -> None:
            for name, weight in self.weights().items():
                weight.mul_(self._held_on(weight.device, name))

        hooks.append(plain_optimizer(optimizer).register_step_post_hook(mask_weights))
        if after_step is not None:
            hooks.append(StepHook(optimizer, after_step))
        _hooks[self.model] = hooks

    def _mask_gradient(self, name: str, parameter: Tensor) -> None:
        # This hook must return None. On CPUs a product with a bool mask is vectorised, masked_fill_ is not.
        if parameter.grad is not None:
            if self.tap:
                self.dense_gradients[name] = parameter.grad.detach().clone()
            parameter.grad.mul_(self._held_on(parameter.grad.device, name))

    def _held_on(self, device: torch.device, name: str) -> Tensor:
        held = self._held[name]
        if held.device != device:  # the model moved after it was attached
            held = self._held[name] = held.to(device)
        return held

    def release_(self) -> None:
        """Remove the hooks on this model, whoever put them there. The weights stay as they are."""
        for hook in _hooks.pop(self.model, []):
            hook.remove()
        self._held = {}
        self.dense_gradients = {}
        self.tap = False
