"""A step that asks the device nothing: what would make a card wait is an error, here where no card is.

`asks_nothing` refuses it while tensors are on the CPU; what the CPU would do faster by asking itself takes the card's
way meanwhile. `on_card_` and `Card` go further: a model's tensors say that they are on another device, are computed by
the CPU, and must not meet a tensor of the CPU unless it is a single number.
"""

import sys
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_iter, tree_map

# Kernels whose output's shape depends on values, or that give a number to the host: a card is waited for.
ASKS = {
    *("_local_scalar_dense", "item", "is_nonzero", "equal", "allclose"),
    *("nonzero", "nonzero_numpy", "argwhere", "masked_select", "masked_scatter_backward", "bincount"),
    *("_unique", "_unique2", "unique_dim", "unique_consecutive", "unique_dim_consecutive"),
}
# What a tensor on the CPU does without any kernel, and one on a card by a copy.
COPIES = ("cpu", "numpy", "tolist", "item", "__bool__", "__int__", "__float__", "__index__", "__array__")


class Refusing(TorchDispatchMode):
    """Refuses kernels that make the host wait, and copies from one device to another."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        refuse(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


def refuse(func, args, kwargs):
    """Raise where this kernel would make the host wait for a card."""
    name = func.overloadpacket.__name__
    given = [one for one in tree_iter((args, kwargs)) if isinstance(one, Tensor)]
    by_mask = name in ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index") and any(
        isinstance(one, Tensor) and one.dtype in (torch.bool, torch.uint8) for one in args[1]
    )
    repeats = name == "repeat_interleave" and kwargs.get("output_size") is None and func._overloadname == "Tensor"
    moves = name == "_to_copy" and kwargs.get("device") not in (None, given[0].device)
    moves |= name in ("copy_", "copy", "_copy_from") and len({one.device for one in given[:2]}) > 1
    if name in ASKS or by_mask or repeats or moves:
        raise AssertionError(f"{func} within a step: a card would be waited for")


def _refused(name):
    def method(self, *args, **kwargs):
        raise AssertionError(f"Tensor.{name} within a step: a card would be waited for")

    return method


def _to(self, *args, old=Tensor.to, **kwargs):
    if "cpu" in [one for one in (*args, kwargs.get("device")) if isinstance(one, str)]:
        raise AssertionError("Tensor.to('cpu') within a step: a card would be waited for")
    return old(self, *args, **kwargs)


@contextmanager
def asks_nothing():
    """Within the block, whatever would wait for a card or copy between devices raises AssertionError."""
    with ExitStack() as stack:
        for name in COPIES:
            stack.enter_context(patch.object(Tensor, name, _refused(name)))
        stack.enter_context(patch.object(Tensor, "to", _to))
        for module in [one for name, one in sys.modules.items() if name.startswith("timm_tickets.")]:
            if hasattr(module, "on_host"):
                stack.enter_context(patch.object(module, "on_host", lambda _: False))
        stack.enter_context(Refusing())
        yield


# No accelerator's name: torch would look for one.
CARD = torch.device("meta")


class OnCard(Tensor):
    """A tensor that says it is on `CARD`, and whose values are in ``content``, on the CPU."""

    is_meta = False  # such a tensor has no values, and a model of them is refused

    @staticmethod
    def __new__(cls, content, requires_grad=False):
        out = Tensor._make_wrapper_subclass(
            cls,
            content.shape,
            strides=content.stride(),
            storage_offset=content.storage_offset(),
            dtype=content.dtype,
            device=CARD,
            requires_grad=requires_grad,
        )
        out.content = content
        return out

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func} outside of `Card`")

    def __deepcopy__(self, memo):
        out = self.detach().clone().requires_grad_(self.requires_grad)
        out._is_param = getattr(self, "_is_param", False)
        memo[id(self)] = out
        return out

    def __repr__(self, **_):
        return f"OnCard({self.content})"


def is_there(args, kwargs):
    """Whether a kernel computes what is on `CARD`."""
    if kwargs.get("device") is not None:
        return torch.device(kwargs["device"]) == CARD
    return any(isinstance(one, OnCard) for one in tree_iter((args, kwargs)))


def computed(func, args, kwargs):
    """What a kernel gives, computed by the CPU."""
    there = is_there(args, kwargs)
    inner_args, inner_kwargs = tree_map(lambda one: one.content if isinstance(one, OnCard) else one, (args, kwargs))
    if there and kwargs.get("device") is not None:
        inner_kwargs["device"] = torch.device("cpu")
    out = func(*inner_args, **inner_kwargs)
    if there:
        out = tree_map(lambda one: OnCard(one) if isinstance(one, Tensor) else one, out)
    given = any(isinstance(one, Tensor) for one in tree_iter((args, kwargs)))
    return return_and_correct_aliasing(func, args, kwargs, out) if there and given else out


class Card(TorchDispatchMode):
    """Computes what is on `CARD`, by the CPU; outside of `step` it may be copied from and asked."""

    def __init__(self):
        super().__init__()
        self.strict = False

    @contextmanager
    def step(self):
        """Within the block nothing is asked, and no tensor of the CPU but a number is met."""
        self.strict = True
        try:
            yield
        finally:
            self.strict = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.strict:
            refuse(func, args, kwargs)
            given = [one for one in tree_iter((args, kwargs)) if isinstance(one, Tensor)]
            if is_there(args, kwargs) and any(not isinstance(one, OnCard) and one.dim() for one in given):
                raise AssertionError(f"{func} of tensors on two devices")
        return computed(func, args, kwargs)


def on_card_(model: nn.Module) -> nn.Module:
    """Put a model's tensors on `CARD`; it and all that follows is computed within `Card`."""
    for module in model.modules():
        for name, value in list(module.named_parameters(recurse=False)):
            module._parameters[name] = nn.Parameter(value.detach().to(CARD), value.requires_grad)
        for name, value in list(module.named_buffers(recurse=False)):
            module._buffers[name] = value.to(CARD)
    return model
