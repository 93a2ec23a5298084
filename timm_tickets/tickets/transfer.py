"""Putting a ticket on its architecture built for another task: other classes, input channels or image size.

What a tensor of another shape may become is decided by what it is, in this order:

- the classifier: the model keeps its own fresh head;
- the first convolution, where the number of input channels differs: for one channel the sum over the old ones, else the
  old ones in turn, scaled so that the sum stays; the mask goes the same way;
- an absolute position embedding or a table of relative position biases: resampled to the model's grid by timm;
- a buffer that follows from the image size: the model's own;
- anything else: an error that names it.
"""

import math
import warnings
from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any

import torch
from timm.layers import resample_abs_pos_embed
from timm.layers.pos_embed_rel import resize_rel_pos_bias_table
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from ..core.errors import TicketError, shown
from ..core.masks import Masks
from ..core.states import State
from ..sparse.prunable import classifier_names


def not_weights(masks: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> list[str]:
    """Names of the masks that are over no floating-point parameter: over a buffer, or what is not there at all."""
    return [name for name in masks if name not in parameters or not parameters[name].is_floating_point()]


def corresponding(given: Mapping[str, Tensor], given_masks: Masks, model: nn.Module) -> tuple[State, Masks]:
    """What a ticket gives a model of its architecture that was built for another task.

    Args:
        given: The ticket's state dict.
        given_masks: Its masks.
        model: The plain model, freshly built for the target; it is not changed.

    Returns:
        The state dict and the masks that it is to have. What the ticket says nothing of is the model's own; a mask on
        the old classifier is left out: the new head is dense.

    Raises:
        TicketError: Tensors that cannot correspond, or masks over what is not a weight, each named; or all masks are on
            the old classifier.
    """
    own = {name: value.detach().cpu() for name, value in model.state_dict().items()}
    heads = tuple(f"{name}." for name in classifier_names(model))
    buffers = {name for name, _ in model.named_buffers()}
    stem = (getattr(model, "pretrained_cfg", None) or {}).get("first_conv")
    stems = {f"{name}.weight" for name in ([stem] if isinstance(stem, str) else stem or [])}
    masks: Masks = {}
    state: State = {}
    wrong: list[str] = []
    for name, value in own.items():
        old = given.get(name)
        if old is None:
            state[name] = value
            if not name.startswith(heads):
                wrong.append(f"{name} is not in the ticket")
        elif old.shape == value.shape and not _other_head(name, heads, given, own):
            state[name] = old
            if name in given_masks:
                masks[name] = given_masks[name]
        elif name.startswith(heads) or name in buffers:
            state[name] = value
        elif name in stems and _same_but_inputs(old, value):
            state[name] = adapted_stem(old, value.shape[1])
            if name in given_masks:
                masks[name] = adapted_stem_mask(given_masks[name], value.shape[1])
        elif (resampled := _resampled(model, name, old, value)) is not None:
            state[name] = resampled
        else:
            wrong.append(f"{name} is {list(old.shape)} in the ticket and {list(value.shape)} in the model")
    wrong += [f"{shown(name)} is not in the model" for name in given if name not in own and not name.startswith(heads)]
    unfit = not_weights(given_masks, dict(model.named_parameters()))
    unfit = [name for name in unfit if name in masks or not name.startswith(heads)]  # the old head's are dropped
    wrong += [f"{shown(name)} has a mask and is not a weight of the model" for name in unfit]
    if wrong:
        raise TicketError(
            "the ticket cannot be transferred to this model, for these tensors do not correspond: "
            + "; ".join(wrong[:5])
            + (f"; and {len(wrong) - 5} more" if len(wrong) > 5 else "")
            + ". Build the ticket's architecture with other num_classes, in_chans or img_size only"
        )
    if not masks:
        raise TicketError(
            f"the ticket cannot be transferred to this model: all that it masks ({', '.join([*given_masks][:3])}) is "
            "in the classifier, and the model has another one; nothing of the ticket would be left"
        )
    return state, masks


def adapted_stem(weight: Tensor, channels: int) -> Tensor:
    """The weight (out, in, ...) of a first convolution for another number of input channels.

    >>> adapted_stem(torch.tensor([[[[1.0]], [[2.0]], [[3.0]]]]), 1).flatten().tolist()
    [6.0]
    >>> adapted_stem(torch.tensor([[[[1.0]], [[2.0]], [[3.0]]]]), 2).flatten().tolist()
    [1.5, 3.0]
    """
    if channels == 1:
        return weight.sum(1, keepdim=True)
    old = weight.shape[1]
    return weight[:, torch.arange(channels) % old] * (old / channels)


def adapted_stem_mask(mask: Tensor, channels: int) -> Tensor:
    """Its mask: what is kept in any of the channels that are summed."""
    return mask.any(1, keepdim=True) if channels == 1 else mask[:, torch.arange(channels) % mask.shape[1]]


def recompute_batch_norm_(model: nn.Module, images: Iterable[Tensor]) -> None:
    """Replace the running statistics of batch normalisation by the mean over these batches; weights stay.

    Args:
        model: The model.
        images: Batches (batch, channels, height, width) of the target's training images, on the model's device.

    Raises:
        ValueError: There are no batches.
    """
    batches = iter(images)
    first = next(batches, None)
    if first is None:
        raise ValueError("images: there are no batches to compute the statistics from")
    update_bn(chain((first,), batches), model)


def _other_head(name: str, heads: tuple[str, ...], given: Mapping[str, Tensor], own: State) -> bool:
    """Whether this belongs to a classifier of another size: its bias must not stay while its weight goes."""
    mine = tuple(head for head in heads if name.startswith(head))
    parts = {key: value for key, value in own.items() if key.startswith(mine)}
    return any(key not in given or given[key].shape != value.shape for key, value in parts.items())


def _same_but_inputs(old: Tensor, new: Tensor) -> bool:
    return old.ndim == new.ndim > 2 and old.shape[:1] == new.shape[:1] and old.shape[2:] == new.shape[2:]


def _resampled(model: nn.Module, name: str, old: Tensor, new: Tensor) -> Tensor | None:
    """A position embedding (1, tokens, width) or a table of relative biases (positions, heads) on the model's grid."""
    leaf = name.rpartition(".")[2]
    if leaf == "relative_position_bias_table" and old.shape[1:] == new.shape[1:]:
        window: Any = getattr(model.get_submodule(name.rpartition(".")[0]), "window_size", None)
        if window is None:
            return None
        with warnings.catch_warnings():  # torch's, of the speed of timm's interpolation
            warnings.simplefilter("ignore")
            return resize_rel_pos_bias_table(old, window, tuple(new.shape))
    if "pos_embed" not in leaf or old.ndim != 3 or old.shape[2] != new.shape[2]:
        return None
    patches: Any = getattr(model, "patch_embed", None)
    grid = getattr(patches, "grid_size", None) or _square(new.shape[1])
    if grid is None:
        return None
    prefix = new.shape[1] - grid[0] * grid[1]
    before = _square(old.shape[1] - prefix)
    if prefix < 0 or before is None:
        return None
    return resample_abs_pos_embed(old, list(grid), list(before), num_prefix_tokens=prefix)


def _square(count: int) -> tuple[int, int] | None:
    side = math.isqrt(max(count, 0))
    return (side, side) if side and side * side == count else None
