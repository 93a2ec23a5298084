"""Following every number of a forward pass back to the channels that it depends on."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from . import rules
from .labels import NONE, Atoms, Tags


class OutOfTime(Exception):
    """Following the channels has taken too long."""


class Trace(TorchDispatchMode):
    """Labels every tensor that is computed within it, and tags every one that is a matrix, or is made of one alone.

    Args:
        atoms: Where what is found goes: which channels belong together, and which have to stay.
        matrices: The parameters whose rows and columns are followed, by name.
        deadline: `time.thread_time` at which it gives up.
    """

    def __init__(self, atoms: Atoms, matrices: Mapping[str, Tensor], deadline: float):
        super().__init__()
        self.atoms, self.deadline = atoms, deadline
        self.labels: Any = WeakIdKeyDictionary()
        self.tags: Any = WeakIdKeyDictionary()
        for name, weight in matrices.items():
            self.tags[weight] = Tags.of(name, weight)

    def label(self, tensor: Tensor) -> Tensor:
        """The label of a tensor, which a view of it shares."""
        if tensor not in self.labels:
            self.labels[tensor] = torch.full(tuple(tensor.shape), NONE)
        return self.labels[tensor]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if time.thread_time() > self.deadline:
            raise OutOfTime
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        outs = [one for one in tree_leaves(out) if isinstance(one, Tensor)]
        if name in rules.NOTHING or name in rules.UNLABELLED or not tensors or not outs:
            if name in ("fill_", "zero_"):
                self.label(args[0]).zero_()
            return out
        if any(one in self.tags for one in tensors):
            self._on_matrix(func, name, args, kwargs, tensors, outs)
        else:
            self._on_labels(func, name, args, kwargs, tensors, outs)
        return out

    def _on_labels(
        self, func: Any, name: str, args: Any, kwargs: Any, tensors: list[Tensor], outs: list[Tensor]
    ) -> None:
        """Label what is computed from activations, and from parameters that are no matrices."""
        atoms, base = self.atoms, name.removesuffix("_") if not name.startswith("_") else name
        if base in rules.MOVES:
            found = rules.moved(func, args, kwargs, self.label)
            for one, label in zip(outs, tree_leaves(found), strict=True):
                self.labels[one] = label
            return
        if not any(self._labelled(one) for one in tensors):
            return
        if name in ("index_put", "index_put_", "scatter", "scatter_", "masked_scatter"):
            self._refuse(name, tensors)
            return
        if base in ("bmm", "mm"):
            one, other = (self.label(tensor) for tensor in args[:2])
            two = base == "mm"
            found = rules.producted(atoms, one[None] if two else one, other[None] if two else other)
            self._give(outs[0], found[0] if two else found)
        elif base == "baddbmm":
            found = rules.producted(atoms, self.label(args[1]), self.label(args[2]))
            self._give(outs[0], rules.join(atoms, [self.label(args[0]), found], found.shape))
        elif base in rules.NORMS:
            self._give(outs[0], self.label(args[0]))
        elif base in ("native_layer_norm", "native_group_norm", "_fused_rms_norm"):
            self._give(outs[0], rules.normalised(atoms, self.label(args[0]), func, args, kwargs))
        elif base in rules.SPATIAL:
            self._give(outs[0], rules.spatial(atoms, self.label(args[0]), outs[0].shape, base))
        elif base in rules.REDUCTIONS and len(tensors) == 1:
            found = rules.reduced(atoms, self.label(args[0]), func, args, kwargs)
            for one in outs:
                self._give(one, found)
        elif base in rules.ALONG:
            label = self.label(args[0])
            found = atoms.mix(label, [rules.argument(func, args, kwargs, "dim", -1)], base)
            for one in outs:
                self._give(one, label if one.shape == label.shape else found)
        elif base == "glu":
            self._give(
                outs[0],
                rules.join(atoms, self.label(args[0]).chunk(2, args[1] if len(args) > 1 else -1), outs[0].shape),
            )
        elif torch.Tag.pointwise in func.tags or base in rules.POINTWISE:
            if name == "copy_":
                tensors = tensors[1:]
            found = rules.join(atoms, [self.label(one) for one in tensors if self._labelled(one)], outs[0].shape)
            for one in outs:
                self._give(one, found)
        else:
            self._refuse(name, tensors)

    def _on_matrix(
        self, func: Any, name: str, args: Any, kwargs: Any, tensors: list[Tensor], outs: list[Tensor]
    ) -> None:
        """Tag what is made of one matrix alone; label what a matrix makes of activations."""
        atoms, tagged = self.atoms, [one for one in tensors if one in self.tags]
        first = tensors[0]
        if name in rules.MOVES and len(tagged) == 1 and first in self.tags and name not in ("cat", "stack"):
            tags = self.tags[first]
            made = {dim: tree_leaves(rules.moved(func, args, kwargs, lambda _, i=i: i)) for dim, i in tags.dims.items()}
            for place, one in enumerate(outs):
                self.tags[one] = Tags(tags.name, {dim: parts[place] for dim, parts in made.items()})
            return
        if len(tagged) == 1:
            weight = tagged[0]
            tags, others = self.tags[weight], [one for one in tensors if one is not weight]
            if name == "convolution" and args[1] is weight:
                # args[8]: groups; args[6]: whether it is transposed
                found = rules.convolved(atoms, self.label(args[0]), tags, args[8], args[6], outs[0].shape)
                self._give(outs[0], found)
                return
            if name in ("mm", "addmm", "bmm", "baddbmm"):
                x, w = args[-2:] if name in ("mm", "bmm") else args[1:3]
                self._give(outs[0], self._product(x, w, tags, w is weight, outs[0].shape))
                return
            same = outs[0].shape == weight.shape and not any(self._labelled(one) for one in others)
            if same and (name in rules.NORMS or torch.Tag.pointwise in func.tags):
                self.tags[outs[0]] = tags  # a standardised weight, or a scaled one
                return
        for one in tagged:
            tags = self.tags[one]
            for dim, size in enumerate(atoms.shapes[tags.name]):
                atoms.keep(atoms.of(tags.name, dim, torch.arange(size)), f"goes through {name}")
        self._refuse(name, [one for one in tensors if one not in self.tags])

    def _product(self, x: Tensor, w: Tensor, tags: Tags, right: bool, shape: Any) -> Tensor:
        """Labels of a product with a matrix, which stands on the right of the activations or on the left."""
        label = self.label(x if right else w)
        axes = len(shape)
        if right:
            rows = label.reshape(-1, label.shape[-1])
            return rules.multiplied(self.atoms, rows, tags, axes - 2, axes - 1).reshape(shape)
        turned = label.transpose(-1, -2)
        rows = rules.multiplied(self.atoms, turned.reshape(-1, turned.shape[-1]), tags, axes - 1, axes - 2)
        return rows.reshape(*turned.shape[:-1], -1).transpose(-1, -2)

    def _labelled(self, tensor: Tensor) -> bool:
        return tensor in self.labels and bool(self.labels[tensor].any())

    def _give(self, tensor: Tensor, label: Tensor) -> None:
        label = label.expand(tensor.shape)
        if tensor in self.labels and self.labels[tensor].shape == label.shape:
            self.labels[tensor].copy_(label)  # in place: views see it
        else:
            self.labels[tensor] = label.clone(memory_format=torch.contiguous_format)

    def _refuse(self, name: str, tensors: list[Tensor]) -> None:
        """Channels that go through an operation that is not known here have to stay."""
        for one in tensors:
            if self._labelled(one):
                self.atoms.keep(self.label(one), f"goes through {name}")


@contextmanager
def plainly() -> Iterator[None]:
    """Within the block attention is made of products that can be followed, and nothing is differentiated."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def traced(
    model: nn.Module, images: Tensor, matrices: Mapping[str, Tensor], stay: Mapping[int, str], deadline: float
) -> Atoms:
    """The atoms of a model's matrices, united as a forward pass of these images unites them.

    Args:
        model: The plain model, in evaluation mode.
        images: (batch, channels, height, width).
        matrices: The parameters whose rows and columns are followed, by name.
        stay: Atoms that have to stay, with the cause.
        deadline: `time.thread_time` at which it gives up.

    Raises:
        OutOfTime: It has.
    """
    trace = Trace(Atoms({name: weight.shape for name, weight in matrices.items()}, stay), matrices, deadline)
    return run(trace, model, images)


def run(trace: Trace, model: nn.Module, images: Tensor) -> Atoms:
    """The atoms of a trace, united as a forward pass of these images unites them."""
    with plainly(), trace:
        outputs = model(images)
    for output in tree_leaves(outputs):
        if isinstance(output, Tensor) and output in trace.labels:
            trace.atoms.keep(trace.labels[output], "is what the model puts out")
    return trace.atoms
