"""The smaller model: what nothing reads is removed, and nothing else changes."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import SettingError
from ..sparse.standardised import STANDARDISED
from ..sparse.wrappers import plain_model
from .find import PATIENCE, find_groups, images_for
from .groups import Groups
from .removal import Removals, tensor_of
from .verify import EQUAL, outputs, removing


@dataclass
class Compact:
    """A model without the channels that nothing reads.

    Attributes:
        model: The smaller model: the same classes, with smaller tensors.
        removals: What was removed.
        groups: Groups of the model.
        removed: Groups that are gone.
        dead: Groups that nothing reads, among them those that had to stay.
        stayed: Of families some of whose dead groups had to stay: the name, how many, why.
        difference: Largest change of an output in double precision, relative to the largest output.
    """

    model: nn.Module
    removals: Removals
    groups: int
    removed: int
    dead: int
    stayed: list[tuple[str, int, str]]
    difference: float

    def told(self) -> list[str]:
        """What a user has to know: that little or nothing was removed, and what is dead and stays."""
        out = []
        if not self.dead:
            out.append(
                f"compact: something reads every one of the {self.groups} channels and heads, so none is removed; "
                "zeros here and there make no tensor smaller (granularity=channel prunes whole channels)"
            )
        if self.stayed:
            name, count, why = self.stayed[0]
            more = f", and {len(self.stayed) - 1} layers more" if len(self.stayed) > 1 else ""
            out.append(
                f"compact: {sum(count for _, count, _ in self.stayed)} of {self.dead} channels and heads that nothing "
                f"reads stay: of {name} {count}, since {why}{more}"
            )
        return out


@torch.no_grad()
def compacted(model: nn.Module, groups: Groups | None = None) -> Compact:
    """Remove what nothing reads; the model itself stays as it is.

    A group of channels is removed when all columns that read it are zero. Each removal is tried in double precision on
    a copy with random values, and left out where an output would change or the module's code does not allow it; then
    the outputs of the smaller model are compared with the model's own.

    Args:
        model: A timm model whose pruned weights are zero; plain or wrapped, but not split.
        groups: Its groups, with vectors; found where they are not given.

    Raises:
        SettingError: The groups cannot be found, or the smaller model's outputs are not the model's, or these are NaN.
    """
    plain = plain_model(model)
    groups = groups or find_groups(plain, classifier=True, vectors=True, seconds=PATIENCE)
    dead = unread(plain, groups)
    images = images_for(copy.deepcopy(plain).cpu().float().eval()).double()
    before = outputs(copy.deepcopy(plain).cpu().double().eval(), images)
    if not before.isfinite().all():
        raise SettingError(
            "compact: the model puts out NaN or infinity on a random image, so no smaller one can be compared with it; "
            "look at its training"
        )
    wrong, remover = removing(plain, images, groups, dead)
    gone, stayed = torch.zeros_like(dead), []
    for number, family in enumerate(groups.families):
        mine = dead & (groups.family == number)
        if not (count := int(mine.sum())):
            continue
        if count == family.count:  # a layer cannot be without channels
            mine[mine.nonzero()[0]] = False
            stayed.append((family.name, 1, "all are dead, and a layer has to have one"))
            if not mine.any():
                continue
        if why := remover.remove_(number, mine, wrong):
            stayed.append((family.name, int(mine.sum()), why))
        else:
            gone |= mine
    removals = remover.removals()
    small: Any = removals.apply_(copy.deepcopy(plain))
    small.removals = removals  # what a file of it has to say
    difference = _apart(small, before, images)
    # A mean of zero is zero to the weights' own rounding.
    standardised = any(isinstance(module, STANDARDISED) for module in plain.modules())
    if not difference <= (1e-6 if standardised else EQUAL):
        raise SettingError(
            f"compact: the smaller model's outputs differ from the model's by {difference:.2g} of the largest; nothing "
            "was written, and the model is as it was. Please report this architecture"
        )
    return Compact(small, removals, len(groups), int(gone.sum()), int(dead.sum()), stayed, difference)


def unread(model: nn.Module, groups: Groups) -> Tensor:
    """The groups that nothing reads, since all their columns are zero: bool, a group each."""
    alive = torch.zeros(len(groups), dtype=torch.bool)
    for number, family in enumerate(groups.families):
        for name, dim in family.reads:
            ids = groups.of[name, dim]
            read = (tensor_of(model, name) != 0).movedim(dim, 0).flatten(1).any(1).cpu()
            alive[ids[read & (ids >= 0) & (groups.family[ids.clamp(min=0)] == number)]] = True
    return ~alive


def _apart(small: nn.Module, before: Tensor, images: Tensor) -> float:
    """The largest difference of an output, of the largest output."""
    found = outputs(copy.deepcopy(small).cpu().double().eval(), images)
    scale = before.abs().max()
    return float((found - before).abs().max() / (scale if scale > 0 else 1))
