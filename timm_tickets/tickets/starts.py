"""Where a ticket's weights come from: values in its file, a seed they are drawn from again, or timm's pretrained ones.

A method says where its start comes from as `Subnet.origin`, a claim in JSON types that a ticket keeps among its
metadata under ``origin``. Nothing is taken on trust: what a claim would leave out of a file is made again while the
file is written and compared bit for bit; where one bit differs, the values are written instead.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from ..core.draws import MAX_SEED, Kind, draw, frozen

Count = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]
Scale = Literal["none", "static", "dynamic"]


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
