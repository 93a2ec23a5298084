"""Which parameters of a model may be pruned, found by what they do, and why the others are left alone.

Prunable is what multiplies activations: the kernels of convolutions, the weights of linear and recurrent layers, and
raw parameters that act as matrices (experts that a layer mixes, projections without a layer of their own). Left alone
is what is looked up or added (embeddings, tables of positions, tokens) or has fewer than two dimensions (biases,
scales), and the classifier, so that heads may differ.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import timm
import torch
from timm.layers import CondConv2d, RmsNorm, RmsNorm2d, SimpleNorm, SimpleNorm2d
from torch import Tensor, nn

from ..core.errors import SettingError, shown, unknown
from .wrappers import plain_model

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
MATRICES = (nn.Linear, *CONVOLUTIONS)
_NORMS = (
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm),
    *(RmsNorm, RmsNorm2d, SimpleNorm, SimpleNorm2d),
)
_KINDS: tuple[tuple[Any, str], ...] = (
    (CONVOLUTIONS, "convolution"),
    (nn.Linear, "linear"),
    (CondConv2d, "experts"),
    ((nn.RNNBase, nn.RNNCellBase), "recurrent"),
    (nn.MultiheadAttention, "projection"),
)
# What a raw parameter is for is not in its type; its author says it in its name. Whole words of it, in this order:
# a relative_position_bias_table is a position first.
_ROLES = {
    "positions": {"pos", "position", "positions", "positional", "rel", "relative", "rope", "freqs"},
    "bias": {"bias", "biases"},
    "tokens": {"token", "tokens", "query", "queries", "latent", "latents", "register", "registers", "prompt"},
    "embedding": {"embed", "embeds", "embedding", "embeddings", "emb", "table", "codebook"},
    "scale": {"scale", "scales", "gamma", "alpha", "beta", "gain", "temperature", "norm", "affine"},
}


@dataclass(frozen=True)
class Part:
    """A parameter of a model, and whether it may be pruned.

    Attributes:
        name: Its name in the model; the first one, where modules share it.
        shape: Its shape.
        kind: What it is: ``convolution``, ``linear``, ``experts``, ``recurrent``, ``projection`` or another ``matrix``;
            of those left alone ``vector`` (fewer than two dimensions larger than 1), ``positions``, ``bias``,
            ``tokens``, ``embedding``, ``scale`` or ``parametrized``.
        why_not: Why it is left alone; empty where it is prunable.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    why_not: str = ""

    @property
    def size(self) -> int:
        """Number of its weights."""
        return math.prod(self.shape)


def classifier_names(model: nn.Module) -> tuple[str, ...]:
    """Module names of a timm model's classifier, from ``pretrained_cfg['classifier']``; empty where there is none."""
    config = getattr(plain_model(model), "pretrained_cfg", None) or {}
    found = config.get("classifier")
    if found is None:
        return ()
    return (found,) if isinstance(found, str) else tuple(found)


def norms(model: nn.Module) -> list[Any]:
    """The normalisation layers, which may have a learned scale and shift."""
    return [module for module in model.modules() if isinstance(module, _NORMS)]


def inspect_model(
    model: nn.Module, include: Sequence[str] = ("*",), exclude: Sequence[str] = (), classifier: bool = False
) -> list[Part]:
    """Every parameter of a model, in the model's order, with what it is and whether it may be pruned.

    Nothing is computed: a model on the meta device will do. Arguments and errors are those of `prunable_names`.
    """
    model = plain_model(model)
    kinds: dict[int, tuple[str, str]] = {}
    for path, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            kind, why_not = _role(path, module, leaf, parameter)
            # What any of its owners looks up is left alone: an embedding tied to a linear layer.
            if why_not or id(parameter) not in kinds:
                kinds[id(parameter)] = kind, why_not
    heads = () if classifier else classifier_names(model)
    headed = {  # under every name they have: a classifier may be reached through another module first
        id(parameter)
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if any(name.startswith(f"{head}.") for head in heads)
    }
    parts: list[Part] = []
    for name, parameter in model.named_parameters():
        kind, why_not = kinds[id(parameter)]
        if not why_not and id(parameter) in headed:
            why_not = "classifier"
        parts.append(Part(name, tuple(parameter.shape), kind, why_not))
    candidates = [part.name for part in parts if not part.why_not]
    include, exclude = ((one,) if isinstance(one, str) else tuple(one) for one in (include, exclude))
    for setting, patterns in (("include", include), ("exclude", exclude)):
        for pattern in patterns:
            if candidates and not any(fnmatchcase(name, pattern) for name in candidates):
                raise SettingError(
                    f"{setting}: {pattern!r} matches none of the {len(candidates)} prunable weights, "
                    f"which are named like {candidates[0]!r} and {candidates[-1]!r}; correct or drop the wildcard"
                )

    def chosen(part: Part) -> Part:
        if part.why_not:
            return part
        if not any(fnmatchcase(part.name, pattern) for pattern in include):
            return Part(part.name, part.shape, part.kind, "not in include")
        if any(fnmatchcase(part.name, pattern) for pattern in exclude):
            return Part(part.name, part.shape, part.kind, "in exclude")
        return part

    found = [chosen(part) for part in parts]
    if all(part.why_not for part in found):
        raise SettingError(
            f"no prunable weight in {type(model).__name__}: {len(candidates)} matrices and kernels outside "
            f"the classifier, none left by include={include} and exclude={exclude}; widen these settings"
        )
    return found


def prunable_names(
    model: nn.Module, include: Sequence[str] = ("*",), exclude: Sequence[str] = (), classifier: bool = False
) -> list[str]:
    """Names of the weights that may be pruned: all that multiply activations, but not the classifier's.

    Args:
        model: A timm model, or any module.
        include: Wildcards (fnmatch) on parameter names; a weight must match one of them.
        exclude: Wildcards on parameter names; a weight that matches one of them is left alone.
        classifier: Whether the classifier may be pruned too, as in papers where every layer takes part.

    Returns:
        Parameter names in the model's own order. A weight that several layers share is named once.

    Raises:
        SettingError: Nothing is left to prune, or a wildcard matches no weight (most often a misspelt one).
    """
    return [part.name for part in inspect_model(model, include, exclude, classifier) if not part.why_not]


def build_to_inspect(arch: str, arguments: Mapping[str, Any] | None = None, device: str = "meta") -> nn.Module:
    """A timm model, on the meta device, where nothing is allocated, unless said otherwise.

    Args:
        arch: A name of timm's registry.
        arguments: Of ``timm.create_model``.
        device: Where it is built.

    Raises:
        SettingError: There is no such architecture, or it refuses the arguments.
    """
    if not timm.is_model(arch):
        raise SettingError(unknown("architecture", arch, timm.list_models()) + " (timm.list_models)")
    given = dict(arguments or {})
    try:
        with torch.device(device):
            return timm.create_model(arch, **given)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        told = f"{type(error).__name__}: {shown(str(error), 600)}"
        raise SettingError(f"architecture: {arch!r} cannot be built with {shown(given)}: {told}") from error


def _role(path: str, module: nn.Module, leaf: str, parameter: Tensor) -> tuple[str, str]:
    """What a parameter is, and why it is left alone; the latter empty where it may be pruned."""
    if "parametrizations" in path.split("."):
        return "parametrized", "another tensor is computed from it"
    if isinstance(module, MATRICES) and leaf == "weight":
        return _kind(module), ""
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return "embedding", "looked up, not multiplied"
    if isinstance(module, _NORMS):
        return "scale", "of a normalisation"
    if sum(length > 1 for length in parameter.shape) < 2:
        return "vector", "fewer than two dimensions"
    words = _words(leaf)
    if words == ["weight"]:  # says nothing; the name of the class may
        words = _words(type(module).__name__)
    for role, told in _ROLES.items():
        if told.intersection(words):
            return role, "looked up or added, not a matrix" if role != "scale" else "scales single channels"
    return _kind(module), ""


def _kind(module: nn.Module) -> str:
    return next((kind for types, kind in _KINDS if isinstance(module, types)), "matrix")


def _words(name: str) -> list[str]:
    """The words of an identifier, lower case.

    >>> _words("rel_pos_h"), _words("PosEmbedRel"), _words("weight_ih_l0")
    (['rel', 'pos', 'h'], ['pos', 'embed', 'rel'], ['weight', 'ih', 'l'])
    """
    return [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)]
