"""GraSP: pruning before training that preserves the flow of gradients.

Source: Wang et al. 2020, 2002.07376.
"""

from collections.abc import Generator
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from ..end import End
from ..method import OneShot
from ..registry import register_pruner
from ..run import Run
from ..scores import grasp
from ..subnet import Subnet
from ..wrappers import mean_over_processes
from .snip import gathered, reading_run, warn_of_blind_layers


@register_pruner("grasp")
class GraSP(OneShot):
    """Prune once, before training, the weights whose removal least reduces the gradient's norm.

    Needs a second derivative: the model must not be compiled, and kernels without one (some fused attentions) fail.
    Suggested: ten images of each class in all, as in the paper.
    Cost: `batches` Hessian-vector products, each about two training steps.
    Departures: several batches add their own H g, without cross terms; no temperature on the logits (the released code
    divides them by 200, the paper does not say so).
    """

    reads_gradients: ClassVar[bool] = True
    batches: Annotated[int, Field(ge=1, description="batches to read gradients from")] = 1

    def search(self, subnet: Subnet) -> Generator[list[Run], list[End], None]:
        (end,) = yield [reading_run(self.batches, _add_products)]
        subnet.rewind_()
        warn_of_blind_layers(self.name, end.scores)
        assert subnet.start is not None  # where the weights are now, on the CPU already
        self.prune_(subnet, grasp(subnet.start, end.scores))

    def runs(self, subnet: Subnet) -> int:
        return 1


def _add_products(run: Run, loss: Tensor) -> Tensor:
    """Add H g of this batch: the gradient of ``g . g`` with one of the two held fixed.

    The fixed one is that of all processes' images: the mean of each process's own H g, of its own g, would not be the
    H g of the whole batch.
    """
    weights = run.subnet.parameters()
    gradients = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
    fixed = mean_over_processes({name: g.detach() for name, g in zip(weights, gradients, strict=True)})
    product = torch.stack([(fixed[name] * g).sum() for name, g in zip(weights, gradients, strict=True)]).sum()
    for name, one in zip(weights, torch.autograd.grad(product, list(weights.values()), retain_graph=True), strict=True):
        run.scores[name] = run.scores.get(name, 0) + gathered(one)
    return loss
