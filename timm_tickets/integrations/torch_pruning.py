"""Tickets inside torch-pruning: what its pruners rank channels by.

Masks and scores are of whole weights, and a pruner of torch-pruning's takes parts of these away, step by step. So that
both go on belonging together, each layer's node in its graph gets one more dependency, which cuts what is known of the
layer's weight as the layer itself is cut.
"""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..core.errors import SettingError, TicketError
from ..core.optional import torch_pruning
from ..core.private import changes_of, graph_of
from ..pruning.method import Method
from ..pruning.pruner import Pruner
from ..pruning.registry import get_method, list_pruners
from ..sparse.prunable import prunable_names
from ..sparse.subnet import Subnet
from ..structure.dependencies import TRANSPOSED, axis_of
from ..tickets.ticket import Ticket, load_ticket

MATRICES = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED, nn.Linear)


class TicketImportance:
    """What a ticket, or scores of weights, say of channels: an importance for any of torch-pruning's pruners.

    A channel's importance is the mean over all weights that make it and that read it: of a ticket the fraction kept,
    0 where nothing is; of scores their mean. Channels without a scored weight have none, and stay.

    Args:
        ticket_or_scores: A ticket, or its path; masks, or scores, by parameter name; a pruner of this package: one
            whose runs have ended, for its ticket; or one that scores a model without training, its name or settings,
            for the scores of its first cut, computed anew whenever the model has changed.
        normalize: Whether to divide by the group's mean, as torch-pruning's own importances do: for scores whose size
            differs from layer to layer, where ``global_pruning`` compares layers.

    Raises:
        SettingError: It is none of these, or torch-pruning is not installed.
        TicketError: The ticket cannot be read.
    """

    def __init__(
        self,
        ticket_or_scores: "Ticket | str | Path | Mapping[str, Tensor] | Pruner | Method",
        normalize: bool = False,
    ):
        torch_pruning("TicketImportance")
        given: Any = ticket_or_scores
        if isinstance(given, str) and given in list_pruners():
            given = get_method(given)(sparsity=0.5)
        elif isinstance(given, str | Path):
            given = load_ticket(given)
        elif isinstance(given, Pruner):
            given = given.ticket if given.runs_done else given.method
        self._method = given if isinstance(given, Method) else None
        self._ticket = given if isinstance(given, Ticket) else None
        scores: Any = given if self._ticket is None else self._ticket.masks
        scores = scores if self._method is None else {}
        if not isinstance(scores, Mapping) or not all(isinstance(one, Tensor) for one in scores.values()):
            raise SettingError(
                f"ticket_or_scores: a {type(given).__name__} is neither a ticket nor scores by parameter name; give a "
                "ticket, its path, masks, scores, or a pruner of this package"
            )
        self._scores: Mapping[str, Tensor] = scores
        self._normalize = normalize
        self._followed: WeakKeyDictionary[Any, dict[nn.Module, Followed]] = WeakKeyDictionary()
        self._read: list[tuple[Tensor, int]] = []  # the parameters that the scores were computed of, as they were

    def __call__(self, group: Any) -> Tensor | None:
        """The importance of each channel of a group's root, 1-D; None where no weight of the group is scored.

        Args:
            group: ``torch_pruning.Group``.

        Raises:
            SettingError: The scores are of other shapes than the model's weights.
            TicketError: The ticket is for another architecture.
        """
        values = self._values(graph_of(group))
        place = {root: number for number, root in enumerate(group[0].idxs)}
        sums, counts = torch.zeros(2, len(place), dtype=torch.float64)
        for number, (dep, idxs) in enumerate(group):
            roots = group[number].root_idxs
            makes = made_by(dep)
            if makes is None or dep.layer not in values or None in roots:
                continue
            if values[dep.layer].shape != dep.layer.weight.shape:
                raise SettingError(
                    f"importance: {dep.target.name} was cut past the pruner's graph; begin with a new one"
                )
            found, each = channels(values[dep.layer], dep.layer, makes)
            at = torch.tensor([place[root] for root in roots])
            sums.index_add_(0, at, found[idxs])
            counts.index_add_(0, at, torch.full((len(idxs),), each, dtype=torch.float64))
        if not counts.any():
            return None
        means = sums / counts.clamp(min=1)
        means = means / means.mean() if self._normalize else means
        return means.float().to(next(graph_of(group).model.parameters()).device)

    def _values(self, graph: Any) -> dict[nn.Module, Tensor]:
        """What is known of each layer's weight, as the layer now is."""
        if self._method is not None:
            now = [(one, changes_of(one)) for one in graph.model.parameters()]
            same = [a is b and one == other for (a, one), (b, other) in zip(now, self._read, strict=False)]
            if len(now) != len(self._read) or not all(same):
                self._scores, self._read = scored(self._method, graph.model), now
            return self._of_layers(graph.model)
        if graph not in self._followed:
            if self._ticket is not None:
                self._ticket.check_architecture(graph.model)
            first = self._of_layers(graph.model)
            self._followed[graph] = {layer: Followed(graph, layer, one) for layer, one in first.items()}
        return {layer: one.values for layer, one in self._followed[graph].items()}

    def _of_layers(self, model: nn.Module) -> dict[nn.Module, Tensor]:
        """What was given, by layer. What a ticket does not mention it keeps."""
        masks = bool(self._scores) and all(one.dtype == torch.bool for one in self._scores.values())
        layers = {f"{name}.weight": one for name, one in model.named_modules() if isinstance(one, MATRICES)}
        if not layers.keys() & self._scores.keys():
            raise SettingError(
                f"ticket_or_scores: none of its {len(self._scores)} names is a weight of a convolution or linear layer "
                f"of this {type(model).__name__}; those are named like {next(iter(layers), 'nothing')!r}"
            )
        out = {}
        for name, layer in layers.items():
            shape = layer.weight.shape
            value = self._scores.get(name, torch.ones(shape) if masks else None)
            if value is not None and value.shape != shape:
                raise TicketError(
                    f"{name}: {list(value.shape)} is given, and the model's is {list(shape)}; give what is of this "
                    "model, before any of it is pruned"
                )
            if value is not None:
                out[layer] = value.detach().cpu().double()
        return out


class Followed:
    """What is known of a layer's weight, cut as torch-pruning cuts the layer.

    Args:
        graph: ``torch_pruning.DependencyGraph``.
        layer: The layer.
        values: Of its weight's shape.
    """

    pruning_dim = 0  # torch-pruning sets it on whoever it calls

    def __init__(self, graph: Any, layer: Any, values: Tensor):
        self.layer, self.values = layer, values
        tp, pruner = torch_pruning("TicketImportance"), graph.get_pruner_of_module(layer)
        if (node := graph.module2node.get(layer)) is None:  # not in its graph: it will not be cut
            return
        known = tp.Node(self, None, f"what is known of {node.name}")
        for trigger, handler in {
            pruner.prune_in_channels: self.cut_in,
            pruner.prune_out_channels: self.cut_out,
        }.items():
            node.dependencies.append(tp.Dependency(trigger, handler, node, known))

    def cut_out(self, _: Any, gone: Sequence[int]) -> None:
        """Channels that the layer makes are gone."""
        self._cut(axis_of(self.layer, True), gone)

    def cut_in(self, _: Any, gone: Sequence[int]) -> None:
        """Channels that it reads are gone."""
        self._cut(axis_of(self.layer, False), gone)

    def _cut(self, axis: int, gone: Sequence[int]) -> None:
        groups = getattr(self.layer, "groups", 1) if axis == 1 else 1
        left = sorted(set(range(self.values.shape[axis] * groups)) - set(gone))
        self.values = self.values.index_select(axis, torch.tensor(left[: len(left) // groups], dtype=torch.int64))


def made_by(dep: Any) -> bool | None:
    """Whether a dependency cuts channels that a layer makes; False for those that it reads, None for other layers."""
    tp = torch_pruning("TicketImportance")
    if dep.handler in (tp.prune_conv_out_channels, tp.prune_linear_out_channels, tp.prune_depthwise_conv_out_channels):
        return True
    return False if dep.handler in (tp.prune_conv_in_channels, tp.prune_linear_in_channels) else None


def channels(values: Tensor, layer: Any, makes: bool) -> tuple[Tensor, int]:
    """Of each channel that a layer makes or reads, the sum over its weights, and how many these are."""
    axis, groups = axis_of(layer, makes), getattr(layer, "groups", 1)
    if axis == 1:  # of a grouped convolution each part has channels of its own
        parts = values.reshape(groups, len(values) // groups, values.shape[1], -1)
        return parts.sum((1, 3)).flatten(), parts[0, :, 0].numel()
    return values.flatten(1).sum(1), values[0].numel()


class _Scored(Exception):
    """A method has come to its first cut."""


def scored(method: Method, model: nn.Module) -> Mapping[str, Tensor]:
    """The scores by which a method first cuts a model, on a copy of it.

    Raises:
        SettingError: It trains before, or cuts by no scores of weights.
    """
    work = copy.deepcopy(model)
    subnet = Subnet(work, prunable_names(work, method.include, method.exclude, method.classifier))
    found: dict[str, Tensor] = {}

    def cut(masks: Any, scores: Mapping[str, Tensor], *_: Any) -> None:
        found.update(scores)
        raise _Scored

    bound: Any = method.on(subnet)
    object.__setattr__(bound, "cut", cut)
    try:
        with torch.enable_grad():  # torch-pruning's pruners work without
            runs = next(bound.search(subnet), None)
    except _Scored:
        return found
    told = "trains, or reads gradients of your images, first" if runs else "has no scores of single weights"
    raise SettingError(
        f"ticket_or_scores: {method.name} {told}; search with create_pruner, and give the pruner, or its ticket"
    )
