"""Writing a ticket's file: what of its start can be left out, and the rest packed as header.py says."""

import zlib
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from ..core.errors import SettingError, TicketError
from ..core.lazy import Lazy
from ..core.masks import Masks
from ..core.states import as_bytes, digest
from ..sparse.pretrained import Pretrained
from ..storage.files import replacing
from .header import (
    DTYPES,
    FORMAT,
    KEY,
    MOST_TENSORS,
    WEIGHTS_PER_BYTE,
    Envelope,
    Header,
    claimed,
    dtype_name,
    fingerprint,
    header_limit,
    narrows,
    pruned_value,
)
from .mask_coding import encode
from .starts import Frozen, Origin, PretrainedStart, SeedStart, Start, ValuesStart, drawn

_HALVES = ("float16", "bfloat16")


def write(
    path: Path,
    masks: Masks,
    state: Mapping[str, Tensor],
    metadata: dict[str, Any],
    pretrained: Pretrained | None = None,
    dtype: str | None = None,
) -> dict[str, Any]:
    """Write a ticket's parts to a temporary file, then rename it.

    Args:
        path: Where to.
        masks: Bool, on the CPU.
        state: The whole state dict on the CPU, zero where pruned. It is read a tensor at a time.
        metadata: JSON types.
        pretrained: The pretrained weights the state was made from, where that is so.
        dtype: None, ``float16`` or ``bfloat16``: what stored values of wider floating-point dtypes are rounded to.

    Returns:
        What rounding lost: its dtype, the largest absolute and relative error; empty where nothing was rounded.

    Raises:
        OSError: It could not be written; a file that stood there before is untouched.
        SettingError: Another dtype.
        TicketError: No masks, more tensors than are read back, a tensor of a dtype that tickets do not know, a mask
            over no floating-point tensor of the state, or a value that is not finite once rounded.
    """
    if dtype not in (None, *_HALVES):
        raise SettingError(f"dtype: {dtype!r} is not valid; it is None, for values as they are, or {_HALVES}")
    if not any(mask.numel() for mask in masks.values()):
        raise TicketError("a ticket without masks cannot be saved; make it with a pruner or Ticket.of")
    if len(state) > MOST_TENSORS:
        raise TicketError(f"a ticket of {len(state):,} tensors cannot be saved; {MOST_TENSORS:,} are read back")
    names = {name: dtype_name(value) for name, value in state.items()}
    for name in masks:
        if name not in names or not DTYPES[names[name]].is_floating_point:
            raise TicketError(
                f"a mask over {name}, {names.get(name, 'which is no tensor of the ticket')}, cannot be saved"
            )
    origin = Origin.of(metadata)
    patterns, freezing = _frozen(origin, masks)
    start = _start(origin, masks, state, pretrained)
    rounding = _Rounding(dtype)
    rest, weights = [], 0
    for name, mask in masks.items():
        if isinstance(start, ValuesStart):
            rounding.put(name, state[name][mask])
    for name, value in state.items():
        weights += claimed(value.shape)
        if name in masks:
            continue
        where = _constant(value)  # first: a new head's zero bias is timm's start too, but of no pretrained weights
        if where is None and pretrained and isinstance(start, PretrainedStart):
            where = "pretrained" if _same(value, pretrained.state.get(name)) else None
        if where is None:
            where = "stored"
            rounding.put(name, value.flatten())
        rest.append((name, list(value.shape), names[name], where))
    if isinstance(start, PretrainedStart) and pretrained:
        used = sorted([*masks, *(name for name, _, _, where in rest if where == "pretrained")])
        start.sha256 = digest({name: pretrained.state[name].cpu() for name in used})
    free = [mask.flatten().numpy()[~frozen] for mask, frozen in zip(masks.values(), patterns, strict=True)]
    lost = rounding.lost()
    header = Header(
        layers=[(name, list(mask.shape), names[name], int(mask.sum())) for name, mask in masks.items()],
        rest=rest,
        start=start,
        frozen=freezing,
        stored_as=dtype if lost else None,  # pyright: ignore[reportArgumentType] - checked above
        fingerprint=fingerprint(masks, rounding.read_back(state)),
        metadata={**metadata, "rounding": lost} if lost else metadata,
    )
    tensors = {f"values.{name}": torch.cat(values) for name, values in rounding.parts.items()}
    tensors["masks"] = _bytes(encode(free).astype("<u4").tobytes())
    tensors["header"] = _bytes(_compressed(header))
    size = sum(tensor.nbytes for tensor in tensors.values())
    if pretrained and isinstance(start, PretrainedStart):  # what reading builds may be larger than what it needs of it
        weights = max(weights, sum(value.numel() for value in pretrained.state.values()))
    short = -(-weights // WEIGHTS_PER_BYTE) - size
    if short > 0:
        tensors["padding"] = torch.zeros(short, dtype=torch.uint8)
    envelope = Envelope(format=FORMAT, writer=version("timm-tickets"))
    with replacing(path) as temporary:
        save_file(tensors, temporary, {KEY: envelope.model_dump_json()})
    return lost


class _Rounding:
    """Puts values among those to store, rounded to a narrower dtype where that is asked, and measures the loss.

    Attributes:
        parts: What is to be stored, flat, by the name of its dtype.
        rounded: Names of the tensors that were rounded.
    """

    def __init__(self, dtype: str | None):
        self.dtype = dtype
        self.parts: dict[str, list[Tensor]] = {}
        self.rounded: set[str] = set()
        self.absolute = self.relative = 0.0

    def put(self, name: str, value: Tensor) -> None:
        """Store flat values of the tensor of this name."""
        low = value
        if self.dtype is not None and narrows(value.dtype):
            low = value.to(DTYPES[self.dtype])
            self.rounded.add(name)
        self.parts.setdefault(dtype_name(low), []).append(low)
        if low is value or not value.numel():
            return
        back = low.to(value.dtype)
        if not torch.equal(back.isfinite(), value.isfinite()):
            raise TicketError(
                f"dtype: {name} holds values too large for {self.dtype}; save it as bfloat16, or as it is"
            )
        error, size = (back - value).abs().double(), value.abs().double()
        self.absolute = max(self.absolute, float(error.nan_to_num(0).max()))
        self.relative = max(self.relative, float((error / size).nan_to_num(0, posinf=0).max()))

    def read_back(self, state: Mapping[str, Tensor]) -> Lazy:
        """The state as it will be read."""

        def read(name: str) -> Tensor:
            value = state[name]
            return value.to(DTYPES[self.dtype]).to(value.dtype) if self.dtype and name in self.rounded else value

        return Lazy(state, read)

    def lost(self) -> dict[str, Any]:
        if not self.rounded:
            return {}
        return {"dtype": self.dtype, "max_absolute_error": self.absolute, "max_relative_error": self.relative}


def _start(origin: Origin, masks: Masks, state: Mapping[str, Tensor], pretrained: Pretrained | None) -> Start:
    """The start that can be left out of the file: its weights, made again, equal the kept ones bit for bit."""
    if pretrained is not None and all(
        _same(
            state[name],
            None if name not in pretrained.state else pruned_value(name, pretrained.state[name].cpu(), masks),
        )
        for name in masks
    ):
        return PretrainedStart(tag=pretrained.tag, sha256="")
    if origin.start == "seed" and origin.seed is not None and origin.weights is not None:
        start = SeedStart(seed=origin.seed, weights=origin.weights, scale=origin.scale)
        shapes, kept = [mask.shape for mask in masks.values()], [int(mask.sum()) for mask in masks.values()]
        if all(
            _same(state[name], weight.masked_fill_(~masks[name], 0))
            for name, weight in zip(masks, drawn(start, shapes, kept), strict=True)
        ):
            return start
    return ValuesStart()


def _frozen(origin: Origin, masks: Masks) -> tuple[list[np.ndarray], Frozen | None]:
    """For each layer which weights were not free, if the masks are as the freezing pattern says; else none was not."""
    flat = [mask.flatten().numpy() for mask in masks.values()]
    nothing = [np.zeros(len(mask), dtype=np.bool_) for mask in flat]
    counts, sizes = origin.frozen, [len(mask) for mask in flat]
    if counts is None or origin.seed is None or len(counts) != len(flat):
        return nothing, None
    if any(sum(pair) > size for pair, size in zip(counts, sizes, strict=True)):
        return nothing, None
    found = Frozen(seed=origin.seed, counts=counts)
    out = []
    for mask, (pruned, locked) in zip(flat, found.patterns(sizes), strict=True):
        if (mask & pruned).any() or not mask[locked].all():
            return nothing, None
        out.append(pruned | locked)
    return out, found


def _same(one: Tensor, other: Tensor | None) -> bool:
    """Whether two tensors agree in dtype, shape and every bit."""
    if other is None or one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(*(as_bytes(tensor.cpu()) for tensor in (one, other)))


def _constant(value: Tensor) -> str | None:
    """The bytes, in hexadecimal, of the one value that a tensor repeats; None where it holds several."""
    if value.numel() == 0:
        return None
    rows = as_bytes(value).view(value.numel(), -1)
    return bytes(rows[0].tolist()).hex() if bool((rows == rows[0]).all()) else None


def _bytes(data: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(data, dtype=np.uint8).copy())


def _compressed(header: Header) -> bytes:
    text = header.model_dump_json().encode()
    data = zlib.compress(text, 9)
    if len(text) > header_limit(len(data)):
        raise TicketError(
            f"the ticket's header has {len(text):,} bytes, more than the {header_limit(len(data)):,} that are read "
            "back; keep less in its metadata"
        )
    return data
