"""The file of a ticket, format 2: safetensors (no pickle), whose metadata say only format and writer. Its tensors:

- ``header``: uint8, a zlib stream of the JSON that `Header` describes;
- ``masks``: uint8, the little-endian words of `mask_coding.encode`: of each layer, in the header's order, the weights
  that were free to choose (all but those frozen by a seed), in memory order;
- ``values.<dtype>``: flat, one a dtype: if the start is ``values``, the kept weights of each layer in memory order;
  then every tensor the header calls ``stored``, in its order;
- ``padding``: zeros, only in a file so small that its size would not bound the memory that reading takes.

A change that this code would misread needs a higher format. No release wrote format 1.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from ..core.errors import TicketError, shown
from ..core.states import update
from .starts import Frozen, Start

FORMAT = 2
KEY = "timm_tickets"
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    )
}
WEIGHTS_PER_BYTE = 256  # tensor elements a byte of file may stand for, at most; reading's memory follows from it
MOST_TENSORS = 10_000  # of a file; timm's largest, resnetrs420, has 3,108
MOST_JSON = 1 << 24  # bytes of it that are parsed
Size = Annotated[int, Field(ge=0, le=2**48)]
Shape = Annotated[list[Size], Field(max_length=16)]


class Envelope(BaseModel):
    """What every format says openly, in the safetensors metadata: its number and the version that wrote it."""

    format: int
    writer: str = ""


class KnownMetadata(BaseModel):
    """The metadata that this package reads; a ticket may say more."""

    start_epoch: Annotated[float, Field(ge=0, le=1e6, strict=True)] = 0.0


class Header(BaseModel):
    """What a file says of its contents. Shapes and counts decide every size; all are checked before memory is taken.

    Attributes:
        layers: Name, shape, dtype and number kept of each weight under a mask.
        rest: Name, shape, dtype of every other tensor of the state dict, and where its values are: ``stored``;
            ``pretrained``, for those of a pretrained start; or the bytes, in hexadecimal, of the one value it repeats.
        start: Where the kept weights come from.
        frozen: Which weights the search was not free to choose, where that comes from a seed.
        stored_as: ``float16`` or ``bfloat16``, where stored values of a wider floating-point dtype were rounded to it.
        fingerprint: `fingerprint` of the masks and of the state dict that the file rebuilds.
        metadata: The ticket's own.
    """

    model_config = ConfigDict(extra="forbid")
    layers: Annotated[list[tuple[str, Shape, str, Size]], Field(max_length=MOST_TENSORS)]
    rest: Annotated[list[tuple[str, Shape, str, str]], Field(max_length=MOST_TENSORS)]
    start: Start
    frozen: Frozen | None
    stored_as: Literal["float16", "bfloat16"] | None
    fingerprint: str
    metadata: dict[str, Any]


def ensure(holds: bool, what: str) -> None:
    if not holds:
        raise TicketError(f"is damaged: {what}")


def check_tensors(layers: Sequence[tuple[str, Sequence[int], str]], rest: Sequence[Any], size: int) -> None:
    """Refuse tensors that no ticket of this size can have: called before memory is taken for any of them.

    Args:
        layers: Name, shape and dtype of each weight under a mask.
        rest: The same of every other tensor.
        size: Bytes of the file.

    Raises:
        TicketError: Two of one name, an unknown dtype, a mask over integers, an empty layer, or too many of something.
    """
    both = [*layers, *rest]
    names = [name for name, _, _ in both]
    ensure(len(names) <= MOST_TENSORS, f"it names {len(names):,} tensors, more than the {MOST_TENSORS:,} of a ticket")
    ensure(len(set(names)) == len(names), "a tensor is named twice")
    ensure(all(name.isprintable() and len(name) < 1000 for name in names), "a tensor's name is not printable")
    if unknown := sorted({dtype for _, _, dtype in both} - DTYPES.keys()):
        raise TicketError(f"is damaged: it names unknown dtypes: {shown(unknown)}")
    ensure(bool(layers) and all(math.prod(shape) for _, shape, _ in layers), "it has no layers, or one without weights")
    for name, _, dtype in layers:
        ensure(DTYPES[dtype].is_floating_point, f"{name[:120]} has a mask, but {dtype} is not a dtype of weights")
    elements = sum(claimed(shape) for _, shape, _ in both)
    ensure(elements <= WEIGHTS_PER_BYTE * size, f"it claims {elements} values in {size} bytes")


def claimed(shape: Sequence[int]) -> int:
    """How many values a shape stands for, where a dimension of 0 hides no other: a model may be built for each."""
    return math.prod(max(length, 1) for length in shape)


def fingerprint(masks: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> str:
    """SHA-256 of the masks and of the model the ticket rebuilds: names, dtypes, shapes and every bit.

    Args:
        masks: Bool, by parameter name.
        values: The whole state dict; what the masks prune counts as zero.
    """
    sha = hashlib.sha256()
    update(sha, "mask", ((name, masks[name]) for name in sorted(masks)))
    update(sha, "value", ((name, pruned_value(name, values[name], masks)) for name in sorted(values)))
    return sha.hexdigest()


def pruned_value(name: str, value: Tensor, masks: Mapping[str, Tensor]) -> Tensor:
    return value.masked_fill(~masks[name], 0) if name in masks else value


def dtype_name(value: Tensor) -> str:
    """The header's name of a tensor's dtype.

    Raises:
        TicketError: Tickets do not know it.
    """
    name = str(value.dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise TicketError(f"a tensor of dtype {name} cannot be stored in a ticket; valid: {', '.join(DTYPES)}")
    return name


def narrows(dtype: torch.dtype) -> bool:
    """Whether saving as float16 or bfloat16 rounds values of this dtype."""
    return dtype.is_floating_point and dtype.itemsize > 2


def header_limit(compressed: int) -> int:
    """How many bytes of JSON a header of this compressed size may have: zlib could blow up a thousandfold."""
    return min((1 << 20) + 32 * compressed, MOST_JSON)
