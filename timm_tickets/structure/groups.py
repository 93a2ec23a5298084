"""Groups: what of a model can go together without a trace.

A channel is exactly removable when nothing reads it: with the columns of its consumers zero, it does not matter what
its producers, a normalisation, a bias or an activation make of it. A group is the rows that make such a channel and the
columns that read it; of attention it is a whole head, of a grouped convolution whatever has to go with it.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)  # inputs before outputs
Dim = tuple[str, int]  # a parameter and one of its dimensions


@dataclass(frozen=True)
class Family:
    """Groups that are alike: the channels of a layer, or the heads of an attention.

    Attributes:
        makes: The dimensions of parameters that make them, by name and number of the dimension.
        reads: The dimensions that read them.
        kind: ``channel`` or ``head``.
        count: How many groups it has.
    """

    makes: tuple[Dim, ...]
    reads: tuple[Dim, ...]
    kind: str
    count: int

    @property
    def name(self) -> str:
        """What makes them and what reads them, in the model's order."""
        return " + ".join(name for name, _ in self.makes) + " -> " + " + ".join(name for name, _ in self.reads)


@dataclass
class Groups:
    """The groups of a model.

    Attributes:
        of: The group of each index along a dimension of a parameter, -1 where it is in none; int64.
        family: The family of each group; int64.
        families: What is alike.
        shapes: Of the weights that may be pruned, by name.
        positions: How often a forward pass of one image multiplies each entry of a weight.
        left: What is in no group: a dimension of a parameter and why.
        vectors: Like ``of``, for every other parameter and buffer; only where they were asked for.
        difference: Largest change of an output when it was tried, relative to the largest output.
        seconds: How long finding and trying took, of the processor.
    """

    of: dict[Dim, Tensor]
    family: Tensor
    families: list[Family]
    shapes: dict[str, tuple[int, ...]]
    positions: dict[str, int]
    left: list[tuple[Dim, str]] = field(default_factory=list)
    vectors: dict[Dim, Tensor] = field(default_factory=dict)
    difference: float = 0.0
    seconds: float = 0.0

    def __len__(self) -> int:
        return len(self.family)

    def members(self, group: int) -> dict[Dim, Tensor]:
        """The indices of a group, by the dimension of the parameter that they are along."""
        found = {dim: (ids == group).nonzero().flatten() for dim, ids in self.of.items()}
        return {dim: index for dim, index in found.items() if len(index)}

    def mask(self, gone: Tensor, reads_only: bool = False) -> dict[str, Tensor]:
        """Masks that prune these groups and nothing else.

        Args:
            gone: Bool, a group each.
            reads_only: Only the columns that read them.
        """
        out = {name: torch.ones(shape, dtype=torch.bool) for name, shape in self.shapes.items()}
        reads = {dim for one in self.families for dim in one.reads}
        for (name, dim), ids in self.of.items():
            if not reads_only or (name, dim) in reads:
                out[name].movedim(dim, 0)[(ids >= 0) & gone[ids.clamp(min=0)]] = False
        return out

    def only(self, keep: Tensor) -> "Groups":
        """The groups of these families alone: bool, a family each."""
        stays = keep[self.family]
        new = torch.where(stays, stays.cumsum(0) - 1, -1)

        def renumbered(of: dict[Dim, Tensor]) -> dict[Dim, Tensor]:
            found = {dim: torch.where(ids >= 0, new[ids.clamp(min=0)], -1) for dim, ids in of.items()}
            return {dim: ids for dim, ids in found.items() if (ids >= 0).any()}

        return replace(
            self,
            of=renumbered(self.of),
            vectors=renumbered(self.vectors),
            family=(keep.cumsum(0) - 1)[self.family][stays],
            families=[one for one, stay in zip(self.families, keep.tolist(), strict=True) if stay],
        )

    def heads(self) -> "Groups":
        """The heads alone."""
        return self.only(torch.tensor([one.kind == "head" for one in self.families], dtype=torch.bool))

    def share(self) -> float:
        """Fraction of the prunable weights that lie in a group."""
        gone = self.mask(torch.ones(len(self), dtype=torch.bool))
        return sum(int((~mask).sum()) for mask in gone.values()) / sum(math.prod(s) for s in self.shapes.values())


def halves(groups: Groups) -> Iterator[Tensor]:
    """Every group once in one of two sets of which each has about half of every family: bool, a group each."""
    within = torch.zeros(len(groups), dtype=torch.int64)
    for number in range(len(groups.families)):
        mine = groups.family == number
        within[mine] = torch.arange(int(mine.sum()))
    for parity in (0, 1):
        yield within % 2 == parity
