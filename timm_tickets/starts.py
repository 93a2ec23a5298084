"""Where a ticket's weights come from: values in its file, a seed they are drawn from again, or timm's pretrained ones.

A method says where its start comes from as `Subnet.origin`, a claim in JSON types that a ticket keeps among its
metadata under ``origin``. Nothing is taken on trust: what a claim would leave out of a file is made again while the
file is written and compared bit for bit; where one bit differs, the values are written instead.
"""

import hashlib
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import timm
import torch
from huggingface_hub import try_to_load_from_cache
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn

from .draws import MAX_SEED, Kind, draw, frozen
from .settings import TicketError, shown

State = dict[str, Tensor]
Shapes = Mapping[str, Sequence[int]]
Count = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]
Scale = Literal["none", "static", "dynamic"]
_WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")


class Origin(BaseModel):
    """What a method can say of its start.

    Attributes:
        start: ``seed``: every prunable weight is drawn by `draws.draw`; ``pretrained``: they are timm's.
        seed: Of the drawn weights and of the freezing pattern.
        weights: How they are drawn.
        scale: What kept weights are multiplied with: 1, or 1/sqrt(density) of the ticket or of the layer.
        frozen: For each layer how many weights left the search as pruned and as kept, chosen by `draws.frozen`.
        tag: timm's name of the pretrained weights, architecture.tag.
    """

    start: Literal["values", "seed", "pretrained"] = "values"
    seed: Seed | None = None
    weights: Kind | None = None
    scale: Scale = "none"
    frozen: list[tuple[Count, Count]] | None = None
    tag: str | None = None

    @classmethod
    def of(cls, metadata: Mapping[str, Any]) -> "Origin":
        """The claim in a ticket's metadata; one that cannot be read claims nothing."""
        try:
            return cls.model_validate(metadata.get("origin") or {})
        except ValidationError:
            return cls()


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ValuesStart(_Part):
    kind: Literal["values"] = "values"


class SeedStart(_Part):
    kind: Literal["seed"] = "seed"
    seed: Seed
    weights: Kind
    scale: Scale


class PretrainedStart(_Part):
    """``sha256`` is `digest` of the pretrained tensors that the ticket needs."""

    kind: Literal["pretrained"] = "pretrained"
    tag: str
    sha256: str


class Frozen(_Part):
    """The freezing pattern: its seed and, for each layer, how many are pruned and how many kept for good."""

    seed: Seed
    counts: list[tuple[Count, Count]]

    def patterns(self, sizes: Sequence[int]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """For each layer, flat bool arrays: frozen as pruned, frozen as kept."""
        for number, (size, (pruned, locked)) in enumerate(zip(sizes, self.counts, strict=True)):
            yield frozen(size, pruned, locked, self.seed, number)


Start = Annotated[ValuesStart | SeedStart | PretrainedStart, Field(discriminator="kind")]


@dataclass(frozen=True)
class Pretrained:
    """Pretrained weights under timm's name for them.

    Attributes:
        tag: architecture.tag, as timm.list_pretrained() has it.
        state: State dict of the model that timm builds with these weights.
    """

    tag: str
    state: Mapping[str, Tensor] = field(repr=False)


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


def drawn(start: SeedStart, shapes: Sequence[Sequence[int]], kept: Sequence[int]) -> Iterator[Tensor]:
    """The weights of each layer as they were before the mask: float32, drawn again and scaled.

    The scale is ``1 / sqrt(kept / size)`` in double precision, rounded to float32, and multiplied in float32: the same
    operations as in a search, each exactly rounded.
    """
    whole = sum(kept) / sum(math.prod(shape) for shape in shapes)
    for number, (shape, count) in enumerate(zip(shapes, kept, strict=True)):
        density = {"none": 1.0, "static": whole, "dynamic": count / math.prod(shape)}[start.scale]
        factor = np.float32(1 / math.sqrt(density) if density else 1.0)
        yield torch.from_numpy(draw(start.weights, shape, start.seed, number) * factor)


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
