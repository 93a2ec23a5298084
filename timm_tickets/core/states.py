"""State dicts: what all their bits are, which tensors two of them share, and whether they are finite."""

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

State = dict[str, Tensor]


def sharing(
    state: Mapping[str, Tensor], known: Mapping[str, Tensor], shown: Mapping[str, Tensor] | None = None
) -> State:
    """The state with known tensors in place of those that equal them bit for bit, so that no second copy is kept.

    Args:
        state: A state dict.
        known: One that is held anyway.
        shown: What stands in ``state`` where ``known`` was loaded, if that is not the same: masked.
    """
    same = known if shown is None else shown
    return {
        name: known[name] if name in same and torch.equal(as_bytes(value), as_bytes(same[name])) else value
        for name, value in state.items()
    }


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of tensors by name: names, dtypes, shapes and every bit."""
    sha = hashlib.sha256()
    update(sha, "value", tensors.items())
    return sha.hexdigest()


def update(sha: Any, kind: str, tensors: Any) -> None:
    """Add (name, tensor) pairs to a hash, in the order of their names; pairs may be made one at a time."""
    for name, tensor in tensors:
        sha.update(f"{kind} {name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        sha.update(as_bytes(tensor).numpy().data)


def as_bytes(tensor: Tensor) -> Tensor:
    """All bits of a tensor on the CPU, as uint8 in memory order."""
    tensor = tensor.detach().contiguous()
    if tensor.numel() == 1:  # contiguous whatever its stride, and one of 0 cannot be viewed as bytes
        tensor = tensor.clone(memory_format=torch.contiguous_format)
    return tensor.flatten().view(torch.uint8)


def not_finite(state: Mapping[str, Tensor], strange: Mapping[str, Tensor]) -> str | None:
    """Name of the first tensor with a NaN or an infinity in it that was not there at the start, in ``strange``.

    Some models hold infinities for good: Gemma 4's clipping bounds before they are calibrated.
    """
    for name, value in state.items():
        bad = ~value.isfinite()
        if bad.any() and (name not in strange or (bad & (value != strange[name])).any()):
            return name
    return None
