"""Removing groups from a module: indices of its tensors, and the numbers of channels that its modules hold."""

import itertools
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.layers import ScaledStdConv2d, ScaledStdConv2dSame
from torch import Tensor, nn

from ..core.private import forget_biases_
from .groups import TRANSPOSED, Dim, Groups

TRIALS = 32  # sets of numbers that are tried for one family, at most
Place = tuple[str, str]  # a module and one of its attributes
Number = tuple[str, str, int, int]  # a class, an attribute, which of its integers, and its value
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_SCALED = (ScaledStdConv2d, ScaledStdConv2dSame)
_LAYERS = (*_CONVOLUTIONS, nn.Linear, *_BATCH_NORMS, nn.LayerNorm, nn.GroupNorm)


@dataclass
class Removals:
    """What turns a model into the smaller one.

    Attributes:
        kept: The indices that stay, by (parameter or buffer, dimension); int64.
        attributes: What attributes become, by (module, attribute): numbers, or tuples or lists of them.
        shrunk: The dimensions that are shorter; a model from a file no longer knows which of their indices stayed.
    """

    kept: dict[Dim, Tensor] = field(default_factory=dict)
    attributes: dict[Place, Any] = field(default_factory=dict)
    shrunk: frozenset[Dim] = frozenset()

    def apply_(self, model: nn.Module) -> nn.Module:
        """Make a model of the whole architecture the smaller one, in place."""
        for (name, dim), index in self.kept.items():
            old = tensor_of(model, name)
            put_(model, name, old.detach().index_select(dim, index.to(old.device)))
        for (path, name), value in self.attributes.items():
            setattr(model.get_submodule(path), name, value)
        forget_biases_(model)
        return model


def tensor_of(model: nn.Module, name: str) -> Tensor:
    """A parameter or buffer by its name."""
    path, _, last = name.rpartition(".")
    return getattr(model.get_submodule(path), last)


def put_(model: nn.Module, name: str, value: Tensor) -> None:
    """Put another tensor in a parameter's or buffer's place, wherever it is shared."""
    old = tensor_of(model, name)
    new = nn.Parameter(value, old.requires_grad) if isinstance(old, nn.Parameter) else value
    for module in model.modules():
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for last in [last for last, one in own if one is old]:
            setattr(module, last, new)


class Remover:
    """Removes groups from a model, family by family.

    Args:
        model: The plain model; changed in place.
        groups: Its groups, with vectors.
    """

    def __init__(self, model: nn.Module, groups: Groups):
        self.model, self.groups = model, groups
        self.ids = {**groups.vectors, **groups.of}  # the group of each index that is still there
        self.places = {dim: torch.arange(len(ids)) for dim, ids in self.ids.items()}  # where it was at first
        self.attributes: dict[Place, Any] = {}
        self._whole = {dim: len(ids) for dim, ids in self.ids.items()}
        self._undo: list[Callable[[], None]] = []
        self._held: dict[Hashable, tuple[int, ...]] = {}  # what was found for layers that are alike
        self._failed: dict[Hashable, str] = {}  # of layers that are alike, and were to lose as much

    def removals(self) -> Removals:
        """All that was removed so far."""
        kept = {dim: place for dim, place in self.places.items() if len(place) < self._whole[dim]}
        return Removals(kept, dict(self.attributes), frozenset(kept))

    def remove_(self, number: int, gone: Tensor, wrong: Callable[[], str]) -> str:
        """Remove groups of a family, if that can be done.

        Layers of torch are told their new sizes. What other modules hold, such as a number of heads, is found by its
        value: where several could mean these groups, one set after another is tried.

        Args:
            number: The family's.
            gone: Bool, a group each; some of this family, not all.
            wrong: Says why the model as it is does not do what it did; nothing where it does.

        Returns:
            Nothing where they are gone; else why not, and the model is as it was.
        """
        start, sizes, why = len(self._undo), self._sizes(number, gone), ""
        paths = self._slice_(gone)
        sliced, near = len(self._undo), _around(paths)
        for tried in (near, _within(self.model, near)):
            found = self._numbers(tried, sizes)
            alike = (*_kinds(self.model, paths), *found)
            same = (alike, tuple(sorted((old, *sorted(new)) for old, new in sizes.items())))
            for picked in self._order(alike, found) if same not in self._failed else ():
                for place, value in self._way(found, picked).items():
                    self._set_(place, value)
                if not (found_wrong := wrong()):
                    self._held[alike] = picked
                    return ""
                why = why or found_wrong
                self._back_(sliced)
            why = self._failed.setdefault(same, why)
        self._back_(start)
        return why

    def _sizes(self, number: int, gone: Tensor) -> dict[int, set[int]]:
        """What sizes that have to do with a family become, by what they are."""
        sizes: dict[int, set[int]] = defaultdict(set)
        for ids in self.ids.values():
            mine = (ids >= 0) & (self.groups.family[ids.clamp(min=0)] == number)
            if not mine.any():
                continue
            left = mine & ~gone[ids.clamp(min=0)]
            sizes[len(ids)].add(len(ids) - int(mine.sum()) + int(left.sum()))
            sizes[int(mine.sum())].add(int(left.sum()))  # the part of the dimension that is theirs
            sizes[len(ids[mine].unique())].add(len(ids[left].unique()))  # how many there are
        return {old: new for old, new in sizes.items() if new != {old}}

    def _slice_(self, gone: Tensor) -> list[str]:
        """Take the groups' indices out of all tensors; gives the modules whose tensors those are."""
        paths = {}
        for dim, ids in list(self.ids.items()):
            keep = ~(gone[ids.clamp(min=0)] & (ids >= 0))
            if keep.all():
                continue
            (name, axis), old, place = dim, tensor_of(self.model, dim[0]), self.places[dim]
            put_(self.model, name, old.detach().index_select(axis, keep.nonzero().flatten()))
            self.ids[dim], self.places[dim] = ids[keep], place[keep]

            def back(dim: Dim = dim, old: Tensor = old, ids: Tensor = ids, place: Tensor = place) -> None:
                put_(self.model, dim[0], old.detach())
                self.ids[dim], self.places[dim] = ids, place

            self._undo.append(back)
            path, _, last = name.rpartition(".")
            rows = paths.setdefault(path, None)
            paths[path] = keep if (last, axis) == ("weight", 0) else rows
        for path, rows in paths.items():
            layer = self.model.get_submodule(path)
            for attribute, value in _told(layer, rows).items():
                if getattr(layer, attribute) != value:
                    self._set_((path, attribute), value)
        return list(paths)

    def _numbers(self, paths: Sequence[str], sizes: dict[int, set[int]]) -> dict[Number, tuple[list[int], list[Place]]]:
        """Numbers of modules that may mean these groups: what each may be, its own last, and where it stands."""
        found: dict[Number, tuple[list[int], list[Place]]] = {}
        for path in paths:
            module = self.model.get_submodule(path)
            if isinstance(module, _LAYERS):
                continue
            for name, value in vars(module).items():
                if name.startswith("_") or name in ("training", "num_classes"):
                    continue  # classes all stay, and no output tells how many a module thinks there are
                for at, number in enumerate(_integers(value)):
                    if number in sizes:  # the same in all modules of a class
                        key = (type(module).__name__, name, at, number)
                        found.setdefault(key, ([*sorted(sizes[number]), number], []))[1].append((path, name))
        return found

    def _order(self, alike: Hashable, found: Mapping[Number, tuple[list[int], Any]]) -> Iterator[tuple[int, ...]]:
        """Which of their values to try, by place; those that change most come first, one that held before all."""
        ways = itertools.islice(itertools.product(*(range(len(values)) for values, _ in found.values())), TRIALS)
        first = [self._held[alike]] if alike in self._held else []
        yield from dict.fromkeys((*first, *ways))

    def _way(self, found: Mapping[Number, tuple[list[int], list[Place]]], picked: tuple[int, ...]) -> dict[Place, Any]:
        """The attributes that change."""
        way: dict[Place, Any] = {}
        for (key, (values, places)), pick in zip(found.items(), picked, strict=True):
            for place in places if values[pick] != key[3] else ():
                old = way.get(place, getattr(self.model.get_submodule(place[0]), place[1]))
                several = [values[pick] if at == key[2] else one for at, one in enumerate(_integers(old))]
                way[place] = several[0] if isinstance(old, int) else type(old)(several)
        return way

    def _set_(self, place: Place, value: Any) -> None:
        module, known = self.model.get_submodule(place[0]), place in self.attributes
        old, before = getattr(module, place[1]), self.attributes.get(place)
        setattr(module, place[1], value)
        self.attributes[place] = value

        def back() -> None:
            setattr(module, place[1], old)
            if known:
                self.attributes[place] = before
            else:
                del self.attributes[place]

        self._undo.append(back)

    def _back_(self, to: int) -> None:
        while len(self._undo) > to:
            self._undo.pop()()


def _told(layer: nn.Module, rows: Tensor | None) -> dict[str, Any]:
    """The sizes of one of torch's layers, as its tensors are now; ``rows`` are those of its weight that were kept."""
    weight: Any = getattr(layer, "weight", None)
    if isinstance(layer, _CONVOLUTIONS):
        groups = layer.groups
        if rows is not None and groups > 1:
            each = rows.view(groups, -1)
            if torch.equal(each.any(1), each.all(1)):  # whole groups of it
                groups = int(each.any(1).sum())
        ins, outs = (weight.shape[0], weight.shape[1] * groups), (weight.shape[1] * groups, weight.shape[0])
        ins, outs = ins if isinstance(layer, TRANSPOSED) else outs
        told = {"groups": groups, "in_channels": ins, "out_channels": outs}
        if isinstance(layer, _SCALED):  # by the variance over a channel's entries, of which zeros count as well
            rest = weight.shape[1] * layer.groups / layer.in_channels
            told |= {"eps": layer.eps / rest, "scale": layer.scale / rest**0.5}
        return told
    if isinstance(layer, nn.Linear):
        return {"in_features": weight.shape[1], "out_features": weight.shape[0]}
    if isinstance(layer, _BATCH_NORMS):
        size = next(one for one in (weight, layer.running_mean) if one is not None)
        return {"num_features": len(size)}
    if isinstance(layer, nn.GroupNorm):
        return {"num_channels": len(weight), "num_groups": max(1, layer.num_groups * len(weight) // layer.num_channels)}
    if isinstance(layer, nn.LayerNorm):
        return {"normalized_shape": tuple(weight.shape)}
    return {}


def _integers(value: Any) -> list[int]:
    """An attribute's integers: its own, or those of a tuple or list of nothing else."""
    several = list(value) if type(value) in (tuple, list) else [value]
    return several if all(type(one) is int for one in several) else []


def _kinds(model: nn.Module, paths: Sequence[str]) -> list[tuple[str, str]]:
    """What modules are, without where they are: classes and the ends of their names."""
    return [(type(model.get_submodule(path)).__name__, path.rpartition(".")[2]) for path in paths]


def _around(paths: Sequence[str]) -> list[str]:
    """These modules and those that hold them, up to the first that holds all."""
    parts = [path.split(".") for path in paths]
    shared = 0
    while all(len(one) > shared + 1 for one in parts) and len({tuple(one[: shared + 1]) for one in parts}) == 1:
        shared += 1
    return list(dict.fromkeys(".".join(one[:end]) for one in parts for end in range(len(one), shared - 1, -1)))


def _within(model: nn.Module, paths: Sequence[str]) -> list[str]:
    """All modules in the outermost of these."""
    top = min(paths, key=lambda path: path.count(".") if path else -1)
    return [path for path, _ in model.named_modules() if not top or path == top or path.startswith(f"{top}.")]
