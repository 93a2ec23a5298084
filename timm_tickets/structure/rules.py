"""What each operation makes of labels: how numbers move, which of them a result depends on."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .labels import NONE, Atoms, Tags

# Names of torch's operations, without the "_" of those in place.
# These move numbers and compute nothing: labels and tags move alike.
MOVES = {
    *("view", "_unsafe_view", "reshape", "_reshape_alias", "permute", "transpose", "t", "slice", "select", "split"),
    *("split_with_sizes", "chunk", "unsafe_split", "unsafe_chunk", "unbind", "unsqueeze", "squeeze", "expand"),
    *("expand_as", "repeat", "cat", "stack", "roll", "flip", "rot90", "index", "index_select", "gather"),
    *("constant_pad_nd", "alias", "detach", "clone", "contiguous", "unfold", "im2col", "pixel_shuffle"),
    *("pixel_unshuffle", "channel_shuffle", "native_channel_shuffle", "narrow", "diagonal", "movedim", "lift_fresh"),
    *("_to_copy", "tril", "triu", "swapaxes", "view_as", "unflatten", "flatten", "slice_scatter", "select_scatter"),
    *("repeat_interleave", "permute_copy", "view_copy", "expand_copy", "squeeze_copy", "unsqueeze_copy"),
}
# Every image and channel by itself, positions together.
SPATIAL = {
    *("avg_pool1d", "avg_pool2d", "avg_pool3d", "max_pool1d", "max_pool2d_with_indices", "max_pool3d_with_indices"),
    *("_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "adaptive_max_pool2d", "mkldnn_adaptive_avg_pool2d"),
    *("reflection_pad1d", "reflection_pad2d", "replication_pad2d", "upsample_nearest2d", "upsample_bilinear2d"),
    *("upsample_bicubic2d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa", "_upsample_nearest_exact2d"),
    *("upsample_nearest1d", "upsample_linear1d", "grid_sampler_2d", "mkldnn_max_pool2d"),
}
# Many numbers become one, along some dimensions or all.
REDUCTIONS = {
    *("mean", "sum", "amax", "amin", "max", "min", "var", "var_mean", "std", "std_mean", "prod", "logsumexp", "norm"),
    *("linalg_vector_norm", "argmax", "argmin", "any", "all", "nansum"),
}
# Each result depends on all numbers along one dimension, whose length may stay.
ALONG = {"_softmax", "_log_softmax", "_safe_softmax", "cumsum", "cumprod", "sort", "topk", "argsort", "logcumsumexp"}
# Pointwise in what they compute, though torch does not say so.
POINTWISE = {
    *(
        "native_dropout",
        "masked_fill",
        "where",
        "copy",
        "hardtanh",
        "glu",
        "prelu",
        "_prelu_kernel",
        "rrelu_with_noise",
    ),
    *("softplus", "hardswish", "hardsigmoid", "mish", "silu", "gelu", "relu6", "threshold", "nan_to_num", "clamp"),
}
# Batch normalisation: every channel by itself.
NORMS = {"native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "cudnn_batch_norm"}
# They fill, draw or read numbers: none of a channel comes out.
NOTHING = {
    "fill_",
    "zero_",
    "uniform_",
    "normal_",
    "bernoulli_",
    "_local_scalar_dense",
    "sym_size",
    "random_",
    "as_strided_",
}
# They make a new tensor, and none of a channel is in it.
UNLABELLED = {"zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "new_zeros", "new_ones"}
UNLABELLED |= {"new_empty", "new_full", "bernoulli", "argmax", "argmin", "_assert_async", "_assert_tensor_metadata"}

_MIXES_POSITIONS = "mixes positions, not channels"
_READS_WHAT_STAYS = "reads what stays: images, or channels that cannot go"


def argument(func: Any, args: Sequence[Any], kwargs: dict[str, Any], name: str, default: Any = None) -> Any:
    """An argument of an operation by its name."""
    for place, one in enumerate(func._schema.arguments):
        if one.name == name:
            found = args[place] if place < len(args) and not one.kwarg_only else kwargs.get(name, one.default_value)
            return default if found is None else found
    return default


def join(atoms: Atoms, labels: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    """Labels of what is computed element by element from several tensors, such as a sum of two."""
    out = None
    for label in labels:
        label = label.expand(tuple(shape))
        out = label if out is None else atoms.unite(out, label)
    return torch.full(tuple(shape), NONE) if out is None else out


def reduced(atoms: Atoms, label: Tensor, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
    """Labels of a mean, a maximum and the like over some dimensions."""
    name = func.overloadpacket.__name__
    dims = argument(func, args, kwargs, "dim", list(range(label.ndim)))
    dims = [dims] if isinstance(dims, int) else list(dims) or list(range(label.ndim))
    dims = sorted({dim % label.ndim for dim in dims}) if label.ndim else []
    label = atoms.mix(label, dims, name)
    if not argument(func, args, kwargs, "keepdim", False):
        label = label.reshape([size for dim, size in enumerate(label.shape) if dim not in dims])
    return label


def normalised(atoms: Atoms, label: Tensor, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
    """Labels of a layer or group normalisation: those that are normalised together unite, and stay where they are."""
    if "group_norm" in func.overloadpacket.__name__:
        parts = label.reshape(label.shape[0], argument(func, args, kwargs, "group"), -1)
        atoms.mix(parts, [2], "GroupNorm")
        return label
    count = len(argument(func, args, kwargs, "normalized_shape"))
    atoms.mix(label, range(label.ndim - count, label.ndim), "LayerNorm")
    return label


def spatial(atoms: Atoms, label: Tensor, shape: Sequence[int], why: str) -> Tensor:
    """Labels of a pooling, padding or resizing: (batch, channels, ...) or (channels, ...)."""
    dims = {"1d": 1, "2d": 2, "3d": 3}
    count = next((size for ending, size in dims.items() if ending in why), label.ndim - 2)
    return atoms.mix(label, range(label.ndim - count, label.ndim), why).expand(tuple(shape))


def multiplied(atoms: Atoms, label: Tensor, tags: Tags, reads: int, makes: int) -> Tensor:
    """Labels of rows of activations times a matrix: its columns read their channels, its rows make new ones.

    Args:
        atoms: The atoms.
        label: Of the activations, (rows, K).
        tags: Of the matrix.
        reads: The matrix's axis that is summed over.
        makes: The matrix's axis that makes the result.

    Returns:
        Labels (rows, N).
    """
    read, made = tags.along(reads), tags.along(makes)
    sizes = next(iter(tags.dims.values())).shape if tags.dims else (1, 1)
    name, out = tags.name, (label.shape[0], sizes[makes])
    atoms.positions[name] = atoms.positions.get(name, 0) + label.shape[0]
    first = label[:, :1]
    # Every row is of one channel: the matrix sums over positions, and the channels come through as they were.
    through = label.shape[1] > 1 and torch.equal(first.expand_as(label), label)
    if through and first[first > 0].unique().numel() > 1:
        for dim, size in enumerate(atoms.shapes[name]):
            atoms.keep(atoms.of(name, dim, torch.arange(size)), _MIXES_POSITIONS)
        return first.expand(out)
    column = atoms.mix(label, [0], "a product")[0]
    stays = atoms.living(column) == 0
    if read is None:
        atoms.keep(column, f"read by {name}, a part at a time")
    if read is not None:
        dim, index = read
        atom = atoms.of(name, dim, index)
        atoms.reads.add((name, dim))
        atoms.keep(atom[stays], _READS_WHAT_STAYS)
        atoms.unite(atom, column)
    if made is None:
        return torch.full(out, NONE)
    atoms.writes.add((name, made[0]))
    return atoms.of(name, *made).expand(out)


def convolved(atoms: Atoms, label: Tensor, tags: Tags, groups: int, transposed: bool, shape: Sequence[int]) -> Tensor:
    """Labels of a convolution: ``label`` (batch, in, ...), the result's shape (batch, out, ...)."""
    name = tags.name
    count = 1
    for size in shape[2:]:
        count *= size
    channels = atoms.mix(label, [0, *range(2, label.ndim)], "a convolution").flatten()
    outputs, view = shape[1], (1, -1, *[1] * (len(shape) - 2))
    if groups == 1:
        reads, makes = (0, 1) if transposed else (1, 0)
        found = multiplied(atoms, channels[None], tags, reads, makes)
        atoms.positions[name] += count * shape[0] - 1
        return found.reshape(view).expand(tuple(shape))
    atoms.positions[name] = atoms.positions.get(name, 0) + count * shape[0]
    rows = None if transposed else tags.along(0)
    if rows is None or atoms.shapes[name][0] != outputs:
        atoms.keep(channels, f"read by {name}, a grouped convolution of a kind that cannot shrink")
        return torch.full(tuple(shape), NONE)
    made = atoms.of(name, *rows)
    atoms.writes.add((name, 0))
    inputs = channels.numel()
    if groups >= inputs // groups:  # a whole group goes: what it reads with what it makes
        made, channels = made.view(groups, -1), channels.view(groups, -1)
        if not bool((atoms.living(channels) > 0).all()):  # what it reads stays, so it has to stay as well
            atoms.keep(made[(atoms.living(channels) == 0).any(1)], _READS_WHAT_STAYS)
        both = torch.cat([made, channels], 1)
        united = atoms.mix(both, [1], "a grouped convolution").expand_as(made)
        return united.reshape(view).expand(tuple(shape))
    # The same place of every group goes.
    column = atoms.mix(channels.view(groups, -1), [0], "a grouped convolution")[0]
    found = tags.along(1)
    if found is None:
        atoms.keep(column, f"read by {name}, a part at a time")
    else:
        atom = atoms.of(name, *found)
        atoms.reads.add((name, 1))
        atoms.keep(atom[atoms.living(column) == 0], _READS_WHAT_STAYS)
        atoms.unite(atom, column)
    made = made.view(groups, -1)
    united = atoms.mix(made, [0], "a grouped convolution").expand_as(made)
    return united.reshape(view).expand(tuple(shape))


def producted(atoms: Atoms, one: Tensor, other: Tensor) -> Tensor:
    """Labels of (batch, M, K) times (batch, K, N), both activations: what depends on both is a head."""
    left, right = atoms.mix(one, [2], "a product of activations"), atoms.mix(other, [1], "a product of activations")
    shape = (one.shape[0], one.shape[1], other.shape[2])
    both = (left > 0).expand(shape) & (right > 0).expand(shape)
    out = join(atoms, [left, right], shape)
    if both.any():
        atoms.heads.update(atoms.living(out[both]).unique().long().tolist())
    return out


def moved(func: Any, args: Sequence[Any], kwargs: dict[str, Any], replace: Callable[[Any], Any]) -> Any:
    """The result of an operation that moves numbers, on what stands for them.

    Args:
        func: The operation.
        args: Its arguments.
        kwargs: Its other arguments.
        replace: Gives what stands for a tensor: its label, or an index of its tags.
    """
    name = func.overloadpacket.__name__
    first, *rest = args
    if name in ("cat", "stack"):
        return func([replace(one) for one in first], *rest, **kwargs)
    label = replace(first)
    if name in ("_to_copy", "lift_fresh"):
        return label.clone()
    if name in ("slice_scatter", "select_scatter"):
        return func(label, replace(rest[0]), *rest[1:], **kwargs)
    if name == "constant_pad_nd":
        return func(label, rest[0], NONE)
    if name in ("view", "_unsafe_view", "_reshape_alias"):
        try:
            return torch.ops.aten.view.default(label, rest[0])
        except RuntimeError:  # of other strides than the tensor
            return label.reshape(rest[0])
    if name in ("clone", "contiguous"):
        return label.clone()
    return func(label, *rest, **kwargs)
