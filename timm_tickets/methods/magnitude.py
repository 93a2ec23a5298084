"""One-shot magnitude pruning of the weights as they are.

Source: Han et al. 2015, 1506.02626, without its retraining.
"""

from collections.abc import Generator
from typing import Annotated

from pydantic import Field

from ..masks import Scope, keep_count, prune, total
from ..pruner import End, Method, Run
from ..registry import register_pruner
from ..scores import magnitude
from ..subnet import Subnet


@register_pruner("magnitude")
class Magnitude(Method):
    """Prune the smallest weights as given, once; no training.

    Use: give it a trained or pretrained model, then train the ticket (fine-tuning). On a random start it is a
    baseline; to train first and rewind afterwards, use ``imp`` with prune_rate equal to sparsity.
    Cost: no training.
    """

    scope: Annotated[Scope, Field(description="compare weights across all layers, or within each")] = "global"

    def search(self, subnet: Subnet) -> Generator[list[Run], list[End], None]:
        count = total(subnet.mask)
        cut = count - keep_count(count, self.sparsity)
        subnet.set_mask_(prune(subnet.mask, magnitude(subnet.weights()), cut, self.scope))
        yield from ()

    def runs(self, subnet: Subnet) -> int:
        return 0
