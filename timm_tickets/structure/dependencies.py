"""Our groups as torch-pruning's: made of its dependency items, so that its importances and regularisers read them.

torch-pruning's own graph follows a part of timm's models; its importances ask only for layers, indices and roots.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.optional import torch_pruning
from ..core.seeds import seed_from
from .groups import TRANSPOSED, Dim, Groups

_NOISE = 0x7070  # the stream of random importances, told from others of the same seed


@dataclass
class Items:
    """A family as a group of torch-pruning's.

    Attributes:
        family: The family's number.
        group: ``torch_pruning.Group``; its first item is the root.
        of: Of each root index, the group of ours that it is of.
    """

    family: int
    group: Any
    of: Tensor


def items_of(
    model: nn.Module, groups: Groups, types: Sequence[type[nn.Module]], gone: Tensor | None = None
) -> list[Items]:
    """Families as groups of torch-pruning's: of layers of some types, without what is pruned already.

    Args:
        model: The plain model.
        groups: Its groups, with vectors.
        types: Of the layers that are read; a family without any is left out.
        gone: The groups that are pruned already: bool, a group each.

    Raises:
        SettingError: torch-pruning is not installed.
    """
    tp = torch_pruning("a group of torch-pruning")
    pruner_of = tp.DependencyGraph().get_pruner_of_module
    layers = {name: module for name, module in model.named_modules() if isinstance(module, tuple(types))}
    left = torch.ones(len(groups), dtype=torch.bool) if gone is None else ~gone
    norms = [one for one in groups.vectors if one[0].endswith(".weight")]
    out = []
    for number, family in enumerate(groups.families):
        mine = (groups.family == number) & left
        found: list[tuple[str, bool, Tensor, Tensor]] = []
        for dims, makes in ((family.makes, True), (norms, True), (family.reads, False)):
            for dim in dims:
                if _path(dim) in layers and axis_of(layers[_path(dim)], makes) == dim[1]:
                    ids = groups.of[dim] if dim in groups.of else groups.vectors[dim]
                    index = ((ids >= 0) & mine[ids.clamp(min=0)]).nonzero().flatten()
                    index = index[ids[index].argsort(stable=True)]
                    found += [(_path(dim), makes, index, ids[index])] if len(index) else []
        if not found:
            continue
        found.sort(key=lambda one: len(one[2]))  # the root's indices are those that every other has at least once
        root, group = found[0][3], tp.Group()
        for path, makes, index, ids in found:
            layer = layers[path]
            prune = pruner_of(layer).prune_out_channels if makes else pruner_of(layer).prune_in_channels
            node = tp.Node(layer, None, path)
            group.add_dep(tp.Dependency(prune, prune, node, node), index.tolist())
            group[len(group) - 1].root_idxs = _roots(ids, root).tolist()
        out.append(Items(number, group, root))
    return out


def read_by(importance: Any) -> tuple[type[nn.Module], ...]:
    """The types of layers that an importance of torch-pruning's reads."""
    return tuple(getattr(importance, "target_types", (nn.Module,)))


def importances(
    items: Sequence[Items], importance: Any, count: int, within: AbstractContextManager[None], seed: int
) -> Tensor:
    """The importance of each of so many groups, 0 of those that are in no item.

    Args:
        items: The families.
        importance: One of torch-pruning's.
        count: How many groups there are.
        within: Where it is computed; see `with_gradients`.
        seed: Of what it draws.

    Returns:
        Of each group the mean over its root's indices, as torch-pruning has it of heads; float64, on the CPU.
    """
    sums, counts = torch.zeros(2, count, dtype=torch.float64)
    with within, _in_float32(), _drawn_from(seed_from(seed, _NOISE)):
        for one in items:
            found = importance(one.group).detach().cpu().double()
            sums.index_add_(0, one.of, found[: len(one.of)])
            counts.index_add_(0, one.of, torch.ones(len(one.of), dtype=torch.float64))
    return sums / counts.clamp(min=1)


@contextmanager
def _drawn_from(seed: int) -> Iterator[None]:
    """Within the block what torch-pruning draws comes from a seed: from torch, or in 1.6.0 from Python's ``random``."""
    before = random.getstate()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        random.seed(seed)
        try:
            yield
        finally:
            random.setstate(before)


@contextmanager
def with_gradients(model: nn.Module, gradients: Mapping[str, Tensor]) -> Iterator[None]:
    """Within the block parameters have these gradients, by name, where torch-pruning looks for them."""
    named = {name: one for name, one in model.named_parameters() if name in gradients}
    before = {name: one.grad for name, one in named.items()}
    try:
        for name, one in named.items():
            one.grad = gradients[name].to(one)
        yield
    finally:
        for name, one in named.items():
            one.grad = before[name]


@contextmanager
def _in_float32() -> Iterator[None]:
    """What torch-pruning computes is float32, and its LAMP fails where tensors that it makes are anything else."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _roots(ids: Tensor, root: Tensor) -> Tensor:
    """Of indices of these groups, both sorted, the root index that each goes with: in turn those of its group."""
    first, count = torch.searchsorted(root, ids), torch.bincount(root)[ids]
    within = torch.arange(len(ids)) - torch.searchsorted(ids, ids)
    return first + within % count


def _path(dim: Dim) -> str:
    """The layer of a weight; empty of what is not called so."""
    path, _, leaf = dim[0].rpartition(".")
    return path if leaf == "weight" else ""


def axis_of(layer: nn.Module, makes: bool) -> int:
    """The dimension of a layer's weight along which the channels run that it makes, or those that it reads."""
    return int(makes) if isinstance(layer, TRANSPOSED) else int(not makes)
