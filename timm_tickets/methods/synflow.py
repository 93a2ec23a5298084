"""SynFlow: iterative pruning before training, without data.

Source: Tanaka et al. 2020, 2006.05467.
"""

from collections.abc import Generator
from typing import Annotated, ClassVar

from pydantic import Field

from ..core.errors import SettingError
from ..core.masks import Scores, keep_count, kept, total
from ..core.scores import synflow
from ..pruning.method import OneShot
from ..pruning.registry import register_pruner
from ..pruning.run import Run
from ..pruning.run_end import End
from ..sparse.blind import warn_of_blind_scores
from ..sparse.describe import describe_model
from ..sparse.subnet import Subnet


@register_pruner("synflow")
class SynFlow(OneShot):
    """Prune before training, in many small steps, the weights that carry least of the flow from input to output.

    Use: at high sparsities, where one-shot scores cut layers off. Made for networks of convolutions and ReLU; through
    attention, layer normalisation and standardised weights the flow is no longer a sum over paths.
    Cost: `iterations` forward and backward passes of one image of ones; no training and no data.
    """

    reads_gradients: ClassVar[bool] = True
    iterations: Annotated[int, Field(ge=1, description="steps of the exponential schedule")] = 100
    input_size: Annotated[
        tuple[int, int, int] | None, Field(description="channels, height, width; the model's own where not given")
    ] = None

    def search(self, subnet: Subnet) -> Generator[list[Run], list[End], None]:
        size = self.input_size or _input_size(subnet)
        count = self.total(subnet.mask)
        goal = keep_count(count, self.sparsity)
        for step in range(1, self.iterations + 1):
            keep = max(goal, round(count * (goal / count) ** (step / self.iterations)))
            # Not kept in a variable, which would hold one step's scores while the next ones are made.
            subnet.set_mask_(self.cut(subnet.mask, self.scores(subnet, size), keep))
        yield from ()

    def scores(self, subnet: Subnet, size: tuple[int, int, int]) -> Scores:
        """The scores under the present mask; before the first cut, layers without any flow are told."""
        found = synflow(subnet.model, subnet.mask, size)
        if kept(subnet.mask) == total(subnet.mask):
            warn_of_blind_scores(self.name, subnet.names, found)
        return found


def _input_size(subnet: Subnet) -> tuple[int, int, int]:
    config = getattr(subnet.model, "pretrained_cfg", None) or {}
    size = getattr(getattr(subnet.model, "patch_embed", None), "img_size", None) or config.get("input_size", ())[1:]
    if not size:
        raise SettingError("pruner.input_size: the model does not say its own; give channels, height and width")
    return (describe_model(subnet.model)["in_chans"] or 3, *size)
