"""A batch's loss once more, in full precision, for methods that differentiate it themselves."""

from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from accelerate.utils import recursively_apply
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel


class LossAgain:
    """Sees what a model is given, and can give the loss of it again from a forward pass of its own.

    Args:
        name: The run's, in messages.
        model: The plain model.
    """

    def __init__(self, name: str, model: nn.Module):
        self._name, self._model, self._inputs = name, model, None
        self._hook = model.register_forward_pre_hook(self._see, with_kwargs=True)

    def remove_(self) -> None:
        """See no more, and let go of the last batch."""
        self._hook.remove()
        self._inputs = None

    def _see(self, _: Any, args: Any, kwargs: Any) -> None:
        if torch.is_grad_enabled():
            self._inputs = args, kwargs

    def output(self, temperature: float) -> Any:
        """The present batch's logits, in the weights' precision, divided by a temperature.

        Raises:
            RuntimeError: The model was not called, or only compiled.
        """
        if self._inputs is None:
            raise RuntimeError(
                f"{self._name} reads gradients and has not seen the model's inputs: call the model that the pruner was "
                "created with, not compiled, before `run.loss`"
            )
        model: Any = self._model
        weight = next(model.parameters())

        def fitting(value: Tensor) -> Tensor:
            return value.to(weight.dtype) if value.is_floating_point() else value

        args, kwargs = recursively_apply(fitting, self._inputs)
        # Not the instance's own: Accelerate has put one there that casts.
        output = type(model).forward(model, *args, **kwargs)
        return recursively_apply(lambda logits: logits / temperature, output, error_on_other_type=True)


@contextmanager
def exact_derivatives(device: torch.device) -> Any:
    """Within the block nothing is cast, and attention has a second derivative; backward passes are cast as well."""
    casts = torch.amp.is_autocast_available(device.type)
    with torch.autocast(device.type, enabled=False) if casts else nullcontext(), sdpa_kernel(SDPBackend.MATH):
        yield
