"""Iterative magnitude pruning with rewinding.

Source: Frankle & Carbin 2018, 1803.03635; late rewinding: Frankle et al. 2019, 1903.01611.
"""

from collections.abc import Generator
from typing import Annotated

from pydantic import Field

from ..core.masks import Scope, keep_count
from ..core.scores import magnitude
from ..pruning.method import Method
from ..pruning.registry import register_pruner
from ..pruning.run import Rewind, Run
from ..pruning.run_end import End
from ..sparse.subnet import Subnet


@register_pruner("imp")
class IMP(Method):
    """Train, prune the smallest remaining weights, rewind the rest; repeat.

    Use: the method to compare others with. ``prune_rate`` equal to ``sparsity`` prunes once: one-shot lottery pruning.
    Suggested: prune_rate 0.2, global; rewind '0ep' for small networks, 1 to 5 % of training for ResNets on ImageNet.
    Cost: one training a round, ln(1 - sparsity) / ln(1 - prune_rate) rounds: 14 to sparsity 0.95 at rate 0.2.
    Departures: the last round prunes less than prune_rate where it has to meet the asked sparsity exactly.
    """

    prune_rate: Annotated[
        float, Field(gt=0, lt=1, description="fraction of the remaining weights to prune a round")
    ] = 0.2
    scope: Annotated[Scope, Field(description="compare weights across all layers, or within each")] = "global"
    rewind: Rewind = "0ep"

    def search(self, subnet: Subnet) -> Generator[list[Run], list[End], None]:
        for round, keep in enumerate(self.kept_counts(subnet)):
            yield [Run(rewind=self.rewind if round == 0 else None, from_rewind=round > 0)]
            subnet.set_mask_(self.cut(subnet.device_mask(), magnitude(subnet.device_weights()), keep))
            subnet.rewind_()

    def kept_counts(self, subnet: Subnet) -> list[int]:
        """Weights kept after each round; the last is what the asked sparsity keeps."""
        remaining = self.total(subnet.device_mask())
        goal = keep_count(remaining, self.sparsity)
        counts: list[int] = []
        while not counts or remaining > goal:
            remaining = max(goal, remaining - max(1, round(self.prune_rate * remaining)))
            counts.append(remaining)
        return counts

    def round_rate(self) -> float:
        return self.prune_rate

    def runs(self, subnet: Subnet) -> int:
        return len(self.kept_counts(subnet))
