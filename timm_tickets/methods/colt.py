"""COLT: cyclic overlapping lottery tickets.

Source: Hossain et al. 2022, 2212.12770 (IEEE TAI 2025).
"""

from collections.abc import Generator, Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from ..end import End
from ..lazy import Lazy
from ..masks import Masks, Scope, keep_count, kept, revived, total
from ..method import Method
from ..registry import register_pruner
from ..run import Run
from ..scores import magnitude
from ..settings import SettingError
from ..subnet import Subnet


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
        goal = keep_count(total(subnet.mask), self.sparsity)
        while True:
            ends = yield self.round(subnet)
            scores = [magnitude(end.weights) for end in ends]
            before = kept(subnet.mask)
            cut = max(1, round(self.prune_rate * before)) if before > goal else 0
            found = self.overlap(subnet.mask, scores, cut)
            chance = (1 - cut / before) ** self.partitions
            subnet.notes.append(
                {"kept_by_all": kept(found) / before, "by_chance": chance, "pruned_by_each": cut / before}
            )
            if kept(found) < goal:
                del found  # too small, and looked for anew
                found = self.exactly(subnet.mask, scores, cut, goal)
            subnet.set_mask_(found)
            subnet.rewind_()
            if kept(found) == goal:
                return
            del ends, scores  # models, which need not wait for the next ones

    def round(self, subnet: Subnet) -> list[Run]:
        """One run a partition: contiguous blocks of classes, sizes differing by one at most, or parts of the images."""
        if self.split == "samples":
            return [Run(data_part=(part, self.partitions)) for part in range(self.partitions)]
        count: Any = subnet.model.num_classes
        classes = np.array_split(np.arange(count), self.partitions)
        return [Run(classes=part.tolist()) for part in classes]

    def overlap(self, mask: Masks, scores: Sequence[Mapping[str, Tensor]], cut: int) -> Masks:
        """What all copies keep, each having pruned ``cut`` weights."""
        first, *others = scores
        found = self.pruned_masks(mask, first, cut, self.scope)
        for one in others:
            for name, other in self.pruned_masks(mask, one, cut, self.scope).items():
                found[name] &= other
        return revived(found, mask, summed(scores)) if self.collapse == "prevent" else found

    def exactly(self, mask: Masks, scores: Sequence[Mapping[str, Tensor]], cut: int, goal: int) -> Masks:
        """The largest common cut whose overlap still keeps ``goal``; the rest goes by smallest summed magnitude."""
        low, high = 0, cut  # the overlap shrinks as the cut grows; at high it is too small
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if kept(self.overlap(mask, scores, middle)) >= goal else (low, middle)
        found = self.overlap(mask, scores, low)
        return self.pruned_masks(found, summed(scores), kept(found) - goal, self.scope)


def summed(scores: Sequence[Mapping[str, Tensor]]) -> Lazy:
    return Lazy(scores[0], lambda name: torch.stack([one[name] for one in scores]).sum(dim=0))
