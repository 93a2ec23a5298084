"""RigL: sparse training that grows where the dense gradient is largest.

Source: Evci et al. 2020, 1911.11134.
"""

import math

from torch import Tensor

from ..lazy import Lazy
from ..processes import world_size
from ..registry import register_pruner
from ..run import Run
from ..scores import magnitude
from ..wrappers import mean_over_processes
from .set import SET


@register_pruner("rigl")
class RigL(SET):
    """Train sparse; now and then drop each layer's smallest weights and grow where gradients are largest.

    Suggested (the paper's): erk, drop_rate 0.3 falling along a cosine, interval 100 steps, until 0.75 of training.
    Cost: one training, at the asked sparsity throughout; a dense gradient is read at each exchange.
    """

    until: float = 0.75

    def step_(self, run: Run) -> None:
        subnet = run.subnet
        if subnet.dense_gradients and run.step % self.interval == 0 and run.progress < self.until:
            weights, gradients = subnet.weights(), subnet.dense_gradients

            def mean(name: str) -> Tensor:
                # The processes can reach each other where the weights are.
                there = gradients[name].to(weights[name].device) if world_size() > 1 else gradients[name]
                return mean_over_processes({name: there})[name].cpu()

            self.exchange_(run, magnitude(Lazy(weights, mean)), self.scheduled(run.progress))
        subnet.dense_gradients.clear()
        subnet.tap = (run.step + 1) % self.interval == 0

    def scheduled(self, progress: float) -> float:
        """Fraction to exchange after this fraction of training (section 3, cosine annealing)."""
        return self.drop_rate / 2 * (1 + math.cos(math.pi * progress / self.until))
