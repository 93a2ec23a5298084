"""COLT: cyclic overlapping lottery tickets.

Source: Hossain et al. 2022, 2212.12770 (IEEE TAI 2025).
"""

from collections.abc import Generator, Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from ..core.errors import SettingError
from ..core.lazy import Lazy
from ..core.masks import Masks, Scope, keep_count, revived
from ..core.scores import magnitude
from ..pruning.method import Method
from ..pruning.registry import register_pruner
from ..pruning.run import Run
from ..pruning.run_end import End
from ..sparse.subnet import Subnet


@register_pruner("colt")
class COLT(Method):
    """Train one copy on each part of the classes, prune each, keep what all keep, rewind; repeat.

    Suggested (the paper's): 2 or 3 partitions, prune_rate 0.15; there convolutions only, `include=("*conv*",)`.
    Cost: one training a partition a round, each on its part of the data; the runs of a round are independent. Masks
    that overlap at chance keep (1 - prune_rate)^partitions of the weights a round, so compare with ``imp`` at
    prune_rate 1 - (1 - prune_rate)^partitions. The ticket's notes hold each round's overlap beside chance.
    Departures: no class is dropped where the partitions do not divide them (the released code drops the rest); the last
    round prunes less, to meet the asked sparsity exactly.
    """

    partitions: Annotated[int, Field(ge=2, description="parts the data is split into")] = 2
    split: Annotated[Literal["classes", "samples"], Field(description="split classes, or all images at random")] = (
        "classes"
    )
    prune_rate: Annotated[
        float, Field(gt=0, lt=1, description="fraction of the remaining weights to prune a round")
    ] = 0.15
    scope: Annotated[Scope, Field(description="compare weights across all layers, or within each")] = "global"

    def prepare_(self, subnet: Subnet) -> None:
        classes = getattr(subnet.model, "num_classes", None)
        if self.split == "classes" and (classes is None or classes < self.partitions):
            raise SettingError(
                f"pruner.partitions: {self.partitions} parts cannot be made of the model's {classes} classes; use "
                "fewer, or split=samples"
            )

    def search(self, subnet: Subnet) -> Generator[list[Run], list[End], None]:
        goal, first = keep_count(self.total(subnet.mask), self.sparsity), True
        while first or self.kept(subnet.mask) > goal:
            ends = yield self.round(subnet)
            self.cut_(subnet, [magnitude(end.weights) for end in ends], goal)
            subnet.rewind_()
            first = False

    def cut_(self, subnet: Subnet, scores: Sequence[Mapping[str, Tensor]], goal: int) -> None:
        """Cut to what the copies of a round all keep, but not below ``goal``, and note how much that is."""
        before = self.kept(subnet.mask)
        cut = max(1, round(self.prune_rate * before)) if before > goal else 0
        chance = (1 - cut / before) ** self.partitions

        def noted(found: Masks) -> Masks | None:  # too few are not held while others are looked for
            of_all = self.kept(found) / before
            subnet.notes.append({"kept_by_all": of_all, "by_chance": chance, "pruned_by_each": cut / before})
            return found if self.kept(found) >= goal else None

        found = noted(self.overlap(subnet.mask, scores, cut))
        subnet.set_mask_(found or self.exactly(subnet.mask, scores, cut, goal))

    def round(self, subnet: Subnet) -> list[Run]:
        """One run a partition: contiguous blocks of classes, sizes differing by one at most, or parts of the images."""
        if self.split == "samples":
            return [Run(data_part=(part, self.partitions)) for part in range(self.partitions)]
        count: Any = subnet.model.num_classes
        classes = np.array_split(np.arange(count), self.partitions)
        return [Run(classes=part.tolist()) for part in classes]

    def round_rate(self) -> float:
        return 1 - (1 - self.prune_rate) ** self.partitions  # of masks that overlap at chance

    def overlap(self, mask: Masks, scores: Sequence[Mapping[str, Tensor]], cut: int) -> Masks:
        """What all copies keep, each having pruned ``cut`` weights."""
        first, *others = scores
        keep = self.kept(mask) - cut
        found = self.cut(mask, first, keep)
        for one in others:
            for name, other in self.cut(mask, one, keep).items():
                found[name] &= other
        found = self.units.common(found, mask, summed(scores))
        return revived(found, mask, summed(scores)) if self.collapse == "prevent" else found

    def exactly(self, mask: Masks, scores: Sequence[Mapping[str, Tensor]], cut: int, goal: int) -> Masks:
        """The largest common cut whose overlap still keeps ``goal``; the rest goes by smallest summed magnitude."""
        low, high = 0, cut  # the overlap shrinks as the cut grows; at high it is too small
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.kept(self.overlap(mask, scores, middle)) >= goal else (low, middle)
        return self.cut(self.overlap(mask, scores, low), summed(scores), goal)


def summed(scores: Sequence[Mapping[str, Tensor]]) -> Lazy:
    return Lazy(scores[0], lambda name: torch.stack([one[name] for one in scores]).sum(dim=0))
