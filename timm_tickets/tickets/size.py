"""What a ticket's file weighs, part by part, against what information theory says it must."""

import math
from dataclasses import dataclass
from pathlib import Path

from .address import ticket_at
from .header import DTYPES, FORMAT
from .mask_coding import bound, coded_bits
from .reader import damage, open_
from .starts import PretrainedStart, SeedStart

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


@dataclass(frozen=True)
class LayerSize:
    """One mask's share of a file.

    Attributes:
        name: The weight's name.
        shape: Its shape.
        kept: Number of weights kept.
        free: Number that the search was free to choose from; the others' fate follows from a seed.
        bits: What the mask adds to the coded stream.
        bound: log2 of the number of masks with as many kept among the free.
        start: Bytes of its kept values; 0 where they are regenerated.
    """

    name: str
    shape: tuple[int, ...]
    kept: int
    free: int
    bits: float
    bound: float
    start: int


@dataclass(frozen=True)
class TicketSize:
    """A file's bytes. `masks`, `start`, `statistics`, `rest`, `header` and `padding` add up to `file`.

    Attributes:
        format: Format of the file.
        origin: Where the start comes from, in words.
        pretrained: timm's tag of the weights that loading needs, or None.
        layers: Each mask's share.
        masks: Bytes of the coded masks.
        start: Bytes of the kept weights' values.
        statistics: Bytes of the stored batch-norm statistics.
        rest: Bytes of every other stored value: biases, normalisation, classifier.
        header: Bytes of names, shapes, metadata and the envelope.
        padding: Bytes that only keep the file in proportion to the memory it needs.
        file: Bytes of the file.
        checkpoint: Bytes of the dense state dict's values, floating-point ones as float32.
    """

    format: int
    origin: str
    pretrained: str | None
    layers: tuple[LayerSize, ...]
    masks: int
    start: int
    statistics: int
    rest: int
    header: int
    padding: int
    file: int
    checkpoint: int

    @property
    def bound(self) -> float:
        """Bytes that the masks need at least: the sum of the layers' bounds."""
        return sum(layer.bound for layer in self.layers) / 8

    @property
    def values(self) -> int:
        """Bytes of all values in the file."""
        return self.start + self.statistics + self.rest


def weigh(path: str | Path) -> TicketSize:
    """Weigh a ticket's file. Only its header and sizes are read; `load_ticket` checks the contents.

    Raises:
        FileNotFoundError: There is no such file.
        TicketError: Not a ticket, or its sizes disagree.
    """
    path = ticket_at(path)
    with damage(path):
        opened = open_(path)
    header, tensors = opened.header, opened.tensors
    start, stored_as = header.start, header.stored_as
    frozen = [(0, 0)] * len(header.layers) if header.frozen is None else header.frozen.counts

    def stored(dtype: str) -> int:
        kind = DTYPES[dtype]
        return 2 if stored_as is not None and kind.is_floating_point else kind.itemsize

    regenerated = isinstance(start, SeedStart | PretrainedStart)
    layers = []
    for (name, shape, dtype, kept), (pruned, locked) in zip(header.layers, frozen, strict=True):
        free, chosen = math.prod(shape) - pruned - locked, kept - locked
        bits = coded_bits(free, chosen)
        size = 0 if regenerated else kept * stored(dtype)
        layers.append(LayerSize(name, tuple(shape), kept, free, bits, bound(free, chosen), size))
    statistics = rest = 0
    for name, shape, dtype, *where in header.rest:
        size = math.prod(shape) * stored(dtype) if where in ([], ["stored"]) else 0
        if name.rpartition(".")[2] in _STATISTICS:
            statistics += size
        else:
            rest += size
    checkpoint = sum(
        math.prod(shape) * (4 if DTYPES[dtype].is_floating_point else DTYPES[dtype].itemsize)
        for _, shape, dtype, *_ in (*header.layers, *header.rest)
    )
    masks = tensors["masks"].nbytes
    kept_values = sum(layer.start for layer in layers)
    padding = tensors["padding"].nbytes if "padding" in tensors else 0
    total = path.stat().st_size
    if isinstance(start, SeedStart):
        origin = f"{start.weights} weights drawn from seed {start.seed}, scale {start.scale}"
    elif isinstance(start, PretrainedStart):
        origin = f"pretrained weights {start.tag}, SHA-256 {start.sha256}"
    else:
        origin = "values of the kept weights" + (f", stored as {stored_as}" if stored_as else "")
    return TicketSize(
        format=FORMAT,
        origin=origin,
        pretrained=start.tag if isinstance(start, PretrainedStart) else None,
        layers=tuple(layers),
        masks=masks,
        start=kept_values,
        statistics=statistics,
        rest=rest,
        header=total - masks - kept_values - statistics - rest - padding,
        padding=padding,
        file=total,
        checkpoint=checkpoint,
    )
