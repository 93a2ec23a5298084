"""What the processes give one another: means, the first one's values, and whether they agree."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch.distributed
from torch import Tensor, nn

from .fsdp2 import gathered, is_split
from .processes import world_size


def mean_over_processes(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The mean of tensors that each process has its own of; themselves where there is one process.

    What FSDP2 has split it has also averaged: that is gathered.
    """
    if world_size() == 1:
        return dict(tensors)
    out: dict[str, Tensor] = {}
    for name in sorted(tensors):
        if is_split(tensors[name]):
            out[name] = gathered(tensors[name].detach()).cpu()
            continue
        out[name] = tensors[name].detach().clone()
        torch.distributed.all_reduce(out[name])
        out[name] /= world_size()
    return {name: out[name] for name in tensors}


@torch.no_grad()
def share_(tensors: Iterable[Tensor]) -> None:
    """Give every process the first one's values of these tensors, in place. Every process has to call this."""
    if world_size() == 1:
        return
    # NCCL moves nothing that is on a CPU, and gloo what is on a card by way of the CPU at best.
    device = {"nccl": "cuda", "gloo": "cpu"}.get(torch.distributed.get_backend())
    for tensor in tensors:
        value = tensor.detach().to(device or tensor.device).contiguous()
        torch.distributed.broadcast(value, 0)
        tensor.copy_(value)


def share_buffers_(model: nn.Module) -> None:
    """Give every process the first one's saved buffers: batch statistics are each process's own since the last batch.

    DDP does the same, but only before a forward pass. Every process has to call this.
    """
    saved = model.state_dict().keys()
    share_(buffer for name, buffer in model.named_buffers() if name in saved)


def check_same_everywhere(what: str, digest: bytes | str) -> None:
    """Stop where the processes hold different things.

    Args:
        what: What it is, in the message.
        digest: What stands for it, such as a SHA-256.

    Raises:
        RuntimeError: They differ; the message names the ranks that differ from rank 0.
    """
    if world_size() == 1:
        return
    found: list[Any] = [None] * world_size()
    torch.distributed.all_gather_object(found, digest)
    apart = [rank for rank, other in enumerate(found) if other != found[0]]
    if apart:
        raise RuntimeError(
            f"{what}: ranks {apart} hold another one than rank 0, so the search would go on in disagreement; it stops. "
            "Give every process the same model, settings and seed, and train through the same wrapper (DDP)"
        )
