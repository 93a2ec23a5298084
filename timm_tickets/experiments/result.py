"""What an experiment leaves, and how its trainings are shared among the processes."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config.recipe import Recipe
from ..pruning.pruner import Parallel
from ..tickets.ticket import Ticket
from .controls import Trainers


@dataclass(frozen=True)
class Result:
    """What an experiment left.

    Attributes:
        folder: The run folder.
        ticket: The final ticket, its metrics in its metadata.
        rows: One record a training, as in summary.csv.
    """

    folder: Path
    ticket: Ticket
    rows: list[dict[str, Any]] = field(repr=False)


def parallel_of(recipe: Recipe, trainers: Trainers) -> Parallel:
    """As asked, but that what spans the processes, a split model or synchronised statistics, is not handed out."""
    spans = trainers.of(trainers.parallel == "runs").splits or recipe.training.sync_bn
    return "data" if spans and trainers.parallel == "auto" else trainers.parallel


def hands_out(parallel: Parallel, count: int, groups: int) -> bool:
    """Whether each group trains its own of so many independent trainings, instead of all processes each together."""
    return groups > 1 and (parallel == "runs" or (parallel == "auto" and count >= groups))
