"""SNIP: single-shot pruning by connection sensitivity.

Source: Lee et al. 2018, 1810.02340.
"""

from collections.abc import Callable, Generator, Mapping
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from ..core.scores import snip
from ..pruning.method import OneShot
from ..pruning.registry import register_pruner
from ..pruning.run import Run
from ..pruning.run_end import End
from ..pruning.training import Training
from ..sparse.blind import warn_of_blind_scores
from ..sparse.subnet import Subnet


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
        subnet.set_mask_(self.cut(subnet.mask, snip(subnet.start, end.scores)))

    def runs(self, subnet: Subnet) -> int:
        return 1


def reading_run(
    read: Callable[[Training, Callable[..., Tensor]], None],
    limit: int | None = None,
    images_per_class: int | None = None,
) -> Run:
    """A short run that adds up something of the gradients of a few images, all of them at the same weights."""
    return Run(epochs=1, read=read, limit=limit, images_per_class=images_per_class, after_step=Training.undo_step_)


def add_gradients(run: Training, loss: Callable[..., Tensor]) -> None:
    """Add this batch's gradients to the run's scores."""
    run.add_scores_(gradients(loss(), run.subnet.parameters()))


def gradients(value: Tensor, weights: Mapping[str, Tensor], graph: bool = False) -> dict[str, Tensor]:
    """The gradient of a scalar with respect to each weight; with its graph where it is to be differentiated again."""
    found = torch.autograd.grad(value, list(weights.values()), create_graph=graph, materialize_grads=True)
    return dict(zip(weights, found, strict=True))
