"""Tickets: masks, the weights to start from, and what they are; saved in one small file that is safe to open.

The file is safetensors (no pickle). Format 1 holds

- ``masks``: uint8, one bit a prunable weight, all layers one after the other in the header's order, most significant
  bit first, the last byte filled with zeros;
- ``values.<dtype>``: one flat tensor a dtype: the kept weights of each layer in memory order, then every other tensor
  of the state dict whole (biases, normalisation, classifier, buffers), in the header's order;
- a JSON header under ``timm_tickets`` in the safetensors metadata, described by `_Header`.
"""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .files import replacing
from .masks import Masks, sparsity
from .subnet import State, Subnet, aliases, plain_model

FORMAT = 1
_KEY = "timm_tickets"
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    )
}


class TicketError(ValueError):
    """A ticket that cannot be read, or that does not fit the model it is put on."""


_Size = Annotated[int, Field(ge=0)]


class _Format(BaseModel):
    format: int


class _Header(BaseModel):
    """The JSON header. Shapes and counts decide every size; nothing is allocated before they are found to agree."""

    model_config = ConfigDict(extra="forbid")
    format: int
    layers: list[tuple[str, list[_Size], str, _Size]]  # name, shape, dtype, weights kept
    rest: list[tuple[str, list[_Size], str]]  # name, shape, dtype
    fingerprint: str
    metadata: dict[str, Any]


class _KnownMetadata(BaseModel):
    """The metadata that this package reads; a ticket may say more."""

    start_epoch: Annotated[float, Field(ge=0, le=1e6)] = 0.0


@dataclass(eq=False)
class Ticket:
    """A sparse subnetwork of a timm model and the weights it starts from.

    Attributes:
        masks: By parameter name, bool, True where the weight is kept.
        values: The whole state dict to start from, on the CPU; what the masks prune counts as zero.
        metadata: Architecture and its arguments, pruner and settings, versions, metrics: JSON types only.
    """

    masks: Masks = field(repr=False)
    values: State = field(repr=False)
    metadata: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module, masks: Mapping[str, Tensor], metadata: Mapping[str, Any] | None = None) -> "Ticket":
        """The ticket of these masks over a model's present weights; the model is not changed."""
        inner = plain_model(model)
        state = Subnet(inner, ()).state()
        for name, others in aliases(inner, masks).items():
            state |= {one: state[one].masked_fill(~masks[name].cpu(), 0) for one in others}
        return cls.from_state(state, masks, {"model": describe_model(inner), **(metadata or {})})

    @classmethod
    def from_state(
        cls, state: Mapping[str, Tensor], masks: Mapping[str, Tensor], metadata: Mapping[str, Any]
    ) -> "Ticket":
        """The ticket of these masks over a state dict on the CPU."""
        masks = {name: mask.to("cpu", copy=True) for name, mask in masks.items()}
        ticket = cls(masks, dict(state), {**metadata, "versions": _versions()})
        ticket.values = {name: value.clone() for name, value in ticket.state().items()}
        return ticket

    def state(self) -> State:
        """The state dict that the ticket gives a model: `values`, exactly zero where pruned."""
        return {
            name: value.masked_fill(~self.masks[name], 0) if name in self.masks else value
            for name, value in self.values.items()
        }

    @property
    def sparsity(self) -> float:
        """Fraction of the weights under the masks that is pruned, in [0, 1)."""
        return sparsity(self.masks)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the masks and of the model the ticket rebuilds: names, dtypes, shapes and every bit."""
        digest = hashlib.sha256()
        for kind, tensors in (("mask", self.masks), ("value", self.state())):
            for name in sorted(tensors):
                tensor = tensors[name].contiguous()
                digest.update(f"{kind} {name} {tensor.dtype} {list(tensor.shape)}\n".encode())
                digest.update(tensor.flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def save(self, path: str | Path) -> None:
        """Write the ticket: to a temporary file, then renamed.

        Raises:
            OSError: It could not be written; a file that stood there before is untouched.
            TicketError: It has no masks, or holds a tensor of a dtype that tickets do not know.
        """
        if not any(mask.numel() for mask in self.masks.values()):
            raise TicketError("a ticket without masks cannot be saved; make it with a pruner or Ticket.of")
        bits = np.concatenate([mask.flatten().numpy() for mask in self.masks.values()])
        tensors = {"masks": torch.from_numpy(np.packbits(bits))}
        parts: dict[str, list[Tensor]] = {}
        layers, rest = [], []
        for name, mask in self.masks.items():
            value = self.values[name]
            dtype = _dtype_name(value)
            parts.setdefault(dtype, []).append(value[mask])
            layers.append((name, list(mask.shape), dtype, int(mask.sum())))
        for name, value in self.values.items():
            if name not in self.masks:
                dtype = _dtype_name(value)
                parts.setdefault(dtype, []).append(value.flatten())
                rest.append((name, list(value.shape), dtype))
        tensors |= {f"values.{dtype}": torch.cat(values) for dtype, values in parts.items()}
        header = _Header(
            format=FORMAT, layers=layers, rest=rest, fingerprint=self.fingerprint, metadata=dict(self.metadata)
        )
        with replacing(Path(path)) as temporary:
            save_file(tensors, temporary, {_KEY: header.model_dump_json()})

    def apply_(self, model: nn.Module) -> nn.Module:
        """Turn a model of the same architecture into the ticket: its starting weights, zero where pruned.

        Applying twice is the same as applying once. Train on with `attach`, or the pruned weights grow back.

        Raises:
            TicketError: Another architecture, or parameters that differ in name or shape; the model is unchanged.
        """
        inner = plain_model(model)
        model_facts = self.metadata.get("model")
        expected = model_facts.get("architecture") if isinstance(model_facts, dict) else None
        found = describe_model(inner)["architecture"]
        if expected and found and expected != found:
            raise TicketError(f"this ticket is for {expected!r}, the model is {found!r}; create a {expected!r} instead")
        self._check_names(inner.state_dict(), self.values)
        inner.load_state_dict(self.state())
        Subnet(inner, tuple(self.masks)).set_mask_(self.masks)  # standardised layers hold theirs themselves
        return model

    def attach(self, model: nn.Module, optimizer: Any) -> Any:
        """Keep the ticket's masks through training: pruned weights are exactly zero now and after every step.

        Args:
            model: The model the ticket was applied to.
            optimizer: Its optimizer, plain or wrapped by Accelerate.

        Returns:
            The same optimizer.
        """
        inner = plain_model(model)
        self._check_names(dict(inner.named_parameters()), self.masks, partial=True)
        subnet = Subnet(inner, tuple(self.masks))
        subnet.set_mask_(self.masks)
        subnet.hold_(optimizer)
        return optimizer

    @staticmethod
    def _check_names(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor], partial: bool = False) -> None:
        missing = [name for name in wanted if name not in state]
        extra = [] if partial else [name for name in state if name not in wanted]
        if missing or extra:
            raise TicketError(
                f"the ticket does not fit this model: {len(missing)} of its tensors are not in the model "
                f"({', '.join(missing[:3]) or 'none'}) and {len(extra)} of the model's are not in it "
                f"({', '.join(extra[:3]) or 'none'}); create the architecture the ticket was found on, and apply it "
                "before reparameterize_model"
            )
        for name, value in wanted.items():
            if state[name].shape != value.shape:
                raise TicketError(
                    f"{name} is {list(value.shape)} in the ticket and {list(state[name].shape)} in the model; "
                    "create the model with the ticket's num_classes, in_chans and img_size"
                )


def load_ticket(path: str | Path) -> Ticket:
    """Read a ticket file. Nothing in it is executed, and every size is checked before memory is taken.

    Memory is at most 160 times the file's size and 64 MB: a bit of mask becomes a byte of mask and a weight of up to 8
    bytes, and what is rebuilt is held twice while its fingerprint is taken.

    Raises:
        FileNotFoundError: There is no such file.
        TicketError: Not a ticket, cut short, changed, or written by a newer version.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no ticket at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(_KEY)
            if text is None:
                raise TicketError(f"{path} is a safetensors file but not a ticket: it has no {_KEY!r} header")
            header = _read_header(path, text)
            return _unpack(path, header, {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    except TicketError:
        raise
    except (SafetensorError, ValueError, RuntimeError, OverflowError, TypeError, OSError) as error:
        raise TicketError(f"{path} is not a ticket, or is damaged: {error}") from error


def _read_header(path: Path, text: str) -> _Header:
    found = _Format.model_validate_json(text).format
    if found > FORMAT:
        raise TicketError(
            f"{path} has ticket format {found}; this version of timm-tickets reads up to {FORMAT}: upgrade it"
        )
    header = _Header.model_validate_json(text, strict=True)
    if found < 1:
        raise TicketError(f"{path} has ticket format {found}, which never existed; it is damaged")
    return header


def _unpack(path: Path, header: _Header, tensors: dict[str, Tensor]) -> Ticket:
    """Check every size against the header, then rebuild the masks and the state dict."""

    def check(holds: bool, what: str) -> None:
        if not holds:
            raise TicketError(f"{path} is damaged: {what}")

    names = [entry[0] for entry in (*header.layers, *header.rest)]
    check(len(set(names)) == len(names), "a tensor is named twice")
    check(all(name.isprintable() and len(name) < 1000 for name in names), "a tensor's name is not printable")
    check(bool(header.layers), "it has no layers")
    check(all(math.prod(shape) for _, shape, _, _ in header.layers), "a layer has no weights")
    _KnownMetadata.model_validate(header.metadata)
    bits = sum(math.prod(shape) for _, shape, _, _ in header.layers)
    sizes: dict[str, int] = {}
    for name, shape, dtype, count in header.layers:
        check(count <= math.prod(shape), f"{name} keeps {count} weights of {math.prod(shape)}")
        sizes[dtype] = sizes.get(dtype, 0) + count
    for _, shape, dtype in header.rest:
        sizes[dtype] = sizes.get(dtype, 0) + math.prod(shape)
    check(set(sizes) <= set(_DTYPES), f"it names unknown dtypes: {sorted(set(sizes) - set(_DTYPES))}")
    expected = {f"values.{dtype}": (_DTYPES[dtype], size) for dtype, size in sizes.items()}
    expected["masks"] = (torch.uint8, -(-bits // 8))
    check(set(tensors) == set(expected), f"it holds {sorted(tensors)}, not {sorted(expected)}")
    for key, (dtype, size) in expected.items():
        check(tensors[key].dtype == dtype and tensors[key].shape == (size,), f"{key} is not {size} values of {dtype}")

    packed = tensors["masks"].numpy()
    check(bits % 8 == 0 or not packed[-1] & (0xFF >> bits % 8), "bits are set past the last mask")
    masks: Masks = {}
    values: State = {}
    begun = dict.fromkeys(sizes, 0)

    def take(dtype: str, count: int) -> Tensor:
        begun[dtype] += count
        return tensors[f"values.{dtype}"][begun[dtype] - count : begun[dtype]]

    start = 0
    for name, shape, dtype, count in header.layers:
        stop = start + math.prod(shape)
        unpacked = np.unpackbits(packed[start // 8 : -(-stop // 8)])[start % 8 :][: stop - start]
        mask = torch.from_numpy(unpacked.view(np.bool_)).view(shape)
        start = stop
        check(int(mask.sum()) == count, f"the mask of {name} keeps {int(mask.sum())}, its header says {count}")
        masks[name] = mask
        values[name] = torch.zeros(shape, dtype=_DTYPES[dtype])
        values[name][mask] = take(dtype, count)
    for name, shape, dtype in header.rest:
        values[name] = take(dtype, math.prod(shape)).view(shape).clone()
    ticket = Ticket(masks, values, header.metadata)
    check(ticket.fingerprint == header.fingerprint, "its fingerprint does not match what it holds")
    return ticket


def describe_model(model: nn.Module) -> dict[str, Any]:
    """What timm needs to build the model again, as far as the model itself can tell: JSON types only."""
    config = getattr(model, "pretrained_cfg", None) or {}
    stem = config.get("first_conv")
    stem_weight = dict(model.named_parameters()).get(f"{stem}.weight") if isinstance(stem, str) else None
    return {
        "architecture": config.get("architecture"),
        "num_classes": getattr(model, "num_classes", None),
        "in_chans": None if stem_weight is None else stem_weight.shape[1],
    }


def _dtype_name(value: Tensor) -> str:
    name = str(value.dtype).removeprefix("torch.")
    if name not in _DTYPES:
        raise TicketError(f"a tensor of dtype {name} cannot be stored in a ticket; valid: {', '.join(_DTYPES)}")
    return name


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("timm-tickets", "timm", "torch")}
