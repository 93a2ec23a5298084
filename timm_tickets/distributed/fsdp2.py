"""FSDP2: whole tensors of what is split over the processes, and each process's parts of whole tensors.

A model that ``fully_shard`` has split holds DTensors under the names it had before. Masks are cut from whole scores, so
every process gathers them and cuts the same, exactly as one process would; it then holds its own part of every mask.
What makes whole tensors is a collective: all processes have to call it.
"""

from collections.abc import Mapping
from inspect import signature
from typing import Any, TypeGuard

import torch.distributed
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from ..core.errors import SettingError
from ..core.private import forget_biases_


def is_split(tensor: Any) -> TypeGuard[DTensor]:
    """Whether this process holds only a part of the tensor."""
    return isinstance(tensor, DTensor)


def gathered(tensor: Tensor) -> Tensor:
    """The whole of a tensor, on its device; gradients flow through. Itself where it is not split."""
    return tensor.full_tensor() if is_split(tensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds, sharing its memory; itself where it is not split."""
    return tensor.to_local() if is_split(tensor) else tensor


def split_as(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor split as another one is, on its device; on that device alone where the other is not split."""
    if not is_split(like):
        return tensor.to(like.device)
    # Every process has all of it; torch 2.6 cannot be told, and sends the parts from the first one.
    told = {"src_data_rank": None} if "src_data_rank" in signature(distribute_tensor).parameters else {}
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, **told)


def shard_of(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's part of a whole tensor, as `like` is split; all of it, on that device, where it is not."""
    return local(split_as(tensor, like))


def reshard_(model: nn.Module) -> bool:
    """Let the model hold its parts again: a forward pass without a backward one leaves whole copies in their place.

    Returns:
        Whether FSDP2 has split the model.
    """
    if not torch.distributed.is_initialized():
        return False
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    return any(map(is_split, model.parameters()))


def load_state_(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load a state dict of whole tensors, as ``load_state_dict`` does."""
    reshard_(model)
    own = model.state_dict()
    model.load_state_dict({n: split_as(v, own[n]) if is_split(own.get(n)) else v for n, v in state.items()})
    forget_biases_(model)


def optimizer_state(optimizer: Any) -> dict[str, Any]:
    """The state dict of an optimizer, whole: what is split is gathered on the CPU.

    Torch's own ``get_optimizer_state_dict`` would take a step with gradients of zero where there is no state yet, and
    with it all that a search does after a step.
    """
    state = optimizer.state_dict()
    slots = {i: {key: _on_cpu(value) for key, value in slot.items()} for i, slot in state["state"].items()}
    return {**state, "state": slots}


def load_optimizer_state_(optimizer: Any, state: Mapping[str, Any]) -> None:
    """Load a whole state dict: what belongs to a split parameter, and has its shape, is split like it."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    slots = {
        i: {key: split_as(v, parameters[i]) if _belongs(v, parameters[i]) else v for key, v in slot.items()}
        for i, slot in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": slots})


def _on_cpu(value: Any) -> Any:
    return gathered(value).cpu() if is_split(value) else value


def _belongs(value: Any, parameter: Tensor) -> bool:
    return is_split(parameter) and getattr(value, "shape", None) == parameter.shape


def check_supported(model: nn.Module) -> None:
    """Refuse a model whose weights cannot be reached by their names and shapes, or that torch cannot train.

    Raises:
        SettingError: DeepSpeed or FSDP1 has taken its parameters apart, or FSDP2 of torch 2.6 has split it over CPUs.
    """
    instead = (
        "use DDP, or FSDP2 (torch's fully_shard; `fsdp_version: 2` in Accelerate's configuration), which keeps every "
        "weight under its name; or train the search without and only its ticket's final training with it"
    )
    names = {kind.__module__.split(".")[0] for kind in type(model).__mro__}
    if "deepspeed" in names or any(hasattr(p, "ds_id") for p in model.parameters()):
        raise SettingError(
            f"model: DeepSpeed holds its weights in flat partitions, where no mask can be kept; {instead}"
        )
    if any(type(m).__name__ == "FullyShardedDataParallel" for m in model.modules()):
        raise SettingError(f"model: FSDP1 joins weights into flat parameters, where no mask can be kept; {instead}")
    # FSDP2 asks a CPU's stream for events, which it has since torch 2.7.
    meshes = {p.device_mesh.device_type for p in model.parameters() if is_split(p)}
    if "cpu" in meshes and torch.__version__ < "2.7":
        raise SettingError(
            f"model: FSDP2 has split it over CPUs, where torch {torch.__version__} cannot train it; use torch 2.7 or "
            "later, or DDP"
        )
