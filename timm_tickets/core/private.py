"""All that leans on private parts of other libraries, each with its reason; tests/test_private.py holds them to it."""

from collections.abc import Callable
from contextlib import suppress
from types import FunctionType
from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState
from torch import Tensor, nn

# Accelerate


def accelerate_states() -> tuple[dict[str, Any], dict[str, Any]]:
    """The dictionaries that all of Accelerate's states share: there is no public way to say how many processes work
    together for a while.
    """
    return PartialState._shared_state, AcceleratorState._shared_state


def allow_precision(precision: str) -> None:
    """Let the next Accelerator have this mixed precision.

    Accelerate fixes it once a process, and a second search in one may want another.
    """
    if AcceleratorState._shared_state.get("_mixed_precision", precision) != precision:
        AcceleratorState._reset_state()


def forget_loaders_(accelerator: Any) -> None:
    """Have an Accelerator let go of the loaders that it has prepared: it keeps all, and each run prepares one.

    Its public ``free_memory`` would let go of the model too.
    """
    accelerator._dataloaders.clear()


# torch


def set_world_(group: Any) -> None:
    """Make a process group the default one, that DDP and collectives take: torch has a public way to read it only."""
    torch.distributed.group.WORLD = group


def changes_of(tensor: Tensor) -> int:
    """How often a tensor was changed in place: autograd's own counter, which tells a value made before from one now."""
    return tensor._version


def inside_compiled(model: nn.Module) -> nn.Module | None:
    """The model inside ``torch.compile``'s wrapper, None where there is none; importing the wrapper's class is slow."""
    return getattr(model, "_orig_mod", None)


# What torch.compile raises where it cannot make one graph of a function; nothing of that has been carried out then.
def untraceable() -> type[Exception]:
    from torch._dynamo.exc import TorchDynamoException  # slow

    return TorchDynamoException


def traces_gradients() -> bool:
    """Whether torch.compile follows ``torch.autograd.grad``, as it is told to: 2.15 does, 2.6 does not."""
    from torch._dynamo import config

    return hasattr(config, "trace_autograd_ops")


def compiled(function: Callable[..., Any], backend: Any, one_graph: bool) -> Callable[..., Any]:
    """A bound method compiled, gradients that it takes by ``torch.autograd.grad`` included.

    Of a torch that `traces_gradients`. All functions of the same code share a small number of graphs, after which torch
    compiles no more: so this one gets a code of its own.

    Raises:
        TorchDynamoException: When it is called: it cannot be made one graph, and has to be.
    """
    from torch._dynamo import config

    bound: Any = function
    inner = bound.__func__
    own = FunctionType(inner.__code__.replace(), inner.__globals__, inner.__name__, inner.__defaults__)
    made = torch.compile(own.__get__(bound.__self__), backend=backend, fullgraph=one_graph, dynamic=False)

    def traced(*args: Any) -> Any:
        with config.patch(trace_autograd_ops=True):
            return made(*args)

    return traced


def forget_capture_(device: torch.device, pool: Any) -> None:
    """Let go of a CUDA graph whose recording has failed: torch leaves that to whoever ends the process.

    Its generator would refuse every further draw on the card, and its allocator no longer give memory back.
    """
    number = torch.cuda.current_device() if device.index is None else device.index
    generator = torch.cuda.default_generators[number]
    generator.graphsafe_set_state(generator.clone_state())
    with suppress(RuntimeError):  # where the recording was ended, it has been told
        torch._C._cuda_endAllocateToPool(number, pool)  # pyright: ignore[reportAttributeAccessIssue]


def forget_flat_weights_(module: Any, *_: Any) -> None:
    """A recurrent module keeps the weights it last read; behind gates those have a graph, and cannot be deep-copied."""
    module._flat_weights = [None if weight is None else weight.detach() for weight in module._flat_weights]


# timm


def inside_lookahead(optimizer: Any) -> Any:
    """The optimizer inside timm's Lookahead, whose own hooks never fire; None for others."""
    return getattr(optimizer, "_base_optimizer", None)


def forget_biases_(model: nn.Module) -> None:
    """Have LeViT, TinyViT and their like read their attention biases again: scored once, they keep what they made of
    them until they are trained, also when other weights are loaded meanwhile.
    """
    for module in model.modules():
        if cache := vars(module).get("attention_bias_cache"):
            cache.clear()


# torch-pruning


def regulariser(kind: Any, graph: Any, groups: list[Any], importance: Any, **settings: Any) -> Any:
    """One of torch-pruning's regularising pruners over groups that it has not found itself.

    Its constructor would build its own graph of the model; what its ``regularize`` reads is set instead.

    Args:
        kind: The class.
        graph: An empty ``torch_pruning.DependencyGraph``.
        groups: Groups of torch-pruning's.
        importance: What it ranks their channels by.
        **settings: Its own, under the names that it keeps them by.
    """
    made = kind.__new__(kind)
    made.DG, made.importance, made.ignored_layers, made._groups = graph, importance, [], groups
    made.in_channel_groups, made.out_channel_groups = {}, {}
    for name, value in settings.items():
        setattr(made, name, value)
    return made


def graph_of(group: Any) -> Any:
    """The dependency graph that a group of torch-pruning's is of: what names its layers."""
    return group._DG
