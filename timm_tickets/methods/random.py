"""Random pruning: the control that every score has to beat.

Source: as a baseline, Frankle & Carbin 2018, 1803.03635, section 2; Liu et al. 2022, 2202.02643.
"""

from collections.abc import Generator

from ..core.scores import random
from ..pruning.method import OneShot
from ..pruning.registry import register_pruner
from ..pruning.run import Run
from ..pruning.run_end import End
from ..sparse.subnet import Subnet


@register_pruner("random")
class Random(OneShot):
    """Prune weights at random, once; no training.

    Use: as a control. To compare with another ticket layer by layer, `shuffled_masks` keeps that ticket's counts.
    Cost: no training.
    """

    def search(self, subnet: Subnet) -> Generator[list[Run], list[End], None]:
        subnet.set_mask_(self.cut(subnet.mask, random(subnet.weights(), self.seed)))
        yield from ()
