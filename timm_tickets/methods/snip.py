"""SNIP: single-shot pruning by connection sensitivity.

Source: Lee et al. 2018, 1810.02340.
"""

import warnings
from collections.abc import Callable, Generator, Mapping
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

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
        (end,) = yield [reading_run(self.batches, _add_gradients)]
        subnet.rewind_()
        warn_of_blind_layers(self.name, end.scores)
        assert subnet.start is not None  # where the weights are now, on the CPU already
        self.prune_(subnet, snip(subnet.start, end.scores))

    def runs(self, subnet: Subnet) -> int:
        return 1


def reading_run(batches: int, add: Callable[[Run, Tensor], Tensor]) -> Run:
    """A short run that adds up something of the loss of a few batches, all of them at the same weights."""

    def on_loss(run: Run, loss: Tensor) -> Tensor:
        return add(run, loss) if run.batches < batches else loss

    return Run(
        epochs=1, limit=batches, reads=("scores",), on_loss=on_loss, after_step=_restore if batches > 1 else None
    )


def warn_of_blind_layers(pruner: str, gradients: Mapping[str, Tensor]) -> None:
    """Say which layers no gradient reaches: all of their scores are 0, so they are cut first, whatever they are worth.

    timm starts the last scale of a residual branch at zero in many models; what is before it has no gradient then.
    """
    blind = [name for name, gradient in gradients.items() if not gradient.any()]
    if blind:
        warnings.warn(
            f"{pruner}: no gradient reaches {len(blind)} of {len(gradients)} layers ({blind[0]} is one), so their "
            "scores say nothing; build the model with zero_init_last=False where it has that argument, or prune a "
            "trained one",
            stacklevel=2,
        )


def _add_gradients(run: Run, loss: Tensor) -> Tensor:
    weights = run.subnet.parameters()
    for name, gradient in zip(
        weights, torch.autograd.grad(loss, list(weights.values()), retain_graph=True), strict=True
    ):
        run.scores[name] = run.scores.get(name, 0) + gathered(gradient)
    return loss


def gathered(reading: Tensor) -> Tensor:
    """On the CPU, where scores are compared; several processes' on their devices, where they are averaged."""
    return reading if world_size() > 1 else reading.cpu()


def _restore(run: Run) -> None:
    """Undo the optimizer's step and batch normalisation's statistics, for the next batch."""
    assert run.subnet.start is not None
    run.subnet.load_(run.subnet.start)
