"""SNIP: single-shot pruning by connection sensitivity.

Source: Lee et al. 2018, 1810.02340.
"""

from collections.abc import Callable, Generator, Iterable
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from ..blind import warn_of_blind_scores
from ..end import End
from ..method import OneShot
from ..processes import world_size
from ..registry import register_pruner
from ..run import Run
from ..scores import snip
from ..subnet import Subnet


@register_pruner("snip")
class SNIP(OneShot):
    """Prune once, before training, the weights whose removal changes the loss least, on a few batches.

    Suggested: one batch that holds several images of each class, or several batches.
    Cost: `batches` gradients; the weights are restored after the short run.
    Departures: the gradients of several batches are added before the product with the weight; the paper has one batch.
    """

    reads_gradients: ClassVar[bool] = True
    batches: Annotated[int, Field(ge=1, description="batches to read gradients from")] = 1

    def search(self, subnet: Subnet) -> Generator[list[Run], list[End], None]:
        (end,) = yield [reading_run(add_gradients, limit=self.batches)]
        subnet.rewind_()
        warn_of_blind_scores(self.name, subnet.names, end.scores)
        assert subnet.start is not None  # where the weights are now, on the CPU already
        self.prune_(subnet, snip(subnet.start, end.scores))

    def runs(self, subnet: Subnet) -> int:
        return 1


def reading_run(
    read: Callable[[Run, Callable[..., Tensor]], None], limit: int | None = None, images_per_class: int | None = None
) -> Run:
    """A short run that adds up something of the gradients of a few images, all of them at the same weights."""
    return Run(
        epochs=1, read=read, limit=limit, images_per_class=images_per_class, reads=("scores",), after_step=_restore
    )


def add_gradients(run: Run, loss: Callable[..., Tensor]) -> None:
    """Add this batch's gradients to the run's scores."""
    weights = run.subnet.parameters()
    add(run, weights, torch.autograd.grad(loss(), list(weights.values()), materialize_grads=True))


def add(run: Run, names: Iterable[str], readings: Iterable[Tensor]) -> None:
    """Add readings to the run's scores, on the CPU where scores are compared, unless processes have to average them."""
    for name, reading in zip(names, readings, strict=True):
        run.scores[name] = run.scores.get(name, 0) + (reading if world_size() > 1 else reading.cpu())


def _restore(run: Run) -> None:
    """Undo the optimizer's step and batch normalisation's statistics, for the next batch."""
    assert run.subnet.start is not None
    run.subnet.load_(run.subnet.start)
