"""RigL: sparse training that grows where the dense gradient is largest.

Source: Evci et al. 2020, 1911.11134.
"""

import math
from typing import Annotated

from pydantic import Field

from ..core.scores import magnitude
from ..pruning.registry import register_pruner
from ..pruning.training import Training
from ..sparse.blind import warn_of_blind_layers
from .set import SET


@register_pruner("rigl")
class RigL(SET):
    """Train sparse; now and then drop each layer's smallest weights and grow where gradients are largest.

    Suggested (the paper's): erk, drop_rate 0.3 falling along a cosine, interval 100 steps, until 0.75 of training.
    Where `interval` is not set it is 100 too, but at most a tenth of the steps until then: a short training has ten
    exchanges.
    Cost: one training, at the asked sparsity throughout; a dense gradient is read at each exchange.
    """

    interval: Annotated[
        int | None, Field(ge=1, description="optimizer steps between two exchanges; 100 or less where not given")
    ] = None
    until: Annotated[float, Field(gt=0, le=1, description="fraction of training after which the masks stay")] = 0.75

    def step_(self, run: Training) -> None:
        subnet, due = run.subnet, run.step % self.every(run) == 0 and run.progress < self.until
        if due and (dense := magnitude(subnet.dense_gradients())):
            if run.step == self.every(run):
                blind = [name for name in subnet.names if not dense[name].any()]
                warn_of_blind_layers(self.name, blind, len(subnet.names), "so what grows in them is arbitrary")
            self.exchange_(run, dense, self.scheduled(run.progress))
        subnet.tap_((run.step + 1) % self.every(run) == 0)

    def every(self, run: Training) -> int:
        return run.every(self.interval, self.until / 10)

    def scheduled(self, progress: float) -> float:
        """Fraction to exchange after this fraction of training (section 3, cosine annealing)."""
        return self.drop_rate / 2 * (1 + math.cos(math.pi * progress / self.until))
