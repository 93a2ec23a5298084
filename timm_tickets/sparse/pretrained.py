"""timm's pretrained weights by their name: whether a model has them, and where this machine or the network does."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import try_to_load_from_cache
from torch import Tensor, nn

from ..core.errors import TicketError, shown
from ..core.states import State

Shapes = Mapping[str, Sequence[int]]

_WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")


@dataclass(frozen=True)
class Pretrained:
    """Pretrained weights under timm's name for them.

    Attributes:
        tag: architecture.tag, as timm.list_pretrained() has it.
        state: State dict of the model that timm builds with these weights.
    """

    tag: str
    state: Mapping[str, Tensor] = field(repr=False)


def pretrained_tag(model: nn.Module) -> str | None:
    """timm's name of the weights that a model's architecture would get with ``pretrained=True``: architecture.tag.

    It says nothing of the weights the model has: a model that was never given them has the same tag.
    """
    config = getattr(model, "pretrained_cfg", None) or {}
    architecture, tag = config.get("architecture"), config.get("tag")
    has_weights = config.get("hf_hub_id") or config.get("url")
    return f"{architecture}.{tag}" if architecture and tag and has_weights else None


def cached_pretrained(tag: str, shapes: Shapes) -> Pretrained | None:
    """Pretrained weights by timm's name where this machine already has them; never the network.

    Args:
        tag: architecture.tag.
        shapes: Of the tensors they are for: timm fits the stem to its channels, and makes a head for its classes.

    Returns:
        None where timm does not know the tag, or has not stored its weights here.
    """
    if not timm.is_model_pretrained(tag):
        return None
    config = timm.get_pretrained_cfg(tag)
    file = None if config is None else _cached_file(config)
    if file is None:
        return None
    overlay = {"file": str(file), "source": ""}
    return Pretrained(tag, _built(tag, pretrained=True, pretrained_cfg_overlay=overlay, **sizes_of(tag, shapes)))


def is_pretrained(model: nn.Module, names: Sequence[str]) -> bool:
    """Whether parameters of a model are those of its timm tag bit for bit, as far as this machine has these."""
    tag = pretrained_tag(model)
    state = model.state_dict()
    found = None if tag is None else cached_pretrained(tag, {name: value.shape for name, value in state.items()})
    if found is None:
        return False
    return all(name in found.state and torch.equal(state[name].cpu(), found.state[name]) for name in names)


def sizes_of(tag: str, shapes: Shapes) -> dict[str, int]:
    """The classes and input channels of a model, as far as the shapes of its tensors say: arguments that build it.

    Args:
        tag: architecture.tag, of timm's own names: no address of a repository or a file.
        shapes: Of the model's tensors, by name.

    Raises:
        TicketError: timm does not know the tag, or there is a dimension of 0. The message lacks its subject, the file,
            whose path goes in front; so also `outline` and `fetch_pretrained`.
    """
    if not timm.is_model_pretrained(tag):
        raise TicketError(
            f"starts from the pretrained weights '{shown(tag)}', which this timm ({timm.__version__}) does not "
            "have; upgrade timm, or give their state dict: load_ticket(path, pretrained=state)"
        )
    config: Any = timm.get_pretrained_cfg(tag)
    sizes: dict[str, int] = {}
    # A linear stem (naflexvit's) has its patches' pixels there, not channels.
    for key, place, dimension, least in (
        ("num_classes", config.classifier, 0, 1),
        ("in_chans", config.first_conv, 1, 3),
    ):
        shape = shapes.get(f"{place}.weight", ()) if isinstance(place, str) else ()
        if len(shape) >= least:
            sizes[key] = shape[dimension]
            if sizes[key] < 1:
                raise TicketError(f"is damaged: {place}.weight has the shape {list(shape)}, which gives {key}=0")
    return sizes


def outline(tag: str, sizes: Mapping[str, int]) -> State:
    """The state dict of an architecture on the meta device, where nothing is allocated: at most 1.7 s and 16 MiB.

    Args:
        tag: architecture.tag.
        sizes: What `sizes_of` returned.

    Raises:
        TicketError: The architecture cannot have these sizes.
    """
    try:
        with torch.device("meta"):
            return _built(tag, **sizes)
    except Exception as error:  # each architecture has its own ways to fail
        raise TicketError(
            f"starts from the pretrained weights '{shown(tag)}', whose architecture cannot be built with "
            f"{dict(sizes)}: {shown(str(error), 300)}"
        ) from None


def fetch_pretrained(tag: str, sizes: Mapping[str, int]) -> State:
    """Pretrained weights by timm's name, downloaded by timm where they are not stored yet.

    Args:
        tag: architecture.tag.
        sizes: What `sizes_of` returned; `outline` shows beforehand what becomes of them.

    Raises:
        TicketError: timm cannot load the weights.
    """
    try:
        return _built(tag, pretrained=True, **sizes)
    except Exception as error:  # whatever the hub, the network or the disk has to say
        raise TicketError(
            f"starts from the pretrained weights '{shown(tag)}', which timm cannot load here "
            f"({shown(str(error), 500)}); make them reachable, or give their state dict: "
            "load_ticket(path, pretrained=state)"
        ) from error


def _built(tag: str, **arguments: Any) -> State:
    with torch.random.fork_rng(devices=[]):  # building draws a head; the caller's random numbers are not to change
        return timm.create_model(tag, **arguments).state_dict()


def _cached_file(config: Any) -> Path | None:
    """Where a pretrained configuration's weights are stored on this machine."""
    if config.hf_hub_id:
        repository, _, revision = config.hf_hub_id.partition("@")
        for name in (config.hf_hub_filename,) if config.hf_hub_filename else _WEIGHT_FILES:
            found = try_to_load_from_cache(repository, name, revision=revision or None)
            if isinstance(found, str):
                return Path(found)
    if config.url:
        found = Path(torch.hub.get_dir()) / "checkpoints" / os.path.basename(config.url)
        return found if found.is_file() else None
    return None
