"""The file of a ticket, format 1, which is read but no longer written. It is safetensors and holds

- ``masks``: uint8, one bit a prunable weight, all layers one after the other in the header's order, most significant
  bit first, the last byte filled with zeros;
- ``values.<dtype>``: one flat tensor a dtype: the kept weights of each layer in memory order, then every other tensor
  of the state dict whole (biases, normalisation, classifier, buffers), in the header's order;
- a JSON header under ``timm_tickets`` in the safetensors metadata, described by `Header`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from .masks import Masks
from .settings import shown
from .starts import State
from .ticket_header import DTYPES, MOST_TENSORS, Shape, Size, check, check_tensors


class Header(BaseModel):
    """The JSON header. Shapes and counts decide every size; nothing is allocated before they are found to agree."""

    model_config = ConfigDict(extra="forbid")
    format: int
    layers: Annotated[list[tuple[str, Shape, str, Size]], Field(max_length=MOST_TENSORS)]  # ..., dtype, weights kept
    rest: Annotated[list[tuple[str, Shape, str]], Field(max_length=MOST_TENSORS)]  # name, shape, dtype
    fingerprint: str
    metadata: dict[str, Any]


@dataclass(frozen=True)
class Opened:
    """A file whose header has been read and agrees with the sizes of its tensors."""

    header: Header
    tensors: Mapping[str, Tensor]


def open_(text: str, tensors: Mapping[str, Tensor], size: int) -> Opened:
    """Read the header of a file of so many bytes, and check every size against it."""
    header = Header.model_validate_json(text, strict=True)
    check_tensors([entry[:3] for entry in header.layers], header.rest, size)
    bits = sum(math.prod(shape) for _, shape, _, _ in header.layers)
    sizes: dict[str, int] = {}
    for name, shape, dtype, count in header.layers:
        check(count <= math.prod(shape), f"{name[:120]} keeps {count} weights of {math.prod(shape)}")
        sizes[dtype] = sizes.get(dtype, 0) + count
    for _, shape, dtype in header.rest:
        sizes[dtype] = sizes.get(dtype, 0) + math.prod(shape)
    expected = {f"values.{dtype}": (DTYPES[dtype], size) for dtype, size in sizes.items()}
    expected["masks"] = (torch.uint8, -(-bits // 8))
    check(set(tensors) == set(expected), f"it holds {shown(sorted(tensors))}, not {sorted(expected)}")
    for key, (dtype, size) in expected.items():
        check(tensors[key].dtype == dtype and tensors[key].shape == (size,), f"{key} is not {size} values of {dtype}")
    return Opened(header, tensors)


def unpack(opened: Opened) -> tuple[Masks, State]:
    """Rebuild the masks and the state dict."""
    header, tensors = opened.header, opened.tensors
    bits = sum(math.prod(shape) for _, shape, _, _ in header.layers)
    packed = tensors["masks"].numpy()
    check(bits % 8 == 0 or not packed[-1] & (0xFF >> bits % 8), "bits are set past the last mask")
    masks: Masks = {}
    values: State = {}
    begun: dict[str, int] = {}

    def take(dtype: str, count: int) -> Tensor:
        start = begun.get(dtype, 0)
        begun[dtype] = start + count
        return tensors[f"values.{dtype}"][start : start + count]

    start = 0
    for name, shape, dtype, count in header.layers:
        stop = start + math.prod(shape)
        unpacked = np.unpackbits(packed[start // 8 : -(-stop // 8)])[start % 8 :][: stop - start]
        mask = torch.from_numpy(unpacked.view(np.bool_)).view(shape)
        start = stop
        check(int(mask.sum()) == count, f"the mask of {name[:120]} keeps {int(mask.sum())}, its header says {count}")
        masks[name] = mask
        values[name] = torch.zeros(shape, dtype=DTYPES[dtype])
        values[name][mask] = take(dtype, count)
    for name, shape, dtype in header.rest:
        values[name] = take(dtype, math.prod(shape)).view(shape).clone()
    return masks, values
