"""What else has an entry for every channel: biases, normalisations, scales, tables of positions."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from . import rules
from .groups import Dim
from .labels import NONE, Atoms
from .trace import Trace

_LAST = {"addmm", "baddbmm", "native_layer_norm", "_fused_rms_norm"}  # a vector acts along the last dimensions


class VectorTrace(Trace):
    """A trace that also follows the entries of other parameters and buffers to the channels that they act on.

    Every entry has a number, which moves as the entry does. Where it meets labelled numbers, the two are noted.

    Args:
        atoms: As of `Trace`.
        matrices: As of `Trace`.
        deadline: As of `Trace`.
        others: The parameters and buffers to follow, by name.
    """

    def __init__(self, atoms: Atoms, matrices: Mapping[str, Tensor], deadline: float, others: Mapping[str, Tensor]):
        super().__init__(atoms, matrices, deadline)
        self.entries: Any = WeakIdKeyDictionary()  # of a tensor, the numbers of the entries that each of its own is
        self.first: dict[str, int] = {}
        self.others = dict(others)
        self.pairs: list[Tensor] = []  # (2, n): entry and atom
        count = 1
        for name, value in others.items():
            self.first[name] = count
            self.entries[value] = [torch.arange(count, count + value.numel(), dtype=torch.float64).view(value.shape)]
            count += value.numel()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = super().__torch_dispatch__(func, types, args, kwargs)
        tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        if any(one in self.entries for one in tensors):
            outs = [one for one in tree_leaves(out) if isinstance(one, Tensor)]
            if outs:
                self._follow(func, args, kwargs, tensors, outs)
        return out

    def _follow(self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor], outs: list[Tensor]) -> None:
        name = func.overloadpacket.__name__
        base = name.removesuffix("_") if not name.startswith("_") else name
        followed = [one for one in tensors if one in self.entries]
        if base in rules.MOVES:
            self._move(func, args, kwargs, followed, outs)
        elif name == "convolution":
            if args[2] in self.entries:
                self._meet(args[2], 1, outs[0])
        elif base in rules.NORMS or base == "native_group_norm":
            for one in tensors[1:]:
                if one in self.entries and one.ndim == 1:
                    self._meet(one, 1, outs[0])
        elif (
            torch.Tag.pointwise in func.tags
            or base in rules.POINTWISE
            or name in ("addmm", "baddbmm")
            or "norm" in name
        ):
            labelled = outs[0] in self.labels and bool(self.labels[outs[0]].any())
            for one in followed:
                try:
                    entries = [each.expand(outs[0].shape) for each in self.entries[one]]
                except RuntimeError:  # of another shape: not entry by entry
                    continue
                if labelled or outs[0] in self.tags:
                    for each in entries:
                        self._note(each, outs[0])
                elif one.numel():
                    self.entries[outs[0]] = [*self.entries.get(outs[0], []), *entries]

    def _move(self, func: Any, args: Any, kwargs: Any, followed: list[Tensor], outs: list[Tensor]) -> None:
        for layer in range(max(len(self.entries[one]) for one in followed)):

            def entries(tensor: Any, layer: int = layer) -> Tensor:
                mine = self.entries.get(tensor, [])
                return mine[layer] if layer < len(mine) else torch.full(tensor.shape, NONE, dtype=torch.float64)

            # An index is no entry, and is used as it is.
            moved = tree_leaves(rules.moved(func, args, kwargs, entries))
            for one, found in zip(outs, moved, strict=True):
                self.entries[one] = [*(self.entries.get(one, []) if layer else []), found]

    def _meet(self, vector: Tensor, axis: int, out: Tensor) -> None:
        """A vector acts along an axis of a result."""
        for each in self.entries[vector]:
            if len(each) == out.shape[axis]:
                self._note(each.view([-1 if dim == axis else 1 for dim in range(out.ndim)]).expand(out.shape), out)

    def _note(self, entries: Tensor, out: Tensor) -> None:
        """Each of these entries acts on what is labelled so."""
        if out in self.tags:
            tags = self.tags[out]
            for dim, index in tags.dims.items():
                atoms = self.atoms.of(tags.name, dim, index.expand(out.shape)).double()
                pairs = torch.stack([entries.flatten(), atoms.flatten()]).unique(dim=1)
                if len(pairs[0].unique()) == pairs.shape[1]:  # along the other dimension it acts on all
                    self.pairs.append(pairs)
        else:
            label = self.label(out).double()
            self.pairs.append(torch.stack([entries.flatten(), label.flatten()]).unique(dim=1))

    def found(self, groups: Tensor) -> dict[Dim, Tensor]:
        """The group of each index along a dimension of a parameter or buffer; only of those that have some.

        Args:
            groups: The group of each atom, -1 where it is in none; int64.
        """
        count = sum(value.numel() for value in self.others.values()) + 1
        least, most = torch.full((count,), len(groups)), torch.full((count,), -2)
        if self.pairs:
            entry, atom = torch.cat(self.pairs, 1).long()
            least = least.scatter_reduce(0, entry, groups[atom], "amin")
            most = most.scatter_reduce(0, entry, groups[atom], "amax")
        every = torch.where(least == most, most, most.clamp(max=-1))  # -2: not met, -1: of no group, or of several
        out: dict[Dim, Tensor] = {}
        for name, value in self.others.items():
            each = every[self.first[name] : self.first[name] + value.numel()]
            if not bool((each >= 0).any()):
                continue
            each = each.view(value.shape)
            for dim, size in enumerate(value.shape):
                rows = each.movedim(dim, 0).reshape(size, -1)
                most, least = rows.amax(1), rows.masked_fill(rows == -2, rows.max() + 1).amin(1)
                same = torch.where(most == least, most, -1)
                if size > 1 and bool((same >= 0).any()):
                    out[name, dim] = same
        return out
