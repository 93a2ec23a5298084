"""What is exported: a model from a ticket or from what a search has trained, and whose weights it has."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import timm
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from timm.models import load_state_dict
from torch import Tensor, nn

from ..core.errors import SettingError, TicketError, check, shown
from ..pruning.registry import get_method, list_pruners
from ..sparse import networks  # noqa: F401 - a ticket may name them: they have to be registered with timm
from ..sparse.prunable import build_to_inspect, inspect_model
from ..storage.files import read_json, read_state
from ..tickets.address import LOCAL, ticket_at
from ..tickets.publish import harmless
from ..tickets.ticket import Ticket, load_ticket
from .compact_file import compact_header, load_compact

MODEL, CONFIG, TICKET = "model.safetensors", "config.json", "model.ticket"
_TRAINED = (MODEL, "model_best.safetensors", "model_ema.safetensors")


class Images(BaseModel):
    """What a model takes: float images, and how they are made of pixels in [0, 1].

    Attributes:
        input_size: Channels, height, width.
        mean: Taken off each channel.
        std: What each channel is then divided by.
    """

    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def told(self) -> str:
        mean, std = (" ".join(f"{value:.4g}" for value in values) for values in (self.mean, self.std))
        return f"float32, {' x '.join(map(str, self.input_size))}, pixels in [0, 1] less {mean}, over {std}"


class Built(BaseModel):
    """What timm builds a model from; the arguments are those that only shape it."""

    architecture: str
    arguments: dict[str, Any] = Field(default_factory=dict)


@dataclass(frozen=True)
class Source:
    """A sparse model to export.

    Attributes:
        model: Plain timm, in evaluation mode, its pruned weights zero.
        name: For the names of files.
        told: Whose weights these are, in words.
        trained: Whether they are trained; None where nothing says so.
        built: What timm builds it from.
        images: What it takes.
        ticket: The ticket, where it comes from one.
        folder: What a search has left, where the weights come from there.
        compact: Whether channels are gone, so that it is smaller than what timm builds.
    """

    model: nn.Module = field(repr=False)
    name: str
    told: str
    trained: bool | None
    built: Built
    images: Images
    ticket: Ticket | None = field(default=None, repr=False)
    folder: Path | None = None
    compact: bool = False

    @property
    def facts(self) -> dict[str, str]:
        """What a file says of the model beside its weights: text by name."""
        return {
            "architecture": self.built.architecture,
            "arguments": json.dumps(self.built.arguments),
            "images": self.images.model_dump_json(),
            "weights": self.told,
        }


def load_source(
    address: str | Path,
    weights: str | Path | None = None,
    image_size: int | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> Source:
    """Read what is to be exported.

    Args:
        address: A ticket (a file, ``hf-hub:user/name``, ``local-dir:path``); or a folder that a search or a training
            has left, or one of its rounds, or the model.safetensors in one: then the trained weights; or a compact
            model's file.
        weights: For a ticket: a checkpoint with the weights that were trained under it.
        image_size: Height and width of an image in pixels; that of the search where its folder says so, else timm's.
        arguments: Further ones of ``timm.create_model``, where a ticket does not say them.

    Raises:
        OSError: It is not there, or cannot be read.
        SettingError: timm cannot build the architecture, or it takes no images of this size.
        TicketError: It is neither a ticket nor trained weights with their config.json, or they do not fit.
    """
    path = Path(str(address).removeprefix(LOCAL))
    if (found := _trained_at(path)) is not None and not (str(address).startswith(LOCAL) and (path / TICKET).is_file()):
        if weights is not None:
            raise SettingError(f"weights: {path} has its own; name the ticket to export other weights under it")
        source = _of_folder(*found, arguments or {})
    elif path.is_file() and (header := compact_header(path)) is not None:
        if weights is not None:
            raise SettingError(f"weights: {path} has its own; leave it out")
        source = _of_compact(path, header)
    else:
        source = _of_ticket(address, weights, arguments or {})
    channels, *_ = size = source.images.input_size
    if image_size is not None:
        size = (channels, image_size, image_size)
    _check_size(source.model, size)
    return replace(source, images=source.images.model_copy(update={"input_size": size}))


def zeros(model: nn.Module) -> dict[str, Tensor]:
    """Masks of the prunable weights that have zeros, the classifier's too: False where a weight is exactly zero."""
    weights = dict(model.named_parameters())
    names = [part.name for part in inspect_model(model, classifier=True) if not part.why_not]
    masks = {name: weights[name].detach() != 0 for name in names}
    return {name: mask for name, mask in masks.items() if not mask.all()}


def rebuilt(built: Built, state: Mapping[str, Tensor] | None, told: str) -> nn.Module:
    """A fresh model, in evaluation mode, for a state dict that is compared with it before memory is taken.

    Args:
        built: What timm builds it from.
        state: The state dict; it is not loaded. None compares nothing.
        told: Whose both are, for messages.

    Raises:
        SettingError: timm cannot build it.
        TicketError: They do not fit.
    """
    if not timm.is_model(built.architecture):
        told = f"{told} is for '{shown(built.architecture)}', which this timm ({timm.__version__}) does not have"
        raise SettingError(f"architecture: {told}; import the module that registers it, or another timm")
    with torch.random.fork_rng(devices=[]):  # building draws weights; the caller's random numbers are not to change
        if state is not None:
            check_fits(build_to_inspect(built.architecture, built.arguments).state_dict(), state, told)
        return build_to_inspect(built.architecture, built.arguments, "cpu").eval().requires_grad_(False)


def check_fits(own: Mapping[str, Tensor], state: Mapping[str, Tensor], told: str) -> None:
    """Refuse a state dict that is not this model's.

    Raises:
        TicketError: It is not.
    """
    missing, extra = [[*(own.keys() - state)], [*(state.keys() - own)]]
    unlike = [name for name in own if name in state and own[name].shape != state[name].shape]
    if missing or extra or unlike:
        parts = (("lacks", missing), ("has besides", extra), ("has in another shape", unlike))
        wrong = [f"{word} {len(names)} ({', '.join(map(shown, sorted(names)[:3]))})" for word, names in parts if names]
        raise TicketError(
            f"{told} does not fit the model: of its {len(own)} tensors it {'; '.join(wrong)}; give the architecture "
            "what it was built with: --model-kwargs KEY=VALUE, such as --model-kwargs img_size=64"
        )


def _trained_at(path: Path) -> tuple[Path, Path] | None:
    """The weights and the config.json of a folder that a search has left, of a round of it, or of the file in one."""
    file = path / MODEL if path.is_dir() else path
    if file.name not in _TRAINED or not file.is_file():
        return None
    places = (file.parent / CONFIG, file.absolute().parent.parent / CONFIG)
    return next(((file, place) for place in places if place.is_file()), None)


def _of_folder(file: Path, config: Path, arguments: Mapping[str, Any]) -> Source:
    """The trained weights of a search's folder."""
    told = _config(config)
    given = {"num_classes": told.num_classes} if told.num_classes is not None else {}
    built = Built(architecture=told.architecture, arguments={**given, **harmless(told.model_args), **arguments})
    state = read_state(file)
    model = rebuilt(built, state, str(file))
    model.load_state_dict(state)
    folder, place = config.absolute().parent, file.absolute().parent
    ours = (folder / "result.json").is_file() or (place / "run.json").is_file()
    name = folder.name if place == folder else f"{folder.name}_{place.name}"
    name += file.stem.removeprefix("model")
    images = told.pretrained_cfg or _images(model)
    return Source(model, name, f"{file}" + ", as trained" * ours, ours or None, built, images, folder=folder)


def _of_compact(path: Path, header: Mapping[str, Any]) -> Source:
    """A compact model, with the weights that its file has."""
    model = load_compact(path).requires_grad_(False)
    built, told = Built(architecture=header["architecture"], arguments=harmless(header["arguments"])), header["told"]
    try:
        images = Images.model_validate_json(told["images"]) if "images" in told else _images(model)
    except ValidationError as error:
        raise TicketError(f"{path} is damaged: of its images: {shown(str(error), 300)}") from None
    whose = shown(told["weights"], 500) if "weights" in told else "it does not say whether they are trained"
    trained = False if "NOT TRAINED" in whose else None
    return Source(model, path.stem, f"{path}: {whose}", trained, built, images, compact=True)


def _of_ticket(address: str | Path, weights: str | Path | None, arguments: Mapping[str, Any]) -> Source:
    """A ticket's weights, or those that were trained under it."""
    path = ticket_at(address)
    ticket = load_ticket(path)
    facts = _part(ticket, "model")
    sizes = {key: facts[key] for key in ("num_classes", "in_chans") if isinstance(facts.get(key), int)}
    own = harmless(kwargs if isinstance(kwargs := facts.get("kwargs"), dict) else {})
    if not isinstance(facts.get("architecture"), str):
        raise TicketError(f"{path} does not say its architecture, so no model can be built for it; export it in Python")
    built = Built(architecture=facts["architecture"], arguments={**sizes, **own, **arguments})
    model = ticket.apply_(rebuilt(built, ticket.values, str(path)))
    told, trained = _whose(ticket, path)
    if weights is not None:
        told, trained = f"{weights}, trained under {path}", True
        state = _checkpoint(Path(weights))
        check_fits(model.state_dict(), state, str(weights))
        model.load_state_dict(state)
        _check_zeros(model, ticket, weights)
    images, config = _images(model), path.parent / CONFIG
    if config.is_file() and (left := _config(config)).architecture == built.architecture and left.pretrained_cfg:
        images = left.pretrained_cfg
    return Source(model, re.sub(r"\.ticket$", "", path.name), told, trained, built, images, ticket)


def _whose(ticket: Ticket, path: Path) -> tuple[str, bool | None]:
    """Whose weights a ticket has, in words, and whether they are trained."""
    name = _part(ticket, "pruner").get("name")
    epoch = ticket.metadata.get("start_epoch")
    known = name in list_pruners()
    if known and get_method(name).ends_trained and "transferred_from" not in ticket.metadata:
        return f"{path}: the weights that {name} ended its search with", True
    if not known:
        return f"{path}: the ticket's weights; it does not say whether they are trained", None
    rewound = f"those of epoch {epoch:g}" if epoch else "those before training"
    trained = path.parent if _trained_at(path.parent) else None
    instead = f"the trained ones are {trained}" if trained else "give the trained ones with --weights CHECKPOINT"
    return f"{path}: NOT TRAINED: the weights that the ticket starts from, {rewound}; {instead}", False


def _part(ticket: Ticket, key: str) -> dict[str, Any]:
    found = ticket.metadata.get(key)
    return found if isinstance(found, dict) else {}


def _checkpoint(path: Path) -> dict[str, Tensor]:
    """The state dict of a checkpoint of timm's train.py, or of safetensors; nothing in it is executed."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint at {path}")
    try:
        return load_state_dict(str(path), weights_only=True)
    except Exception as error:  # timm's, torch's, pickle's and safetensors' own
        raise TicketError(f"{path} is no checkpoint of a model: {shown(' '.join(str(error).split()), 300)}") from None


def _check_zeros(model: nn.Module, ticket: Ticket, path: str | Path) -> None:
    """Refuse weights that were not trained under the ticket."""
    state = dict(model.named_parameters())
    grown = {name: int((state[name][~mask] != 0).sum()) for name, mask in ticket.masks.items()}
    if any(grown.values()):
        names = [name for name, count in grown.items() if count]
        raise TicketError(
            f"{path} was not trained under this ticket: {sum(grown.values()):,} of its pruned weights are not zero, in "
            f"{len(names)} of {len(grown)} layers ({', '.join(map(shown, names[:3]))}); train with ticket.attach, or "
            "give the checkpoint that belongs to it"
        )


class _Config(BaseModel):
    """The part of a timm config.json that is read here."""

    model_config = ConfigDict(protected_namespaces=())  # pydantic 2.9 warns of fields that begin with "model_"
    architecture: str
    num_classes: int | None = None
    model_args: dict[str, Any] = Field(default_factory=dict)
    pretrained_cfg: Images | None = None


def _config(path: Path) -> _Config:
    found = read_json(path)
    return check(_Config, found if isinstance(found, dict) else {}, str(path))


def _images(model: Any) -> Images:
    """What timm says that a model takes."""
    config = dict(getattr(model, "pretrained_cfg", None) or {})
    channels, height, width = config.get("input_size") or (3, 224, 224)
    own = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if config.get("fixed_input_size") and own is not None:
        height, width = own
    stem = dict(model.named_parameters()).get(f"{config.get('first_conv')}.weight")
    channels = stem.shape[1] if stem is not None and stem.ndim == 4 else channels
    mean, std = (tuple(config.get(key) or (value,)) for key, value in (("mean", 0.5), ("std", 0.5)))
    mean, std = (values if len(values) == channels else (values[0],) * channels for values in (mean, std))
    return Images(input_size=(channels, height, width), mean=mean, std=std)


@torch.no_grad()
def _check_size(model: nn.Module, size: tuple[int, int, int]) -> None:
    try:
        model(torch.zeros(1, *size))
    except (RuntimeError, ValueError, AssertionError, IndexError, TypeError) as error:
        raise SettingError(
            f"image-size: images of {' x '.join(map(str, size))} do not go through the model: "
            f"{shown(str(error) or type(error).__name__, 400)}; set another --image-size"
        ) from error
