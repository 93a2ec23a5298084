"""torch-pruning's first-order Taylor importance.

Source: Molchanov et al. 2019, 1906.10771; torch-pruning's ``TaylorImportance``.
"""

from collections.abc import Callable, Generator
from functools import partial
from typing import Annotated, Any, ClassVar

from pydantic import Field
from torch import Tensor

from ...core.masks import Scores
from ...pruning.registry import register_pruner
from ...pruning.run import Run
from ...pruning.run_end import End
from ...pruning.training import Training
from ...sparse.subnet import Subnet
from ..snip import gradients, reading_run
from .criterion import Criterion


@register_pruner("tp_taylor")
class TPTaylor(Criterion):
    """Prune the channels whose removal changes the loss least to first order, on a few batches: torch-pruning's Taylor.

    Use: on a trained or pretrained model as it is; with ``rounds``, trained first.
    Cost: `rounds` trainings, and `batches` gradients before each cut; the weights are restored after the short run.
    Departures: groups are this package's; the gradients of several batches are added.
    """

    reads_gradients: ClassVar[bool] = True
    batches: Annotated[int, Field(ge=1, description="batches to read gradients from")] = 1

    def importance(self, tp: Any) -> Any:
        return tp.importance.TaylorImportance()

    def read(self, subnet: Subnet) -> Generator[list[Run], list[End], Scores]:
        names = {name for name, _ in (*self.channels.groups.of, *self.channels.groups.vectors)}
        point, epoch = subnet.start, subnet.start_epoch
        subnet.restart_()  # a short run returns to where the search began, and here that is the trained weights
        (end,) = yield [reading_run(partial(add_gradients, names), limit=self.batches)]
        subnet.rewind_()
        found = dict(end.scores)
        assert point is not None  # there in every search that does not end trained
        subnet.set_start_(point, epoch)
        return found

    def runs(self, subnet: Subnet) -> int:
        return self.rounds + max(1, self.rounds)


def add_gradients(names: set[str], run: Training, loss: Callable[..., Tensor]) -> None:
    """Add this batch's gradients of the named parameters to the run's scores."""
    named = run.subnet.model.named_parameters()
    run.add_scores_(gradients(loss(), {name: one for name, one in named if name in names and one.requires_grad}))
