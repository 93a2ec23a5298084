"""Subnet: a model, its mask and its rewind point, addressed by parameter name.

The invariant it keeps: outside a search that learns its masks, the model is a plain timm model whose pruned weights
are exactly zero. Nothing is wrapped and no key is renamed; two hooks do the work while an optimizer steps.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .gates import Gate, attach_, remove_
from .hold import Holder, release_
from .lazy import Lazy
from .masks import Masks, Scores, full_masks, sparsity
from .sharded import check_supported, load_state_, local, part, reshard_, whole
from .standardised import masked_
from .starts import as_bytes
from .wrappers import plain_model

State = dict[str, Tensor]


class Subnet:
    """A model with a mask over its prunable weights and the state they rewind to.

    Args:
        model: The model, wrapped or not; it is changed in place.
        names: Names of the prunable weights.

    Attributes:
        model: The plain model.
        names: Names of the prunable weights, in the model's order.
        gates: The gates before the weights, by name, while a search learns its masks; `set_mask_` sets theirs.
        start: The rewind point: a state dict on the CPU. None until a pruner sets it, and while a method searches that
            ends trained: it never rewinds, and a copy is a model's size. At the end of a search it becomes the ticket,
            zero where pruned.
        start_epoch: How far into training the rewind point lies, in epochs.
        strange: Of the state that the search began with, the tensors with NaN or an infinity in them.
        notes: What a method has to tell of its search, one record after the other, in JSON types; kept in the ticket.
        origin: Where the start comes from, as a method knows it, in JSON types; `starts.Origin` describes it. A ticket
            checks it bit for bit before it leaves a value out.
        dense_gradients: The last step's gradients before they were masked, by name, while `tap` is set.
        tap: Whether to keep them: a method that grows weights sets it for the step before it looks.
        sealed: Whether the search has ended and its gates stay, as they do in a model that FSDP2 has split.
        changes: How often the mask was set: whoever keeps a copy of the model masks that again when it grows.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]):
        self.model = plain_model(model)
        check_supported(self.model)
        self.names = tuple(names)
        self.start: State | None = None
        self.start_epoch = 0.0
        self.strange: State = {}
        self.notes: list[dict[str, Any]] = []
        self.origin: dict[str, Any] = {}
        self.tap = self.sealed = False
        self.changes = 0
        self.dense_gradients: dict[str, Tensor] = {}
        self.gates: dict[str, Gate] = {}
        self._aliases = aliases(self.model, self.names)
        self._standardised: list[tuple[str, Any]] = []
        for name in self.names:
            layers = [masked_(module) for module, _ in self._owners(name)]
            self._standardised += [(name, layer) for layer in layers if layer is not None]
        self._frozen: list[nn.Parameter] = []
        self._mask = full_masks(self.weights())
        self._holder: Holder | None = None

    def parameters(self) -> dict[str, nn.Parameter]:
        """The prunable parameters by name, looked up afresh: wrappers such as FSDP2 replace the objects."""
        reshard_(self.model)
        parameters = dict(self.model.named_parameters())
        return {name: parameters[self._key(name)] for name in self.names}

    def _key(self, name: str) -> str:
        """Where the weight of this timm name is now: behind its gate, if it has one."""
        return self._behind_gate(name) if name in self.gates else name

    @staticmethod
    def _behind_gate(name: str) -> str:
        layer, dot, leaf = name.rpartition(".")
        return f"{layer}{dot}parametrizations.{leaf}.original"

    def _owners(self, name: str) -> list[tuple[Any, str]]:
        """The modules that have this weight, each once, and what they call it."""
        found: dict[int, tuple[Any, str]] = {}
        for one in (name, *self._aliases.get(name, ())):
            layer, _, leaf = one.rpartition(".")
            module = self.model.get_submodule(layer)
            found[id(module)] = module, leaf
        return list(found.values())

    def weights(self) -> dict[str, Tensor]:
        """The prunable weights, detached, not copied; under FSDP2, this process's parts as DTensors."""
        return {name: parameter.detach() for name, parameter in self.parameters().items()}

    def weights_on_cpu(self) -> Lazy:
        """The prunable weights, whole, on the CPU, where scores are compared; each as it is when it is read."""
        weights = self.weights()
        return self._present(self.names, lambda name: whole(weights[name]).cpu())

    def _present(self, names: Iterable[str], make: Callable[[str], Tensor]) -> Lazy:
        """Tensors made of the model's; at once where it is split, as every process has to give its parts."""
        if not reshard_(self.model):
            return Lazy(names, make)
        made = {name: make(name) for name in names}
        return Lazy(made, made.__getitem__)

    @property
    def mask(self) -> Masks:
        """The present mask, bool on the CPU; replace it with `set_mask_`."""
        return dict(self._mask)

    @property
    def sparsity(self) -> float:
        """Fraction of the prunable weights now pruned, in [0, 1)."""
        return sparsity(self.mask)

    def set_mask_(self, masks: Mapping[str, Tensor]) -> None:
        """Replace the mask and zero what it prunes; behind a gate, let through what it keeps. Hooks follow at once."""
        self._mask = {name: masks[name].detach().to("cpu", torch.bool) for name in self.names}
        for name, gate in self.gates.items():
            gate.mask.copy_(self._mask[name])
        for name, layer in self._standardised:
            layer.prune_mask.copy_(self._mask[name])
        if self._holder is not None:
            self._holder.take_(self._mask)
        self.changes += 1
        self.apply_()

    @torch.no_grad()
    def apply_(self) -> None:
        """Set every pruned weight to exactly zero; not behind a gate, where the gate does that."""
        for name, weight in self.weights().items():
            if name in self.gates:
                continue
            local(weight).masked_fill_(~part(self._mask[name], weight), 0)

    def mask_(self, other: nn.Module) -> None:
        """Zero in another copy of the model, such as its moving average, what is pruned here now.

        Raises:
            RuntimeError: The masks are still being learned behind gates, which the copy has too.
        """
        if self.gates:
            raise RuntimeError("mask_: the masks are still being learned; mask the copy when the search has ended")
        Subnet(other, self.names).set_mask_(self.mask)  # standardised layers hold their masks themselves

    def state(self) -> State:
        """A copy of the whole state dict under timm's names, contiguous, on the CPU; weights as before their gates."""
        return dict(self.present_state())

    def present_state(self) -> Lazy:
        """As `state`, but a tensor at a time: each is copied when it is read, as it then is."""
        reshard_(self.model)
        state = self.model.state_dict()
        for name in self.gates:
            for one in (name, *self._aliases.get(name, ())):
                state[one] = state.pop(self._behind_gate(one))
        names = [name for name in state if not name.endswith(".score") or ".parametrizations." not in name]
        return self._present(
            names,
            lambda name: whole(state[name].detach()).to("cpu", copy=True, memory_format=torch.contiguous_format),
        )

    def baked_state(self) -> Lazy:
        """The state dict of the plain model that `bake_` would leave, each tensor made when it is read."""
        state, weights = self.present_state(), self.weights()
        gated = {one: name for name in self.gates for one in (name, *self._aliases.get(name, ()))}

        def make(name: str) -> Tensor:
            if name not in gated:
                return state[name]
            gate = self.gates[gated[name]]
            return gate.hard(whole(weights[gated[name]])).cpu()

        return self._present(state, make)

    def masked(self, state: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> Lazy:
        """A state with zeros where these masks prune, under every name that a shared weight has."""
        mask = {one: mask for name, mask in masks.items() for one in (name, *self._aliases.get(name, ()))}
        return Lazy(state, lambda name: state[name].masked_fill(~mask[name], 0) if name in mask else state[name])

    def scores(self) -> Scores:
        """The learned scores in the weights' shapes, copies on the CPU."""
        return dict(self.present_scores())

    def present_scores(self) -> Lazy:
        """As `scores`, but a layer at a time: each is copied when it is read, as it then is."""
        return self._present(self.gates, lambda name: self.gates[name].full_score().to("cpu", copy=True))

    @torch.no_grad()
    def load_scores_(self, scores: Mapping[str, Tensor]) -> None:
        """Copy scores of the weights' shapes into the gates."""
        reshard_(self.model)
        for name, gate in self.gates.items():
            score = scores[name].to(gate.mask.device)
            local(gate.score).copy_(part(score if gate.free is None else score[gate.free], gate.score))

    def gate_(self, make: Callable[[str, Tensor], Gate]) -> None:
        """Put a gate before every prunable weight; before `prepare`, ``torch.compile`` and DDP.

        Args:
            make: Given a weight's name and value, returns its gate.
        """
        for name, weight in self.weights().items():
            gate = make(name, weight).to(weight.device)
            for module, leaf in self._owners(name):
                attach_(module, leaf, gate)
            self.gates[name] = gate
            self._mask[name] = gate.mask.to("cpu", copy=True)

    @property
    def soft(self) -> bool:
        """Whether what the model computes is not yet what its masks say: it is trained behind soft ones."""
        return any(gate.soft for gate in self.gates.values())

    @contextmanager
    def hard(self) -> Iterator[None]:
        """Within the block the model computes what its masks say, behind soft masks too; settle these before."""
        soft = [gate for gate in self.gates.values() if gate.soft]
        for gate in soft:
            gate.soft = False
        try:
            yield
        finally:
            for gate in soft:
                gate.soft = True

    def freeze_(self, parameters: Iterable[nn.Parameter]) -> None:
        """Stop training these parameters until `bake_`."""
        for parameter in parameters:
            if parameter.requires_grad:
                parameter.requires_grad_(False)
                self._frozen.append(parameter)

    @torch.no_grad()
    def bake_(self) -> None:
        """Turn gates into plain weights, zero where pruned, and thaw what was frozen: a plain timm model again.

        FSDP2 finds a parameter where it has split it, so there the gates stay, let through what they keep as it is, and
        nothing is trained behind them any more: `sealed`.
        """
        mask = self.mask
        if reshard_(self.model):
            self.sealed = True
            for name, gate in self.gates.items():
                gate.soft = False
                weight = self.parameters()[name]
                local(weight).copy_(part(gate.hard(whole(weight)), weight))
                gate.scale.fill_(1)
            return
        for name, gate in list(self.gates.items()):
            value = gate.hard(self.parameters()[name])
            for module, leaf in self._owners(name):
                remove_(module, leaf, value)
            del self.gates[name]
        self.set_mask_(mask)
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self._frozen = []

    def load_(self, state: Mapping[str, Tensor]) -> None:
        """Copy a state under timm's names into the model, in place, and apply the mask; scores stay as they are."""
        reshard_(self.model)
        present = self.model.state_dict()
        with torch.no_grad():
            for name in self.gates:
                local(present[self._key(name)]).copy_(part(state[name], present[self._key(name)]))
        gated = {one for name in self.gates for one in (name, *self._aliases.get(name, ()))}
        load_state_(self.model, present | {name: value for name, value in state.items() if name not in gated})
        self.apply_()

    def restart_(self) -> None:
        """Make the model as it is now the rewind point, in place of the one before."""
        self.start = None  # first: two of them would be two models
        self.start = self.state()

    def rewind_(self) -> None:
        """Return to the rewind point: weights, biases, normalisation and buffers; then apply the mask.

        Within a run that has passed a rewind point of its own (`Run.rewind`), that is this point.
        """
        if self.start is None:
            raise RuntimeError(
                "the subnet has no rewind point: a pruner sets `start` when its search begins, but not for a method "
                "that ends trained; that calls `restart_` when the model has its ticket's values"
            )
        self.load_(self.start)

    def hold_(self, optimizer: Any, then: Callable[[], None] | None = None) -> None:
        """Keep pruned weights exactly zero from here on, as `hold.Holder` does.

        Args:
            optimizer: A torch optimizer, or Accelerate's or Lookahead's wrapper of one.
            then: Called after each optimizer step, once the masks are applied.

        Raises:
            ValueError: The optimizer trains another model.
            RuntimeError: The model is `sealed`.
        """
        if self.sealed:
            raise RuntimeError(
                "the masks were learned on a model that FSDP2 has split, where their gates stay; create the model "
                "again, apply the ticket to it, shard it and train that"
            )
        self.release_()
        self._holder = Holder(self, optimizer, then)

    def release_(self) -> None:
        """Remove the hooks on this model, whoever put them there. The weights stay as they are."""
        release_(self.model)
        self._holder = None
        self.dense_gradients = {}
        self.tap = False


def sharing(
    state: Mapping[str, Tensor], known: Mapping[str, Tensor], shown: Mapping[str, Tensor] | None = None
) -> State:
    """The state with known tensors in place of those that equal them bit for bit: a second copy is a model's size.

    Args:
        state: A state dict.
        known: One that is held anyway.
        shown: What stands in ``state`` where ``known`` was loaded, if that is not the same: masked.
    """
    same = known if shown is None else shown
    return {
        name: known[name] if name in same and torch.equal(as_bytes(value), as_bytes(same[name])) else value
        for name, value in state.items()
    }


def aliases(model: nn.Module, names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """The other names of shared weights, by the first: tied parameters, or a module that stands in several places."""
    wanted = set(names)
    first: dict[int, str] = {}
    found: dict[str, tuple[str, ...]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        known = first.setdefault(id(parameter), name)
        if known != name and known in wanted:
            found[known] = (*found.get(known, ()), name)
    return found
