"""Run: one training as a method asks for it; and its place in the search."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BeforeValidator, Field
from torch import Tensor

from ..core.errors import shown
from ..sparse.subnet import Subnet

if TYPE_CHECKING:  # what a run becomes when the pruner asks for it; the request itself needs none of it
    from .training import Training


def rewind_parts(point: str) -> tuple[int, str]:
    """Number and unit of a rewind point: ``'500it'`` is ``(500, 'it')``."""
    found = re.fullmatch(r"(\d+)(ep|it)", point)
    if found is None:
        raise ValueError(f"{point!r} is not valid; write epochs as '2ep' or optimizer steps as '500it'")
    return int(found[1]), found[2]


def _point(value: Any) -> str:
    text = value if isinstance(value, str) else repr(value)
    rewind_parts(shown(text))
    return text


Rewind = Annotated[
    str,
    BeforeValidator(_point),
    Field(
        pattern=r"^\d+(ep|it)$",
        description="step the weights return to: '0ep' is their initialisation, '2ep' after 2 epochs, '500it' steps",
    ),
]


@dataclass(frozen=True, eq=False, repr=False)
class Run:
    """A training that a method asks for; the pruner gives the user a `Training` of it.

    Attributes:
        epochs: Length of the whole schedule, in epochs; the method's own `epochs` where None.
        classes: Train on these classes only, as if the head had only these; all where None.
        data_part: ``(i, n)``: train on the i-th of n random parts of the images; all where None.
        read: Makes this a run that reads gradients and is no training; it is not scored. Called for each batch with the
            training and a function that gives the batch's loss again, in the weights' own precision and from a forward
            pass of its own, so that neither autocast nor fused attention stands in the way of a second derivative. Its
            argument is a temperature that the logits are divided by.
        limit: With ``read``, read so many batches of the loader, drawn by the seed.
        images_per_class: With ``read``, read so many images of each class, drawn by the seed.
        rewind: Where in this run the rewind point is taken; nowhere where None. That of a round's only run becomes the
            subnet's at once; of several the method chooses.
        from_rewind: Whether it starts from the rewind point, so that its schedule goes on from there.
        setup: Called on the subnet before the run starts: the run's own starting state.
        on_loss: Given the training and its loss, before backward; returns the loss to go backward from (a penalty
            added).
        before_step: Called before each optimizer step, when the gradients are there, masked, to be added to.
        schedule: Given the fraction of the schedule that is done, in [0, 1]; returns numbers by name. They are put
            beside the weights before each step (`subnet.now`), as they are to be once it is taken, and never read back.
        each_step: Called after each optimizer step with tensors alone, so that it can be a part of a step that is
            compiled or captured: what moves with the steps it reads from `subnet.now`, nothing is counted or decided in
            Python.
        after_step: Called after each optimizer step, and after ``each_step``, in Python: for what is seldom done.
        settle: Called before the model is scored and at the end: brings the mask up to date with learned scores.
        weight_decay: Of learned scores; the optimizer's own goes on for everything else.
    """

    epochs: int | None = None
    classes: Sequence[int] | None = None
    data_part: tuple[int, int] | None = None
    read: "Callable[[Training, Callable[..., Tensor]], None] | None" = None
    limit: int | None = None
    images_per_class: int | None = None
    rewind: str | None = None
    from_rewind: bool = False
    setup: Callable[[Subnet], None] | None = None
    on_loss: "Callable[[Training, Tensor], Tensor] | None" = None
    before_step: "Callable[[Training], None] | None" = None
    schedule: Callable[[float], dict[str, float]] | None = None
    each_step: "Callable[[Training], None] | None" = None
    after_step: "Callable[[Training], None] | None" = None
    settle: Callable[[Subnet], None] | None = None
    weight_decay: float = 0.0

    @property
    def moves(self) -> bool:
        """Whether something of the method happens with the steps: its mask may move within the run."""
        return self.each_step is not None or self.after_step is not None

    @property
    def penalised(self) -> bool:
        """Whether the method adds to the loss or the gradients: then it trains no network as the recipe alone would."""
        return self.on_loss is not None or self.before_step is not None

    def __repr__(self) -> str:
        asked = {one.name: getattr(self, one.name) for one in fields(self) if getattr(self, one.name) != one.default}
        words = {k: getattr(value, "__name__", "...") if callable(value) else repr(value) for k, value in asked.items()}
        return f"Run({', '.join(f'{key}={word}' for key, word in words.items())})"


@dataclass(frozen=True)
class Place:
    """Where in a search a run is.

    Attributes:
        name: Name of its folder.
        index: Its number in the whole search, from 0.
        round: Number of its round, from 0.
        part: Its number within the round, from 0.
        single: Whether it is the only run of its round.
        processes: How many processes train it, by themselves (within `processes.apart`), while others may train the
            other runs of its round; None where all of them train it.
        follows: The search it is of and a digest of what the runs before it ended with; None where nobody knows.
    """

    name: str = "round_00"
    index: int = 0
    round: int = 0
    part: int = 0
    single: bool = True
    processes: int | None = None
    follows: str | None = None


class Placed:
    """What a run says of its place."""

    place: Place

    @property
    def name(self) -> str:
        """Name of its folder: ``round_00``, or ``round_00_part_1`` where a round has several."""
        return self.place.name

    @property
    def index(self) -> int:
        """Its number in the whole search, from 0."""
        return self.place.index

    @property
    def round(self) -> int:
        """Number of its round, from 0."""
        return self.place.round

    @property
    def part(self) -> int:
        """Its number within the round, from 0."""
        return self.place.part

    @property
    def processes(self) -> int | None:
        """How many processes train it by themselves (within `processes.apart`); None where all of them do."""
        return self.place.processes
