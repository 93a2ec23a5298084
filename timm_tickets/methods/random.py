"""Random pruning: the control that every score has to beat.

Source: as a baseline, Frankle & Carbin 2018, 1803.03635, section 2; Liu et al. 2022, 2202.02643.
"""

from collections.abc import Generator

from ..end import End
from ..method import OneShot
from ..registry import register_pruner
from ..run import Run
from ..scores import random
from ..subnet import Subnet


@register_pruner("random")
class Random(OneShot):
    """Prune weights at random, once; no training.

    Use: as a control. To compare with another ticket layer by layer, `shuffled_masks` keeps that ticket's counts.
    Cost: no training.
    """

    def search(self, subnet: Subnet) -> Generator[list[Run], list[End], None]:
        self.prune_(subnet, random(subnet.weights(), self.seed))
        yield from ()
