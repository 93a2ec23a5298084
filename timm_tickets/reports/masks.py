"""What tickets' files hold: size, density by layer, and how much masks share beside what chance would share."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations, islice
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from ..config.recipe import Recipe
from ..core.errors import SettingError, shown
from ..core.masks import Masks
from ..pruning.registry import goes_on, list_pruners
from ..sparse.prunable import build_to_inspect
from ..tickets.compare import overlap
from ..tickets.publish import harmless
from ..tickets.reader import damage, open_, unpack_masks
from ..tickets.size import weigh
from ..tickets.starts import ValuesStart
from .read import Experiment

_MOST_PAIRS = 1_000  # of masks that are compared
_MOST_COMPARED = 10**10  # weights of them: 200 pairs of a ResNet-50, of which 1,000 would take minutes
_MOST_BYTES = 1 << 32  # of unpacked masks, a byte a weight


@dataclass(frozen=True)
class TicketFile:
    """What a ticket's file says.

    Attributes:
        pruner: That found it; "ticket" where the file does not say one that we know.
        kept: Weights kept of each layer.
        of: Weights of each layer.
        bytes: Of the file.
        checkpoint: Bytes of the dense network's fp32 checkpoint.
        trained: Whether its starting weights were trained before, in the search that found it.
        arguments: Of ``timm.create_model``, those that only shape the network.
        rounds: COLT's rounds: the share that all copies keep, and that by chance.
        versions: Of the packages that found it, in words.
    """

    pruner: str
    kept: dict[str, int]
    of: dict[str, int]
    bytes: int
    checkpoint: int
    trained: bool
    arguments: dict[str, Any]
    rounds: list[tuple[float, float]]
    versions: str

    @property
    def density(self) -> dict[str, float]:
        return {name: kept / self.of[name] for name, kept in self.kept.items()}


@lru_cache(maxsize=4096)
def ticket_file(experiment: Experiment) -> TicketFile:
    """What the file of an experiment's ticket says; its masks are not unpacked.

    Raises:
        FileNotFoundError, TicketError: It is not there, damaged, or another ticket than the experiment has found.
    """
    path = experiment.ticket
    size = weigh(path)
    with damage(path):
        header = open_(path).header
        if experiment.fingerprint not in (None, header.fingerprint):
            raise SettingError("it is not the ticket that was found here")
    pruner, model, versions = (_dict(header.metadata.get(key)) for key in ("pruner", "model", "versions"))
    name = known if (known := pruner.get("name")) in list_pruners() else "ticket"
    notes = header.metadata.get("notes")
    return TicketFile(
        pruner=name,
        kept={layer.name: layer.kept for layer in size.layers},
        of={layer.name: max(1, torch.Size(layer.shape).numel()) for layer in size.layers},
        bytes=size.file,
        checkpoint=size.checkpoint,
        trained=isinstance(header.start, ValuesStart) and _goes_on(pruner),
        arguments=harmless(_dict(model.get("kwargs"))),
        rounds=[*_rounds(notes if isinstance(notes, list) else [])],
        versions=", ".join(f"{shown(of, 20)} {shown(one, 20)}" for of, one in islice(versions.items(), 5)),
    )


def _goes_on(pruner: dict[str, Any]) -> bool:
    try:
        return goes_on(pruner) is not None
    except (SettingError, ValueError, KeyError, TypeError):  # of a pruner that nobody here knows
        return False


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _rounds(notes: Sequence[Any]) -> Iterator[tuple[float, float]]:
    for note in islice(notes, 1_000):
        kept, chance = (_dict(note).get(key) for key in ("kept_by_all", "by_chance"))
        if isinstance(kept, float) and isinstance(chance, float) and 0 <= kept <= 1 and 0 <= chance <= 1:
            yield kept, chance


@dataclass(frozen=True)
class Overlap:
    """How much two masks share: weights kept by both over weights kept by either, and that of chance."""

    first: Experiment
    second: Experiment
    iou: float
    by_chance: float


def overlaps(series: Sequence[Sequence[Experiment]]) -> tuple[list[Overlap], int]:
    """Of every pair of tickets of one series, and of two with the same seed; and how many pairs were left out.

    Where not all have room, each two series have a pair before any has a second, those of one sparsity first.

    Args:
        series: Experiments whose tickets' files are whole.
    """
    of = {one: number for number, group in enumerate(series) for one in group}
    before: Counter[tuple[int, int]] = Counter()
    ordered: list[tuple[tuple[int, bool], tuple[Experiment, Experiment]]] = []
    for a, b in combinations(of, 2):
        if (a.seed == b.seed) != (of[a] == of[b]):
            ordered.append(((before[of[a], of[b]], a.target != b.target), (a, b)))
            before[of[a], of[b]] += 1
    pairs = [pair for _, pair in sorted(ordered, key=lambda one: one[0])]
    unpacked: dict[Experiment, Masks] = {}

    def masks(one: Experiment) -> Masks:
        if one not in unpacked:
            with damage(one.ticket):
                unpacked[one] = unpack_masks(open_(one.ticket))
        return unpacked[one]

    found, room, work = [], _MOST_BYTES, _MOST_COMPARED
    for number, pair in enumerate(pairs):
        sizes = {one: sum(ticket_file(one).of.values()) for one in pair}
        room -= sum(size for one, size in sizes.items() if one not in unpacked)
        work -= sum(sizes.values())
        if number == _MOST_PAIRS or room < 0 or work < 0:
            return found, len(pairs) - number
        try:
            shared = overlap(*map(masks, pair))
        except SettingError:  # masks of other weights: include, exclude or classifier differ
            continue
        found.append(Overlap(*pair, shared["iou"], shared["by_chance"]))
    return found, 0


@dataclass(frozen=True)
class Costs:
    """A network's parameters and the multiply-accumulates of one image; these also of the kept weights alone."""

    parameters: int
    kept_parameters: int
    macs: int
    kept_macs: int


def costs(recipe: Recipe, file: TicketFile) -> Costs | None:
    """Counted by torch on a network without memory; None where it cannot be built so."""
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter, torch.device("meta"):
            model = build_to_inspect(recipe.model.model.partition(".")[0], file.arguments).eval()
            channels, *size = getattr(model, "pretrained_cfg", {}).get("input_size") or (3, 224, 224)
            size = [recipe.data.img_size] * 2 if recipe.data.img_size else size
            model(torch.zeros(1, file.arguments.get("in_chans", channels), *size))
    except Exception:  # a network that timm builds only with memory; whatever its code runs into
        return None
    by_module = {name: sum(ops.values()) // 2 for name, ops in counter.get_flop_counts().items()}
    top = type(model).__name__
    saved = sum(
        round(by_module.get(f"{top}.{name.rpartition('.')[0]}", 0) * (1 - density))
        for name, density in file.density.items()
    )
    parameters = sum(one.numel() for one in model.parameters())
    pruned = sum(file.of[name] - kept for name, kept in file.kept.items())
    macs = counter.get_total_flops() // 2
    return Costs(parameters, parameters - pruned, macs, macs - saved)
