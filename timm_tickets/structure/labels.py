"""Labels: which channel each number of a forward pass depends on, and which channels belong together.

An *atom* is an index along a dimension of a matrix: a row that makes a channel, a column that reads one. Every tensor
of a forward pass has a label for each of its numbers: the atom that it depends on, 0 where that is none that could go.
Where a number depends on two atoms they are united: they can only go together. The labels themselves stay as they were,
so that it can still be told which way the channels run.
"""

from collections.abc import Iterable, Mapping, Sequence
from math import prod

import torch
from torch import Tensor

NONE = 0.0  # labels are floats: every operation that moves numbers moves these


class Atoms:
    """Atoms and what is known of them: which are united, and which have to stay.

    Args:
        shapes: Of the matrices, by parameter name.
        stay: Atoms that have to stay, with the cause; found in an earlier pass.

    Attributes:
        first: The first atom of each dimension that has several indices, by (parameter, dimension).
        causes: Why an atom has to stay, by atom; what is united with it has to stay too.
        mixed: By atom, the operation that united several indices of one dimension through it.
        heads: Atoms that a product of two activations united.
        writes: The dimensions that make channels.
        reads: The dimensions that read channels.
        positions: How often a forward pass of one image multiplies each entry of a parameter.
    """

    def __init__(self, shapes: Mapping[str, Sequence[int]], stay: Mapping[int, str]):
        self.first: dict[tuple[str, int], int] = {}
        count = 1
        for name, shape in shapes.items():
            for dim, size in enumerate(shape):
                if size > 1:
                    self.first[name, dim] = count
                    count += size
        self.shapes = dict(shapes)
        self.parent = torch.arange(count)
        self.causes: dict[int, str] = dict(stay)
        self.stays = torch.zeros(count, dtype=torch.bool)
        self.stays[list(stay)] = True
        self.mixed: dict[int, str] = {}
        self.heads: set[int] = set()
        self.writes: set[tuple[str, int]] = set()
        self.reads: set[tuple[str, int]] = set()
        self.positions: dict[str, int] = {}
        self._table: Tensor | None = None  # of each atom the label that it goes by; made when it is asked for

    def of(self, name: str, dim: int, index: Tensor) -> Tensor:
        """Labels of these indices along a dimension of a matrix; none where it has one index only."""
        if (name, dim) not in self.first:
            return torch.full(index.shape, NONE)
        return index + float(self.first[name, dim])

    def living(self, label: Tensor) -> Tensor:
        """The labels as far as they can go: what stays is no label."""
        if self._table is None:
            self._table = self.parent.masked_fill(self.stays[self.parent], 0).float()
        return self._table.index_select(0, label.flatten().int()).view(label.shape)

    def unite(self, one: Tensor, other: Tensor, why: str | None = None) -> Tensor:
        """Unite labels element by element, and give one of each two: that which can go.

        Args:
            one: Labels.
            other: Labels of the same shape.
            why: The operation, where it brings indices of one dimension together. Where it brings together all that
                there are, they have to stay: they could only go all at once.
        """
        if torch.equal(one, other):
            return one
        mine, theirs = self.living(one), self.living(other)
        apart = (mine != theirs) & (mine > 0) & (theirs > 0)
        if apart.any():
            keys = mine[apart].double() * len(self.parent) + theirs[apart].double()
            for key in keys.unique().long().tolist():
                a, b = (self._root(atom) for atom in divmod(key, len(self.parent)))
                if a != b:
                    low, high = min(a, b), max(a, b)
                    self.parent[high] = low
                    if cause := why or self.mixed.get(high):
                        self.mixed.setdefault(low, cause)
            while not torch.equal(up := self.parent[self.parent], self.parent):
                self.parent = up
            self._table = None
            if why is not None and self.living(one).unique().count_nonzero() == 1:
                self.keep(one, f"{why} binds all of them together")
        return torch.where(mine > 0, one, torch.where((theirs > 0) | (one == 0), other, one))

    def mix(self, label: Tensor, dims: Iterable[int], why: str) -> Tensor:
        """Unite the labels along these dimensions, which become 1 long."""
        dims = tuple(dims)
        if not dims or not label.numel():
            return label
        most = label.amax(dims, keepdim=True)
        if torch.equal(most.expand_as(label), label):
            return most
        living = self.living(label)
        self.unite(label, label.masked_fill(living == 0, 0).amax(dims, keepdim=True).expand_as(label), why)
        most = label.masked_fill(living == 0, 0).amax(dims, keepdim=True)
        return torch.where(most > 0, most, label.amax(dims, keepdim=True))

    def keep(self, label: Tensor, cause: str) -> None:
        """What these labels name has to stay."""
        for root in self.living(label).unique().long().tolist():
            if root:
                self.causes.setdefault(root, cause)
                self.stays[root] = True
                self._table = None

    def _root(self, atom: int) -> int:
        while (up := int(self.parent[atom])) != atom:
            atom = up
        return atom


class Tags:
    """Which entry of a matrix each number of a tensor made of it is: an index tensor for each of the dimensions.

    Args:
        name: The parameter's.
        dims: Index along each of its dimensions longer than 1, in this tensor's shape.
    """

    def __init__(self, name: str, dims: Mapping[int, Tensor]):
        self.name, self.dims = name, dict(dims)

    @classmethod
    def of(cls, name: str, weight: Tensor) -> "Tags":
        """Of a parameter itself."""
        shape = weight.shape
        ranges = {
            dim: torch.arange(size, dtype=torch.float32).view(size, *[1] * (len(shape) - dim - 1)).expand(shape)
            for dim, size in enumerate(shape)
            if size > 1
        }
        return cls(name, ranges)

    def along(self, axis: int) -> tuple[int, Tensor] | None:
        """The dimension of the parameter that runs along this axis, and its indices there; None if there is not one."""
        found = []
        for dim, index in self.dims.items():
            line = index.select(axis, 0).unsqueeze(axis)
            start = index
            for other in range(index.ndim):
                if other != axis:
                    start = start.narrow(other, 0, 1)
            if start.unique().numel() > 1:
                if not torch.equal(start.expand_as(index), index):
                    return None
                found.append((dim, start.flatten()))
            elif prod(line.shape) == 0:
                return None
        return found[0] if len(found) == 1 else None
