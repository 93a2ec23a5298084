"""Finding groups: what a forward pass unites, sorted into families, each tried on the model at hand."""

import copy
import itertools
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..core.errors import SettingError
from ..sparse.describe import describe_model
from ..sparse.prunable import Part, inspect_model
from ..sparse.wrappers import plain_model
from .groups import Dim, Family, Groups
from .labels import Atoms
from .trace import OutOfTime, plainly, run, traced
from .vectors import VectorTrace
from .verify import keep_removable, tried

SECONDS = 60.0  # of this thread's processor that finding and trying may take: what else the machine does does not count
PATIENCE = 600.0  # of the same: where something depends on them, such as a search, which takes far longer itself
PASSES = 4  # a pass that knows what stays frees what was united through that
MATRICES = {"convolution", "linear", "experts", "recurrent", "projection", "matrix"}
_SIDES = (64, 96, 128, 160, 224)


def find_groups(
    model: nn.Module,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    classifier: bool = False,
    seconds: float = SECONDS,
    vectors: bool = False,
    removable: bool = False,
) -> Groups:
    """The groups of a model, each tried on a copy of it; the model stays as it is.

    Args:
        model: A timm model, or any module that takes images; plain or wrapped, but not split.
        include: As in `prunable_names`.
        exclude: As in `prunable_names`.
        classifier: Whether the columns of the classifier may be zeroed too.
        seconds: How long it may take, in seconds of the processor.
        vectors: Whether biases, normalisations, scales and tables are followed to the groups too: `Groups.vectors`.
        removable: Only those that can be taken out of the module, as `compacted` does; with vectors.

    Raises:
        SettingError: It takes longer, or the model takes no images of any size that was tried.
    """
    began = time.thread_time()
    parts = inspect_model(model, include, exclude, classifier)
    work = copy.deepcopy(plain_model(model)).cpu().float().eval()
    parameters = dict(work.named_parameters())
    matrices = {part.name: parameters[part.name] for part in parts if part.kind in MATRICES}
    try:
        images = images_for(work)
        found, stay = _families(traced(work, images, matrices, {}, began + seconds), parts)
        for _ in range(PASSES - 1):
            before = stay
            found, stay = _families(traced(work, images, matrices, before, began + seconds), parts)
            if len(stay) == len(before):
                break
        if vectors or removable:
            found.vectors = _vectors(work, images, matrices, stay, found, began + seconds)
        found = tried(work, images, found, began + seconds)
        found = keep_removable(work, images, found, began + seconds) if removable and len(found) else found
    except OutOfTime:
        raise SettingError(
            f"granularity: the groups of {type(work).__name__} were not found within {seconds:g} s; use "
            "granularity=weight, or fewer layers with include"
        ) from None
    found.seconds = time.thread_time() - began
    return found


def _vectors(
    model: nn.Module,
    images: Tensor,
    matrices: Mapping[str, Tensor],
    stay: Mapping[int, str],
    groups: Groups,
    deadline: float,
) -> dict[Dim, Tensor]:
    """The groups of what else has an entry a channel."""
    named = itertools.chain(model.named_parameters(), model.named_buffers())
    others = {name: value for name, value in named if name not in matrices and value.ndim}
    atoms = Atoms({name: weight.shape for name, weight in matrices.items()}, stay)
    run(trace := VectorTrace(atoms, matrices, deadline, others), model, images)
    table = torch.full((len(atoms.parent),), -1)
    for dim, ids in groups.of.items():
        table[atoms.first[dim] : atoms.first[dim] + len(ids)] = ids
    return trace.found(table)


def images_for(model: nn.Module) -> Tensor:
    """A random image of the smallest size that the model takes.

    Raises:
        SettingError: It takes none that was tried.
    """
    config = getattr(model, "pretrained_cfg", None) or {}
    native = config.get("input_size") or (3, 224, 224)
    told = describe_model(model)["in_chans"], getattr(model, "in_chans", None), native[0]
    own = getattr(getattr(model, "patch_embed", None), "img_size", None)
    small = [] if config.get("fixed_input_size") else [(side, side) for side in _SIDES]
    sides = dict.fromkeys([*([tuple(own)] if own else []), *small, tuple(native[1:]), (32, 32)])
    generator, error = torch.Generator().manual_seed(0), None
    for channels, side in itertools.product(dict.fromkeys(filter(None, told)), sides):
        images = torch.randn(1, channels, *side, generator=generator, dtype=torch.float32)
        try:
            with plainly():
                model(images)
            return images
        except (AssertionError, RuntimeError, ValueError, IndexError, ZeroDivisionError) as found:
            error = found
    raise SettingError(f"granularity: {type(model).__name__} takes no image that was tried: {error}")


def _families(atoms: Atoms, parts: Sequence[Part]) -> tuple[Groups, dict[int, str]]:
    """What the atoms are united to: groups, with what is in none and why, and the atoms that stay."""
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
    for root in roots.values():  # what binds them says more than who reads the one that they are
        one = int(root[0])
        if one in atoms.mixed and causes.get(one, "").endswith(tuple(why_not.values())) and bool((root == one).all()):
            causes[one] = f"{atoms.mixed[one]} binds all of them together"
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
    table[list(number)] = torch.tensor(list(number.values()), dtype=torch.int64)
    of = {dim: ids for dim, root in roots.items() if ((ids := table[root]) >= 0).any()}
    left = []
    for (name, dim), root in roots.items():
        told = Counter(causes[one] for one in root.tolist() if one in causes)
        if told and name in may and (name not in used or (name, dim) in followed):
            left += [((name, dim), cause) for cause, _ in told.most_common(1)]
    stay = {atom: causes[root] for atom, root in enumerate(atoms.parent.tolist()) if root in causes}
    shapes = {name: part.shape for name, part in may.items()}
    positions = {name: atoms.positions.get(name, 0) for name in may}
    return Groups(of, torch.tensor(family, dtype=torch.int64), families, shapes, positions, left), stay
