"""Groups: what of a model can go together without a trace, found in a forward pass and tried on the model at hand.

A channel is exactly removable when nothing reads it: with the columns of its consumers zero, it does not matter what its
producers, a normalisation, a bias or an activation make of it. A group is the rows that make such a channel and the
columns that read it; of attention it is a whole head, of a grouped convolution whatever has to go with it.
"""

import copy
import math
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..core.errors import SettingError
from ..sparse.describe import describe_model
from ..sparse.prunable import Part, inspect_model
from ..sparse.wrappers import plain_model
from .labels import Atoms
from .trace import OutOfTime, plainly, traced

SECONDS = 60.0  # that finding and trying the groups of a model may take
PASSES = 4  # a pass that knows what stays frees what was united through that
MATRICES = {"convolution", "linear", "experts", "recurrent", "projection", "matrix"}
_SIDES = (64, 96, 128, 160, 224)

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
        difference: Largest change of an output when it was tried, relative to the largest output.
        seconds: How long finding and trying took.
    """

    of: dict[Dim, Tensor]
    family: Tensor
    families: list[Family]
    shapes: dict[str, tuple[int, ...]]
    positions: dict[str, int]
    left: list[tuple[Dim, str]] = field(default_factory=list)
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
        stays = keep[self.family] if len(self) else torch.zeros(0, dtype=torch.bool)
        new = torch.cat([stays.cumsum(0) - 1, torch.tensor([-1])]).masked_fill(~torch.cat([stays, stays.new_ones(1)]), -1)
        of = {dim: new[ids] for dim, ids in self.of.items()}
        numbers = keep.cumsum(0) - 1
        return Groups(
            {dim: ids for dim, ids in of.items() if (ids >= 0).any()},
            numbers[self.family][stays],
            [one for one, stay in zip(self.families, keep.tolist(), strict=True) if stay],
            self.shapes,
            self.positions,
            self.left,
            self.difference,
            self.seconds,
        )

    def share(self) -> float:
        """Fraction of the prunable weights that lie in a group."""
        gone = self.mask(torch.ones(len(self), dtype=torch.bool))
        return sum(int((~mask).sum()) for mask in gone.values()) / sum(math.prod(s) for s in self.shapes.values())


def find_groups(
    model: nn.Module,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    classifier: bool = False,
    seconds: float = SECONDS,
) -> Groups:
    """The groups of a model, each tried on a copy of it; the model stays as it is.

    Args:
        model: A timm model, or any module that takes images; plain or wrapped, but not split.
        include: As in `prunable_names`.
        exclude: As in `prunable_names`.
        classifier: Whether the columns of the classifier may be zeroed too.
        seconds: How long it may take.

    Raises:
        SettingError: It takes longer, or the model takes no images of any size that was tried.
    """
    from .verify import tried

    began = time.monotonic()
    parts = inspect_model(model, include, exclude, classifier)
    work = copy.deepcopy(plain_model(model)).cpu().float().eval()
    parameters = dict(work.named_parameters())
    matrices = {part.name: parameters[part.name] for part in parts if part.kind in MATRICES}
    try:
        images = images_for(work)
        atoms, stay = Atoms({}, {}), {}
        for _ in range(PASSES):
            atoms = traced(work, images, matrices, stay, began + seconds)
            found, left, now = _families(atoms, parts)
            if len(now) == len(stay):
                break
            stay = now
        found.left = left
        found = tried(work, images, found, began + seconds)
    except OutOfTime:
        raise SettingError(
            f"granularity: the groups of {type(work).__name__} were not found within {seconds:g} s; use "
            "granularity=weight, or fewer layers with include"
        ) from None
    found.seconds = time.monotonic() - began
    return found


def images_for(model: nn.Module) -> Tensor:
    """A random image of the smallest size that the model takes.

    Raises:
        SettingError: It takes none that was tried.
    """
    config = getattr(model, "pretrained_cfg", None) or {}
    native = config.get("input_size") or (3, 224, 224)
    channels = describe_model(model)["in_chans"] or getattr(model, "in_chans", None) or native[0]
    own = getattr(getattr(model, "patch_embed", None), "img_size", None)
    sides = [] if config.get("fixed_input_size") else [(side, side) for side in _SIDES]
    generator, error = torch.Generator().manual_seed(0), None
    for side in dict.fromkeys([*([tuple(own)] if own else []), *sides, tuple(native[1:]), (32, 32)]):
        images = torch.randn(1, channels, *side, generator=generator)
        try:
            with plainly():
                model(images)
            return images
        except (AssertionError, RuntimeError, ValueError, IndexError, ZeroDivisionError) as found:
            error = found
    raise SettingError(f"granularity: {type(model).__name__} takes no image that was tried: {error}")


def _families(atoms: Atoms, parts: Sequence[Part]) -> tuple[Groups, list[tuple[Dim, str]], dict[int, str]]:
    """What the atoms are united to: groups, what is in none and why, and the atoms that stay."""
    may = {part.name: part for part in parts if not part.why_not}
    why_not = {part.name: part.why_not for part in parts if part.why_not}
    roots: dict[Dim, Tensor] = {}
    causes: dict[int, str] = {}
    for cause_of, cause in atoms.causes.items():
        causes.setdefault(int(atoms.parent[cause_of]), cause)
    signature: dict[int, set[Dim]] = defaultdict(set)
    followed = atoms.writes | atoms.reads
    used = {name for name, _ in followed}
    for (name, dim), first in atoms.first.items():
        root = atoms.parent[first : first + atoms.shapes[name][dim]]
        roots[name, dim] = root
        for one in root.unique().tolist():
            signature[one].add((name, dim))
            if name not in used:
                causes.setdefault(one, "not used in a way that was followed")
            elif name in why_not:
                causes.setdefault(one, f"{'read' if (name, dim) in atoms.reads else 'made'} by {name}: {why_not[name]}")
    alike: dict[tuple[Dim, ...], list[int]] = defaultdict(list)
    for root, dims in signature.items():
        if not dims & atoms.writes:
            causes.setdefault(root, "nothing that can be pruned makes it")
        if not dims & atoms.reads:
            causes.setdefault(root, "nothing that can be pruned reads it")
        if root not in causes:
            alike[tuple(sorted(dims))].append(root)
    for members in alike.values():
        if len(members) == 1:
            why = atoms.mixed.get(members[0], "the layers")
            causes[members[0]] = f"{why} binds all of them together"
    number: dict[int, int] = {}
    families, family = [], []
    order = {name: place for place, name in enumerate(may)}
    heads = set(atoms.parent[sorted(atoms.heads)].tolist()) if atoms.heads else set()
    for dims, members in sorted(alike.items(), key=lambda one: min(order.get(name, 0) for name, _ in one[0])):
        if members[0] in causes:
            continue
        kind = "head" if heads.intersection(members) else "channel"
        makes = sorted((one for one in dims if one in atoms.writes), key=lambda one: order[one[0]])
        reads = sorted((one for one in dims if one in atoms.reads), key=lambda one: order[one[0]])
        for root in members:
            number[root] = len(family)
            family.append(len(families))
        families.append(Family(tuple(makes), tuple(reads), kind, len(members)))
    table = torch.full((len(atoms.parent),), -1)
    table[list(number)] = torch.tensor(list(number.values()))
    of = {dim: ids for dim, root in roots.items() if ((ids := table[root]) >= 0).any()}
    left = []
    for (name, dim), root in roots.items():
        told = Counter(causes[one] for one in root.tolist() if one in causes)
        if told and name in may and (name not in used or (name, dim) in followed):
            left += [((name, dim), cause) for cause, _ in told.most_common(1)]
    stay = {atom: causes[root] for atom, root in enumerate(atoms.parent.tolist()) if root in causes}
    shapes = {name: part.shape for name, part in may.items()}
    positions = {name: atoms.positions.get(name, 0) for name in may}
    return Groups(of, torch.tensor(family, dtype=torch.int64), families, shapes, positions), left, stay


def halves(groups: Groups) -> Iterator[Tensor]:
    """Every group once in one of two sets of which each has about half of every family: bool, a group each."""
    within = torch.zeros(len(groups), dtype=torch.int64)
    for number in range(len(groups.families)):
        mine = groups.family == number
        within[mine] = torch.arange(int(mine.sum()))
    for parity in (0, 1):
        yield within % 2 == parity


