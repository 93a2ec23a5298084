"""The file of a compact model: safetensors, and how timm's architecture shrinks to it. No pickle, and no code.

Its metadata say what timm builds the model from, which numbers its modules hold instead of their own, and the indices
that stay of buffers that a state dict leaves out. The shapes of the tensors say the rest.
"""

import copy
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import timm
import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors import safe_open
from torch import Tensor, nn

from ..core.errors import SettingError, TicketError, shown
from ..sparse import networks  # noqa: F401 - a file may name them: they have to be registered with timm
from ..sparse.describe import describe_model
from ..sparse.prunable import build_to_inspect
from ..sparse.wrappers import plain_model
from ..storage.files import write_state
from ..structure.find import images_for
from ..structure.removal import Place, Removals, put_, tensor_of
from ..structure.verify import outputs
from ..tickets.publish import harmless
from .stored import check_arguments, read_stored

_KEY = "timm_tickets_compact"
_LARGER = 1_000  # times: how much larger than its file the model may be that timm builds first
_Number = Annotated[int, Field(strict=True)] | Annotated[float, Field(strict=True, allow_inf_nan=False)]
_Value = _Number | Annotated[list[Annotated[int, Field(strict=True)]], Field(max_length=1_000)]


class _Header(BaseModel):
    model_config = ConfigDict(extra="forbid")
    format: Literal[1]
    architecture: str
    arguments: dict[str, Any]
    attributes: Annotated[list[tuple[str, str, _Value]], Field(max_length=100_000)]
    shrunk: Annotated[list[tuple[str, int]], Field(max_length=100_000)]
    kept: Annotated[list[tuple[str, int, list[int]]], Field(max_length=10_000)]
    told: dict[str, str] = {}


def save_compact(
    model: nn.Module,
    path: str | Path,
    arguments: Mapping[str, Any] | None = None,
    told: Mapping[str, str] | None = None,
) -> None:
    """Write a compact model, trained further or not. It is rebuilt and compared before the file is put in its place.

    Args:
        model: What `Ticket.compact` gave, plain or wrapped.
        path: The file.
        arguments: What ``timm.create_model`` was given for the whole model beside ``num_classes`` and ``in_chans``.
        told: What stands in the file beside it.

    Raises:
        OSError: It cannot be written; what stood there before is untouched.
        SettingError: It is no compact model, or these arguments build another one.
    """
    plain: Any = plain_model(model)
    removals = getattr(plain, "removals", None)
    if not isinstance(removals, Removals):
        raise SettingError("model: it is not a compact one; give what ticket.compact(model) returns")
    facts = describe_model(plain)
    sizes = {key: facts[key] for key in ("num_classes", "in_chans") if isinstance(facts[key], int)}
    given = {**sizes, **(arguments or {})}
    check_arguments(given)
    state = {
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, value in plain.state_dict().items()
    }
    hidden = [(dim, index.tolist()) for dim, index in removals.kept.items() if dim[0] not in state]
    header = _Header(
        format=1,
        architecture=str(facts["architecture"]),
        arguments=given,
        attributes=[(*place, value) for place, value in removals.attributes.items()],
        shrunk=sorted(removals.shrunk),
        kept=[(*dim, index) for dim, index in hidden],
        told=dict(told or {}),
    )
    try:
        other = _rebuilt(header, state, math.inf, "the compact model").float()
        images = images_for(mine := copy.deepcopy(plain).cpu().float().eval())
        same = torch.equal(outputs(mine, images), outputs(other, images))
    except (TicketError, RuntimeError, ValueError, AssertionError):  # of other sizes than the model's
        same = False
    if not same:
        raise SettingError(
            f"arguments: with {shown(given)} timm builds a model that computes something else; give what "
            "timm.create_model was given for the whole model"
        )
    write_state(Path(path), state, {_KEY: header.model_dump_json()})


def compact_header(path: Path) -> dict[str, Any] | None:
    """What a compact file says of itself; None where a file is no such one, or cannot be read."""
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(_KEY)
        return None if text is None else _Header.model_validate_json(text).model_dump()
    except Exception:  # whatever it is, whoever reads it next says so
        return None


def load_compact(path: str | Path) -> nn.Module:
    """The model of a compact file, in evaluation mode on the CPU, fit to be trained.

    It is in float32, whatever the file is in. Nothing in the file is executed. timm builds its architecture first, and
    that may be at most 1,000 times as large as the file.

    Raises:
        FileNotFoundError: There is no such file.
        SettingError: timm does not have the architecture.
        TicketError: It is no such file, is damaged, or does not fit the architecture that it names.
    """
    path = Path(path)
    unlike = "is no compact model: it does not say so; `timm-tickets compact` writes one"
    header, state = read_stored(path, _KEY, _Header, unlike)
    return _rebuilt(header, state, path.stat().st_size * _LARGER, str(path))


def _rebuilt(header: _Header, state: Mapping[str, Tensor], most: float, told: str) -> nn.Module:
    """timm's model, shrunk to what the header says and given these tensors."""
    if not timm.is_model(header.architecture):
        raise SettingError(
            f"architecture: {told} is for '{shown(header.architecture)}', which this timm ({timm.__version__}) does "
            "not have; import the module that registers it, or another timm"
        )
    arguments = harmless(header.arguments)
    with torch.random.fork_rng(devices=[]):  # building draws weights; the caller's random numbers are not to change
        outline = build_to_inspect(header.architecture, arguments)
        kept, shrunk = _kept(header, outline, state, told), frozenset(header.shrunk)
        removals = Removals(kept, _attributes(header, outline, told), shrunk)
        if sum(one.numel() * one.element_size() for one in outline.state_dict().values()) > max(most, 2**20):
            raise TicketError(f"{told} names a model that is more than {_LARGER} times as large as the file; refused")
        model: Any = build_to_inspect(header.architecture, arguments, "cpu").eval()
    removals.apply_(model)
    for name, value in state.items():  # shapes are known to be no larger than the architecture's
        if tensor_of(model, name).shape != value.shape:
            put_(model, name, value)
    model.load_state_dict(state, assign=False)
    model.removals = removals
    return model


def _attributes(header: _Header, outline: nn.Module, told: str) -> dict[Place, Any]:
    """The numbers that modules get, each of which has to be one that is there, and no larger."""
    modules, found = dict(outline.named_modules()), {}
    for path, name, value in header.attributes:
        old = vars(modules[path]).get(name) if path in modules else None
        new = type(old)(value) if isinstance(old, tuple | list) and isinstance(value, list) else value
        several, before = _several(new), _several(old)
        fits = type(new) is type(old) and len(several) == len(before) and not name.startswith("_")
        if not fits or any(type(one) is int and not 0 < one <= was for one, was in zip(several, before, strict=True)):
            raise TicketError(
                f"{told} does not fit {shown(header.architecture)}: it makes {shown(path)}.{shown(name)} "
                f"{shown(value)}, where the model has {shown(old)}; it is of another version of timm, or was changed"
            )
        found[path, name] = new
    return found


def _several(value: Any) -> list[Any]:
    return list(value) if isinstance(value, tuple | list) else [value]


def _kept(header: _Header, outline: nn.Module, state: Mapping[str, Tensor], told: str) -> dict[tuple[str, int], Tensor]:
    """The indices that stay of buffers that are in no state dict; the tensors that are have to be no larger."""
    own, every = outline.state_dict(), {**dict(outline.named_parameters()), **dict(outline.named_buffers())}
    wrong, shrunk = sorted(own.keys() ^ state.keys()), set(header.shrunk)
    for name in (name for name in own if name in state):
        new, old = state[name], own[name]
        fits = new.ndim == old.ndim and all(
            0 < a <= b if (name, dim) in shrunk else a == b
            for dim, (a, b) in enumerate(zip(new.shape, old.shape, strict=True))
        )
        if not fits or new.dtype.is_floating_point != old.dtype.is_floating_point:
            wrong.append(name)
    found = {}
    for name, dim, index in header.kept:
        size = every[name].shape[dim] if name in every and 0 <= dim < every[name].ndim else 0
        if name in own or not all(0 <= one < size for one in index) or not 0 < len(index) <= size:
            wrong.append(name)
        else:
            found[name, dim] = torch.tensor(index)
    if wrong:
        raise TicketError(
            f"{told} does not fit {shown(header.architecture)}: {len(wrong)} of its {len(state)} tensors are missing, "
            f"too many or too large ({', '.join(map(shown, wrong[:3]))})"
        )
    return found
