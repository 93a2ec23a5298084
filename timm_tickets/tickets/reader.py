"""Reading a ticket's file: every size is checked against the file before memory is taken, and nothing is executed."""

import math
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from pydantic import ValidationError
from safetensors import safe_open
from torch import Tensor

from ..core.errors import TicketError, shown
from ..core.masks import Masks
from ..core.states import State, digest
from ..sparse.pretrained import Pretrained, fetch_pretrained, outline, sizes_of
from .header import (
    DTYPES,
    FORMAT,
    KEY,
    MOST_JSON,
    WEIGHTS_PER_BYTE,
    Envelope,
    Header,
    KnownMetadata,
    check_tensors,
    ensure,
    fingerprint,
    header_limit,
    narrows,
    pruned_value,
)
from .mask_coding import decode
from .starts import PretrainedStart, SeedStart, ValuesStart, drawn

_WEIGHTS = (
    "Trained weights go into a recipe as model.initial_checkpoint, or into timm.create_model as checkpoint_path; a "
    "search makes tickets of them"
)


@dataclass(frozen=True)
class Opened:
    """A file whose header has been read and agrees with the sizes of its tensors; ``size`` is the file's, in bytes."""

    path: Path
    size: int
    header: Header
    tensors: Mapping[str, Tensor]


def read(
    path: Path, pretrained: Mapping[str, Tensor] | None = None
) -> tuple[Masks, State, dict[str, Any], Pretrained | None]:
    """A ticket's masks, state dict, metadata and pretrained start; `load_ticket` says what is raised."""
    with damage(path):
        opened = open_(path)
        masks = unpack_masks(opened)
        source = _source(opened, pretrained)
        values = _unpack_values(opened, masks, source)
        header = opened.header
        ensure(fingerprint(masks, values) == header.fingerprint, "its fingerprint does not match what it holds")
    return masks, values, header.metadata, source


def describe(path: Path) -> tuple[dict[str, Any], str]:
    """A file's metadata and fingerprint, all checked as `read` does; but without fetching pretrained weights.

    Where it starts from such, its masks are checked, and its tensors against the architecture that timm has for it.

    Raises:
        TicketError: Not a ticket, or damaged.
    """
    with damage(path):
        opened = open_(path)
        if isinstance(opened.header.start, PretrainedStart):
            unpack_masks(opened)
            why = "it takes the pretrained weights"
            if timm.is_model_pretrained(opened.header.start.tag):
                _planned(opened)
            else:
                why = f"this timm ({timm.__version__}) does not have these pretrained weights"
            return opened.header.metadata, f"{opened.header.fingerprint} (not checked: {why})"
    read(path)
    return opened.header.metadata, opened.header.fingerprint


@contextmanager
def damage(path: Path) -> Iterator[None]:
    """Turn whatever reading a file of unknown origin runs into, into a TicketError that names it.

    Other errors may repeat what stands in the file: it is shown here, cut and escaped, and in no traceback.
    """
    try:
        yield
    except TicketError as error:
        raise TicketError(f"{shown(str(path), 500)} {shown(str(error), 1000)}") from None
    except Exception as error:
        told = f"{shown(str(path), 500)} is not a ticket, or is damaged: {shown(_told(error), 500)}"
        raise TicketError(told) from None


def _told(error: Exception) -> str:
    if not isinstance(error, ValidationError):
        return str(error) or type(error).__name__
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    where = ".".join(map(str, first["loc"]))
    return f"{f'{shown(where)}: ' if where else ''}{shown(first['msg'], 300)}"


def open_(path: Path) -> "Opened":
    """Read a file's header and check it; call it within `damage`.

    Raises:
        FileNotFoundError: There is no such file.
    """
    with path.open("rb") as start:
        if start.read(2) == b"PK":
            raise TicketError(f"is a PyTorch checkpoint and not a ticket. {_WEIGHTS}")
    with safe_open(path, framework="pt") as file:
        text = (file.metadata() or {}).get(KEY)
        if text is None:
            raise TicketError(f"is a safetensors file but not a ticket: it has no {KEY!r} header. {_WEIGHTS}")
        ensure(len(text) <= MOST_JSON, f"its header has {len(text):,} characters, more than {MOST_JSON:,}")
        envelope = Envelope.model_validate_json(text)
        if envelope.format > FORMAT:
            needed = f"{shown(envelope.writer, 40)} or newer" if envelope.writer else "a newer one"
            raise TicketError(
                f"has ticket format {shown(envelope.format, 20)}; this version of timm-tickets reads up to {FORMAT}: "
                f"upgrade it to {needed}"
            )
        ensure(envelope.format == FORMAT, f"it has ticket format {shown(envelope.format, 20)}, which no release wrote")
        names = file.keys()
        ensure(len(names) <= len(DTYPES) + 3, f"it holds {len(names):,} tensors")
        tensors = {name: file.get_tensor(name) for name in names}
    size = path.stat().st_size
    opened = Opened(path, size, _header(tensors), tensors)
    _check_sizes(opened)
    KnownMetadata.model_validate(opened.header.metadata)
    return opened


def _header(tensors: Mapping[str, Tensor]) -> Header:
    ensure("header" in tensors and tensors["header"].dtype == torch.uint8, "it has no header")
    data = tensors["header"].numpy().tobytes()
    stream = zlib.decompressobj()
    text = stream.decompress(data, header_limit(len(data)))
    ensure(stream.eof and not stream.unused_data, "its header is cut short or too long")
    return Header.model_validate_json(text, strict=True)


def _check_sizes(opened: Opened) -> None:
    header, tensors = opened.header, opened.tensors
    check_tensors([entry[:3] for entry in header.layers], [entry[:3] for entry in header.rest], opened.size)
    sizes = [math.prod(shape) for _, shape, _, _ in header.layers]
    for (name, _, _, kept), size in zip(header.layers, sizes, strict=True):
        ensure(kept <= size, f"{name[:120]} keeps {kept} weights of {size}")
    if header.frozen is not None:
        ensure(len(header.frozen.counts) == len(sizes), "it does not say of every layer what was frozen")
        for (name, _, _, kept), size, (pruned, locked) in zip(header.layers, sizes, header.frozen.counts, strict=True):
            ensure(locked <= kept <= size - pruned, f"{name[:120]} cannot keep {kept} weights with so many frozen")
    if isinstance(header.start, SeedStart):
        ensure(all(dtype == "float32" for _, _, dtype, _ in header.layers), "drawn weights are float32")
    values: dict[str, int] = {}
    if isinstance(header.start, ValuesStart):
        for _, _, dtype, kept in header.layers:
            values[_stored(header, dtype)] = values.get(_stored(header, dtype), 0) + kept
    for name, shape, dtype, where in header.rest:
        if where == "stored":
            values[_stored(header, dtype)] = values.get(_stored(header, dtype), 0) + math.prod(shape)
        elif where == "pretrained":
            ensure(isinstance(header.start, PretrainedStart), f"{name[:120]} is pretrained, but the start is not")
        else:
            _repeated(dtype, where)
    expected = {f"values.{dtype}": (DTYPES[dtype], size) for dtype, size in values.items()}
    present = set(tensors) - {"padding"}
    ensure(present == {*expected, "masks", "header"}, f"it holds {shown(sorted(present))}")
    for key, (dtype, size) in expected.items():
        ensure(tensors[key].dtype == dtype and tensors[key].shape == (size,), f"{key} is not {size} values of {dtype}")
    ensure("padding" not in tensors or not tensors["padding"].any(), "its padding is not zeros")
    words = tensors["masks"]
    ensure(words.dtype == torch.uint8 and words.dim() == 1 and words.numel() % 4 == 0, "its masks are not words")


def _stored(header: Header, dtype: str) -> str:
    """The dtype that values of a dtype have in the file."""
    return header.stored_as if header.stored_as is not None and narrows(DTYPES[dtype]) else dtype


def _repeated(dtype: str, text: str) -> Tensor:
    """The one value of a tensor that repeats it, as a tensor without dimensions."""
    data = bytes.fromhex(text)
    ensure(len(data) == DTYPES[dtype].itemsize, f"'{shown(text, 40)}' is not a value of {dtype}")
    ensure(dtype != "bool" or data[0] < 2, f"'{shown(text, 40)}' is not a bool")
    return torch.frombuffer(bytearray(data), dtype=DTYPES[dtype])[0]


def unpack_masks(opened: Opened) -> Masks:
    """The masks, decoded, each with exactly the count that the header gives."""
    header = opened.header
    words = np.frombuffer(opened.tensors["masks"].numpy().tobytes(), dtype="<u4")
    sizes = [math.prod(shape) for _, shape, _, _ in header.layers]
    frozen = header.frozen.counts if header.frozen is not None else [(0, 0)] * len(sizes)
    patterns = header.frozen.patterns(sizes) if header.frozen is not None else None
    counts = [
        (size - pruned - locked, kept - locked)
        for size, (pruned, locked), (_, _, _, kept) in zip(sizes, frozen, header.layers, strict=True)
    ]
    masks: Masks = {}
    for (name, shape, _, _), free in zip(header.layers, decode(words, counts), strict=True):
        if patterns is not None:
            pruned, locked = next(patterns)
            locked[~(pruned | locked)] = free
            free = locked
        masks[name] = torch.from_numpy(free).view(shape)
    return masks


def _source(opened: Opened, given: Mapping[str, Tensor] | None) -> Pretrained | None:
    """The pretrained tensors that the ticket needs, from the caller or from timm, found to be the right ones."""
    header = opened.header
    if not isinstance(header.start, PretrainedStart):
        return None
    tag = header.start.tag
    if given is None:
        sizes, planned = _planned(opened)
        weights, most = sum(value.numel() for value in planned.values()), WEIGHTS_PER_BYTE * opened.size
        if weights > most:
            raise TicketError(
                f"starts from the pretrained weights '{shown(tag)}', {weights:,} of them, which is more than the "
                f"{most:,} that a file of {opened.size:,} bytes may stand for; give them: "
                "load_ticket(path, pretrained=state)"
            )
        given = fetch_pretrained(tag, sizes)
    used = _needed(header, tag, given)
    if digest(used) != header.start.sha256:
        raise TicketError(
            f"needs other pretrained weights than these: the hash of its tensors of '{shown(tag)}' does not match. "
            "They were changed since, or are of another tag; give the right ones: load_ticket(path, pretrained=state)"
        )
    return Pretrained(tag, {name: value.detach().cpu() for name, value in used.items()})


def _planned(opened: Opened) -> tuple[dict[str, int], State]:
    """What builds the architecture of a pretrained start, and its tensors on the meta device; the file fits them.

    Not the metadata's word for it: the shapes are in proportion to the file. And all that they say is held against the
    architecture before anything is built.
    """
    header: Any = opened.header
    sizes = sizes_of(header.start.tag, {entry[0]: entry[1] for entry in (*header.layers, *header.rest)})
    planned = outline(header.start.tag, sizes)
    _needed(header, header.start.tag, planned)
    return sizes, planned


def _needed(header: Header, tag: str, state: Mapping[str, Tensor]) -> State:
    """The tensors of a pretrained state that the file leaves out, in shape and dtype as it says."""
    layers = [(name, shape, dtype) for name, shape, dtype, _ in header.layers]
    rest = [(name, shape, dtype) for name, shape, dtype, where in header.rest if where == "pretrained"]
    used: State = {}
    for name, shape, dtype in sorted(layers + rest):
        found = state.get(name)
        if found is None or list(found.shape) != shape or found.dtype != DTYPES[dtype]:
            has = "none" if found is None else f"{list(found.shape)} {found.dtype}"
            raise TicketError(
                f"needs the pretrained weights '{shown(tag)}': {shown(name)} as {shape} {dtype}; those here have {has}"
            )
        used[name] = found
    return used


def _unpack_values(opened: Opened, masks: Masks, source: Pretrained | None) -> State:
    header = opened.header
    begun: dict[str, int] = {}
    values: State = {}

    def take(dtype: str, count: int) -> Tensor:
        stored = _stored(header, dtype)
        start = begun.get(stored, 0)
        begun[stored] = start + count
        return opened.tensors[f"values.{stored}"][start : start + count].to(DTYPES[dtype])

    if isinstance(header.start, SeedStart):
        shapes, kept = [shape for _, shape, _, _ in header.layers], [kept for _, _, _, kept in header.layers]
        for name, weight in zip(masks, drawn(header.start, shapes, kept), strict=True):
            values[name] = weight.masked_fill_(~masks[name], 0)
    for name, shape, dtype, kept in header.layers:
        if source is not None:
            values[name] = pruned_value(name, source.state[name], masks)
        elif name not in values:
            values[name] = torch.zeros(shape, dtype=DTYPES[dtype])
            values[name][masks[name]] = take(dtype, kept)
    for name, shape, dtype, where in header.rest:
        if where == "stored":
            values[name] = take(dtype, math.prod(shape)).view(shape).clone()
        elif source is not None and where == "pretrained":
            values[name] = source.state[name].clone()
        else:
            values[name] = _repeated(dtype, where).expand(shape).clone(memory_format=torch.contiguous_format)
    return values
