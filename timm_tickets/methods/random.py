"""Random pruning: the control that every score has to beat.

Source: as a baseline, Frankle & Carbin 2018, 1803.03635, section 2; Liu et al. 2022, 2202.02643.
"""

from collections.abc import Generator
from typing import Annotated

from pydantic import Field

from ..masks import Scope, keep_count, prune, total
from ..pruner import End, Method, Run
from ..registry import register_pruner
from ..scores import random
from ..subnet import Subnet


@register_pruner("random")
class Random(Method):
    """Prune weights at random, once; no training.

    Use: as a control. To compare with another ticket layer by layer, `shuffled_masks` keeps that ticket's counts.
    Cost: no training.
    """

    scope: Annotated[Scope, Field(description="draw over all layers at once, or the same fraction of each")] = "global"

    def search(self, subnet: Subnet) -> Generator[list[Run], list[End], None]:
        count = total(subnet.mask)
        cut = count - keep_count(count, self.sparsity)
        subnet.set_mask_(prune(subnet.mask, random(subnet.weights(), self.seed), cut, self.scope))
        yield from ()

    def runs(self, subnet: Subnet) -> int:
        return 0
