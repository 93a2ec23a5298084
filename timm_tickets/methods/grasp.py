"""GraSP: pruning before training that preserves the flow of gradients.

Source: Wang et al. 2020, 2002.07376.
"""

from collections.abc import Callable, Generator, Mapping
from functools import partial
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from ..core.scores import grasp
from ..pruning.method import OneShot
from ..pruning.registry import register_pruner
from ..pruning.run import Run
from ..pruning.run_end import End
from ..pruning.training import Training
from ..sparse.blind import warn_of_blind_scores
from ..sparse.prunable import prunable_names
from ..sparse.subnet import Subnet
from .snip import gradients, reading_run


@register_pruner("grasp")
class GraSP(OneShot):
    """Prune once, before training, the weights whose removal least reduces the gradient's norm.

    First the gradient g of all the images is read, of every weight and the classifier's; then, batch by batch, H g.
    Suggested (the paper's): ten images of each class; logits divided by 200, as in the released code, which evens out
    the first predictions.
    Cost: a gradient and a Hessian-vector product of each batch, about three training steps; the weights are restored
    after each of the two short runs. In full precision and without fused attention, whatever the training uses; models
    whose own kernels have no second derivative fail.
    Departures: the classifier has its part in g but is not pruned by default; the released code prunes it too. Images
    are drawn again for H g with whatever augmentation the loader makes; in the package's trainer it is the same.
    """

    reads_gradients: ClassVar[bool] = True
    images_per_class: Annotated[int, Field(ge=1, description="images of each class to read, drawn by the seed")] = 10
    batches: Annotated[
        int | None, Field(ge=1, description="read so many batches of the loader instead, classes as they come")
    ] = None
    temperature: Annotated[float, Field(gt=0, description="logits are divided by it before the loss")] = 200.0

    def search(self, subnet: Subnet) -> Generator[list[Run], list[End], None]:
        (end,) = yield [self.reading(add_gradients)]
        (end,) = yield [self.reading(partial(add_products, end.scores))]
        subnet.rewind_()
        warn_of_blind_scores(self.name, subnet.names, end.scores)
        assert subnet.start is not None  # where the weights are now, on the CPU already
        subnet.set_mask_(self.cut(subnet.mask, grasp(subnet.start, end.scores)))

    def reading(self, read: Callable[..., None]) -> Run:
        """A run that reads the same images as the other one."""
        images = self.images_per_class if self.batches is None else None
        return reading_run(partial(read, temperature=self.temperature), self.batches, images)

    def runs(self, subnet: Subnet) -> int:
        return 2


def differentiated(run: Training) -> dict[str, Tensor]:
    """The weights that g is taken of: all that multiply activations, the classifier's too, whatever is pruned."""
    names = {*prunable_names(run.subnet.model, classifier=True), *run.subnet.names}
    return {n: weight for n, weight in run.subnet.model.named_parameters() if n in names and weight.requires_grad}


def add_gradients(run: Training, loss: Callable[..., Tensor], temperature: float) -> None:
    run.add_scores_(gradients(loss(temperature), differentiated(run)))


def add_products(
    gradient: Mapping[str, Tensor], run: Training, loss: Callable[..., Tensor], temperature: float
) -> None:
    """Add this batch's H g: the gradient of ``g . dL/dw`` with g, that of all batches, held fixed."""
    own = gradients(loss(temperature), differentiated(run), graph=True)
    reached = [name for name, value in own.items() if value.requires_grad]
    held = [gradient[name].to(own[name].device) for name in reached]
    # Of this batch's gradient itself only the graph is needed, and not its values.
    edges = [get_gradient_edge(own.pop(name)) for name in reached]
    weights = run.subnet.parameters()
    products = torch.autograd.grad(edges, list(weights.values()), held, materialize_grads=True)
    run.add_scores_(dict(zip(weights, products, strict=True)))
