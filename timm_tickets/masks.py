"""Masks: which weights may be pruned, which are kept, and exact counts. Pure functions on plain dictionaries.

A mask is ``dict[str, BoolTensor]``: a timm parameter name, and for each weight whether it is kept (True) or pruned.
Scores have the same keys and shapes, floats, higher meaning keep.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal

import numpy as np
import torch
from timm.layers import RmsNorm, RmsNorm2d, SimpleNorm, SimpleNorm2d
from torch import Tensor, nn

from .settings import SettingError
from .wrappers import plain_model

Masks = dict[str, Tensor]
Scores = dict[str, Tensor]
Scope = Literal["global", "layerwise"]
Distribution = Literal["uniform", "erk", "epl"]

MATRICES = (nn.Linear, nn.modules.conv._ConvNd)
_NORMS = (
    *(nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm),
    *(RmsNorm, RmsNorm2d, SimpleNorm, SimpleNorm2d),
)


def classifier_names(model: nn.Module) -> tuple[str, ...]:
    """Module names of a timm model's classifier, from ``pretrained_cfg['classifier']``; empty where there is none."""
    config = getattr(plain_model(model), "pretrained_cfg", None) or {}
    found = config.get("classifier")
    if found is None:
        return ()
    return (found,) if isinstance(found, str) else tuple(found)


def prunable_names(
    model: nn.Module, include: Sequence[str] = ("*",), exclude: Sequence[str] = (), classifier: bool = False
) -> list[str]:
    """Names of the weights that may be pruned: every convolution's and linear layer's, but not the classifier's.

    Args:
        model: A timm model, or any module.
        include: Wildcards (fnmatch) on parameter names; a weight must match one of them.
        exclude: Wildcards on parameter names; a weight that matches one of them is left alone.
        classifier: Whether the classifier may be pruned too, as in papers where every layer takes part.

    Returns:
        Parameter names in the model's own order. A weight that two layers share is named once.

    Raises:
        SettingError: Nothing is left to prune, or a wildcard matches no weight (most often a misspelt one).
    """
    model = plain_model(model)
    classifiers = () if classifier else classifier_names(model)
    weights = {id(m.weight) for m in model.modules() if isinstance(m, MATRICES)}
    candidates = [
        name
        for name, parameter in model.named_parameters()
        if id(parameter) in weights and not any(name.startswith(f"{c}.") for c in classifiers)
    ]
    for setting, patterns in (("include", include), ("exclude", exclude)):
        for pattern in patterns:
            if candidates and not any(fnmatchcase(name, pattern) for name in candidates):
                raise SettingError(
                    f"{setting}: {pattern!r} matches none of the {len(candidates)} prunable weights, "
                    f"which are named like {candidates[0]!r} and {candidates[-1]!r}; correct or drop the wildcard"
                )
    names = [
        name
        for name in candidates
        if any(fnmatchcase(name, p) for p in include) and not any(fnmatchcase(name, p) for p in exclude)
    ]
    if not names:
        raise SettingError(
            f"no prunable weight in {type(model).__name__}: {len(candidates)} convolution and linear weights outside "
            f"the classifier, none left by include={tuple(include)} and exclude={tuple(exclude)}; widen these settings"
        )
    return names


def norms(model: nn.Module) -> list[Any]:
    """The normalisation layers, which may have a learned scale and shift."""
    return [module for module in model.modules() if isinstance(module, _NORMS)]


def full_masks(weights: Mapping[str, Tensor]) -> Masks:
    """Masks that keep every weight, on the CPU."""
    return {name: torch.ones(weight.shape, dtype=torch.bool) for name, weight in weights.items()}


def total(masks: Mapping[str, Tensor]) -> int:
    """Number of weights under the masks, kept or pruned."""
    return sum(mask.numel() for mask in masks.values())


def kept(masks: Mapping[str, Tensor]) -> int:
    """Number of weights kept."""
    return sum(int(mask.sum()) for mask in masks.values())


def sparsity(masks: Mapping[str, Tensor]) -> float:
    """Fraction of the weights under the masks that is pruned, in [0, 1].

    >>> sparsity({"fc.weight": torch.tensor([True, False, False, False])})
    0.75
    """
    return 1 - kept(masks) / total(masks)


def layer_sparsities(masks: Mapping[str, Tensor]) -> dict[str, float]:
    """Sparsity of each layer, in [0, 1]."""
    return {name: 1 - int(mask.sum()) / mask.numel() for name, mask in masks.items()}


def keep_count(count: int, sparsity: float) -> int:
    """How many of ``count`` weights an asked sparsity keeps: ``count - round(count * sparsity)``.

    Raises:
        SettingError: The sparsity is outside [0, 1), or would round to keeping nothing.

    >>> keep_count(1000, 0.95)
    50
    """
    if not 0 <= sparsity < 1:
        raise SettingError(f"sparsity: {sparsity} is not valid; it is the pruned fraction, at least 0 and below 1")
    keep = count - round(count * sparsity)
    if keep < 1:
        raise SettingError(
            f"sparsity: {sparsity} would prune all of the {count} prunable weights; "
            f"the most that leaves one is {1 - 1 / count:.6g}"
        )
    return keep


def top(scores: Tensor, count: int) -> Tensor:
    """Mask of the ``count`` highest scores, exactly; among equal scores the earlier in memory order is kept.

    Args:
        scores: Any shape, float; ``-inf`` marks what must not be kept.
        count: How many to keep, 0 to ``scores.numel()``.

    Returns:
        Bool tensor of the scores' shape, on their device, with exactly ``count`` True.

    >>> top(torch.tensor([1.0, 3.0, 2.0, 2.0, 2.0]), 3).tolist()
    [False, True, True, True, False]
    """
    flat = scores.detach().flatten()
    if not 0 <= count <= flat.numel():
        raise ValueError(f"count: {count} cannot be kept of {flat.numel()} scores")
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    # kthvalue would place NaN above every number and so keep it without a word.
    if flat.isnan().any():
        raise ValueError("scores: NaN among them; the weights they come from are probably NaN too")
    threshold = flat.kthvalue(flat.numel() - count + 1).values
    mask = flat > threshold
    ties = (flat == threshold).nonzero().flatten()
    mask[ties[: count - int(mask.sum())]] = True
    return mask.view(scores.shape)


def fill(count: int, shares: Mapping[str, int], caps: Mapping[str, int]) -> dict[str, int]:
    """Split ``count`` in proportion to shares, no part above its cap: what a full part cannot take the others share.

    Exact in sum: fractions go by largest remainder, ties to the first.

    >>> fill(5, {"a": 3, "b": 3, "c": 6}, {"a": 3, "b": 3, "c": 6})
    {'a': 1, 'b': 1, 'c': 3}
    >>> fill(9, {"a": 1, "b": 1, "c": 1}, {"a": 1, "b": 20, "c": 20})
    {'a': 1, 'b': 4, 'c': 4}
    """
    if not 0 <= count <= sum(caps.values()):
        raise ValueError(f"count: {count} cannot be split over parts that hold {sum(caps.values())}")
    out: dict[str, int] = {}
    open_parts = dict(shares)
    while True:
        whole = sum(open_parts.values())
        full = [name for name, share in open_parts.items() if count * share >= caps[name] * whole]
        if not full:
            break
        for name in full:
            out[name] = caps[name]
            del open_parts[name]
        count -= sum(caps[name] for name in full)
    parts = {name: divmod(count * share, whole) for name, share in open_parts.items()}
    rest = count - sum(quotient for quotient, _ in parts.values())
    first = sorted(parts, key=lambda name: -parts[name][1])[:rest]
    out |= {name: quotient + (name in first) for name, (quotient, _) in parts.items()}
    return {name: out[name] for name in shares}


def budgets(
    shapes: Mapping[str, Sequence[int]],
    count: int,
    distribution: Distribution,
    caps: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """How many of ``count`` weights each layer gets.

    Args:
        shapes: Shape of each layer's weight.
        count: How many there are to give.
        distribution: ``uniform``: the same density in every layer; ``erk``: density in proportion to the sum of a
            layer's dimensions over their product, at most 1 (Evci et al. 2020, 1911.11134, section 3); ``epl``: the
            same number in every layer, at most all (Otsuka et al. 2024, 2402.14029).
        caps: The most a layer can take, where it is not all of its weights.
    """
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    shares = {"uniform": sizes, "erk": {n: sum(shape) for n, shape in shapes.items()}, "epl": dict.fromkeys(shapes, 1)}
    return fill(count, shares[distribution], caps or sizes)


def prune(
    masks: Mapping[str, Tensor],
    scores: Mapping[str, Tensor],
    count: int,
    scope: Scope = "global",
    distribution: Distribution = "uniform",
) -> Masks:
    """Prune ``count`` more weights, those with the lowest scores among the kept.

    Args:
        masks: Bool, the masks to start from; what they prune stays pruned.
        scores: Float, same keys and shapes, on any device.
        count: How many to prune now, over all layers together.
        scope: ``global`` compares all layers with one another; ``layerwise`` prunes each by itself.
        distribution: Layerwise, ``uniform`` prunes the same fraction of what each layer still keeps; ``erk`` and
            ``epl`` keep what `budgets` gives each layer.

    Returns:
        New masks, with exactly ``count`` fewer weights kept.
    """
    alive: Scores = {}
    for name, mask in masks.items():
        score = scores[name].detach()
        # Half precision is compared in float32: kthvalue lacks it on some devices.
        score = score.to(mask.device, torch.promote_types(score.dtype, torch.float32))
        alive[name] = score.masked_fill(~mask, -torch.inf)
    if scope == "layerwise":
        sizes = {name: int(mask.sum()) for name, mask in masks.items()}
        if distribution == "uniform":
            cuts = fill(count, sizes, sizes)
            keeps = {name: size - cuts[name] for name, size in sizes.items()}
        else:
            # Of a larger count a layer's rounded share may be smaller, so what it still keeps is its cap.
            shapes = {name: mask.shape for name, mask in masks.items()}
            keeps = budgets(shapes, kept(masks) - count, distribution, sizes)
        return {name: top(score, keeps[name]) for name, score in alive.items()}
    everything = top(torch.cat([score.flatten() for score in alive.values()]), kept(masks) - count)
    parts = everything.split([score.numel() for score in alive.values()])
    return {name: part.view(score.shape) for (name, score), part in zip(alive.items(), parts, strict=True)}


def exchange(mask: Tensor, drop: Tensor, grow: Tensor, count: int) -> Tensor:
    """Drop ``count`` kept weights and grow as many of those then pruned: the step of sparse training that moves masks.

    Args:
        mask: Bool, any shape.
        drop: Same shape; of the kept the lowest are dropped.
        grow: Same shape; of the pruned, the just dropped among them, the highest grow.
        count: How many; fewer where not so many are kept.

    >>> mask = torch.tensor([True, True, False, False])
    >>> exchange(mask, torch.tensor([1.0, 2.0, 0.0, 0.0]), torch.tensor([0.0, 9.0, 3.0, 4.0]), 1).tolist()
    [False, True, False, True]
    """
    size = int(mask.sum())
    left = top(drop.float().masked_fill(~mask, -torch.inf), size - min(count, size))
    return left | top(grow.float().masked_fill(left, -torch.inf), size - int(left.sum()))


def digest(masks: Mapping[str, Tensor]) -> bytes:
    """SHA-256 of masks: names, shapes and every bit."""
    found = hashlib.sha256()
    for name in sorted(masks):
        found.update(f"{name} {list(masks[name].shape)}\n".encode())
        found.update(np.packbits(masks[name].flatten().cpu().numpy()).tobytes())
    return found.digest()


def intersect(*masks: Mapping[str, Tensor]) -> Masks:
    """Keep what every one of the masks keeps.

    Raises:
        SettingError: They are not masks of the same weights.

    >>> a, b = torch.tensor([True, True, False]), torch.tensor([False, True, True])
    >>> intersect({"w": a}, {"w": b})["w"].tolist()
    [False, True, False]
    """
    first, *others = masks
    out = {name: mask.clone() for name, mask in first.items()}
    for other in others:
        check_same(out, other)
        for name in out:
            out[name] &= other[name]
    return out


def check_same(masks: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> None:
    """Refuse masks that are not of the same weights, by name and shape.

    Raises:
        SettingError: They are not.
    """
    shapes, theirs = ({name: tuple(mask.shape) for name, mask in one.items()} for one in (masks, others))
    if shapes != theirs:
        apart = sorted(name for name in shapes.keys() | theirs.keys() if shapes.get(name) != theirs.get(name))
        raise SettingError(
            f"the masks are not of the same weights: {len(apart)} differ in name or shape, the first is {apart[0]} "
            f"({shapes.get(apart[0], 'missing')} and {theirs.get(apart[0], 'missing')}); compare tickets of one model"
        )


def shuffled_masks(masks: Mapping[str, Tensor], seed: int) -> Masks:
    """Random masks with the same number of kept weights in every layer: the control a ticket has to beat."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: mask.flatten()[torch.randperm(mask.numel(), generator=generator)].view(mask.shape)
        for name, mask in masks.items()
    }
