"""Subnet: a model, its mask and its rewind point, addressed by parameter name.

Outside a search that learns its masks, the model is a plain timm model whose pruned weights are exactly zero.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..core.lazy import Lazy
from ..core.masks import Counted, Scores, kept, total
from ..core.states import State
from ..distributed.collectives import mean_over_processes
from ..distributed.fsdp2 import gathered, load_state_, local, reshard_, shard_of
from ..distributed.processes import world_size
from .describe import model_name
from .gates import Gate, put_gate_, take_gate_
from .holder import GradientTap, Holder, release_
from .masked import MaskedWeights


class Subnet(MaskedWeights):
    """A model with a mask over its prunable weights and the state they rewind to.

    Args:
        model: The model, wrapped or not; it is changed in place.
        names: Names of the prunable weights.

    Attributes: those of `MaskedWeights`, and
        strange: Of the state that the search began with, the tensors with NaN or an infinity in them.
        notes: What a method has to tell of its search, one record after the other, in JSON types; kept in the ticket.
        origin: Where the start comes from, as a method knows it, in JSON types; `starts.Origin` describes it. A ticket
            checks it bit for bit before it leaves a value out.
        scales: What the start's weights were multiplied with beside their mask, by name, where that is so.
        tap: Keeps the gradients of the steps that a method asks for with `tap_`.
        sealed: Whether the search has ended and its gates stay, as they do in a model that FSDP2 has split.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]):
        super().__init__(model, names)
        self._start: State | None = None
        self._start_epoch = 0.0
        self.strange: State = {}
        self.notes: list[dict[str, Any]] = []
        self.origin: dict[str, Any] = {}
        self.scales: dict[str, Tensor] = {}
        self.tap = GradientTap()
        self.sealed = False
        self._loads = 0
        self._frozen: list[nn.Parameter] = []

    def __repr__(self) -> str:
        mask = self.device_mask()
        return f"Subnet({model_name(self.model)}, {kept(mask):,} of {total(mask):,} weights kept)"

    def weights_on_cpu(self) -> Lazy:
        """The prunable weights, whole, on the CPU; each as it is when it is read."""
        weights = self.weights()
        return self._present(self.names, lambda name: gathered(weights[name]).cpu())

    def device_weights(self) -> Lazy:
        """As `weights_on_cpu`, but where they are, not copied; on the CPU where FSDP2 has split them."""
        return Lazy(self.names, self.weights().__getitem__) if not reshard_(self.model) else self.weights_on_cpu()

    def _present(self, names: Collection[str], make: Callable[[str], Tensor]) -> Lazy:
        """Tensors made of the model's; at once where it is split, as every process has to give its parts."""
        if not reshard_(self.model):
            return Lazy(names, make)
        return Lazy(names, {name: make(name) for name in names}.__getitem__)

    @property
    def version(self) -> int:
        """Grows whenever a mask, a state or scores are put on the model: earlier views of it are stale then."""
        return self.changes + self._loads

    def mask_(self, other: nn.Module) -> None:
        """Zero in another copy of the model, such as its moving average, what is pruned here now.

        Raises:
            RuntimeError: The masks are still being learned behind gates, which the copy has too.
        """
        if self.gates:
            raise RuntimeError("mask_: the masks are still being learned; mask the copy when the search has ended")
        Subnet(other, self.names).set_mask_(self.device_mask())

    def state(self) -> State:
        """A copy of the whole state dict under timm's names, contiguous, on the CPU; weights as before their gates."""
        return dict(self.live_state())

    def live_state(self) -> Lazy:
        """As `state`, but a tensor at a time: each is copied when it is read, as it then is."""
        state = self.state_there()
        return self._present(
            state, lambda name: gathered(state[name]).to("cpu", copy=True, memory_format=torch.contiguous_format)
        )

    @torch.no_grad()
    def set_weights_(self, values: Mapping[str, Tensor]) -> None:
        """Copy values into the prunable weights, before their gates; the mask stays."""
        for name, weight in self.weights().items():
            local(weight).copy_(shard_of(values[name], weight))

    def baked_state(self) -> Lazy:
        """The state dict of the plain model that `bake_` would leave, each tensor made when it is read."""
        return self._without_gates(Gate.hard)

    def _without_gates(self, left: Callable[[Gate, Tensor], Tensor]) -> Lazy:
        state, weights = self.live_state(), self.weights()
        gated = {one: name for name in self.gates for one in self._all_names(name)}

        def make(name: str) -> Tensor:
            weight = gated.get(name)
            return state[name] if weight is None else left(self.gates[weight], gathered(weights[weight])).cpu()

        return self._present(state, make)

    def pruned_state(self, state: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> Lazy:
        """A state with zeros where these masks prune, under every name that a shared weight has."""
        mask = {one: mask for name, mask in masks.items() for one in self._all_names(name)}
        return Lazy(state, lambda name: state[name].masked_fill(~mask[name], 0) if name in mask else state[name])

    def scores(self) -> Scores:
        """The learned scores in the weights' shapes, copies on the CPU."""
        return dict(self.live_scores())

    def live_scores(self) -> Lazy:
        """As `scores`, but a layer at a time: each is copied when it is read, as it then is."""
        return self._present(self.gates, lambda name: self.gates[name].full_score().to("cpu", copy=True))

    def device_scores(self, free: bool = False) -> Lazy:
        """As `live_scores`, but where they are, not copied; on the CPU where FSDP2 has split them.

        Args:
            free: Only those of weights that are not frozen, in a row as the gates have them.
        """
        split = reshard_(self.model)

        def make(name: str) -> Tensor:
            gate = self.gates[name]
            score = gathered(gate.score.detach()) if free else gate.full_score()
            return score.cpu() if split else score

        return self._present(self.gates, make)

    @torch.no_grad()
    def load_scores_(self, scores: Mapping[str, Tensor]) -> None:
        """Copy scores of the weights' shapes into the gates."""
        reshard_(self.model)
        for name, gate in self.gates.items():
            score = scores[name].to(gate.mask.device)
            local(gate.score).copy_(shard_of(score if gate.free is None else score[gate.free], gate.score))
        self._loads += 1

    def gate_(self, make: Callable[[str, Tensor], Gate]) -> None:
        """Put a gate before every prunable weight; before `prepare`, ``torch.compile`` and DDP.

        Args:
            make: Given a weight's name and value, returns its gate.
        """
        for name, weight in self.weights().items():
            gate = make(name, weight).to(weight.device)
            gate.standardised = name in self.standardised
            for module, leaf in self._owners(name):
                put_gate_(module, leaf, gate)
            self.gates[name] = gate
            del self._mask[name]
        self._known = Counted({}, None)

    def scale_gates_(self, scales: Mapping[str, float | Tensor]) -> None:
        """Set what gates multiply their weights with beside their masks, by name."""
        for name, gate in self.gates.items():
            gate.scale.fill_(scales[name])

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
        if reshard_(self.model):
            self.sealed = True
            for name, gate in self.gates.items():
                gate.soft = False
                weight = self.parameters()[name]
                local(weight).copy_(shard_of(gate.hard(gathered(weight)), weight))
                gate.scale.fill_(1)
            return
        for name, gate in list(self.gates.items()):
            value = gate.hard(self.parameters()[name])
            for module, leaf in self._owners(name):
                take_gate_(module, leaf, value)
            self._mask[name] = self.gates.pop(name).mask
        self.changes += 1
        self.apply_()
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self._frozen = []

    def load_(self, state: Mapping[str, Tensor]) -> None:
        """Copy a state under timm's names into the model, in place, and apply the mask; scores stay as they are."""
        reshard_(self.model)
        present = self.model.state_dict()
        with torch.no_grad():
            for name in self.gates:
                local(present[self._key(name)]).copy_(shard_of(state[name], present[self._key(name)]))
        gated = {one for name in self.gates for one in self._all_names(name)}
        load_state_(self.model, present | {name: value for name, value in state.items() if name not in gated})
        self._loads += 1
        self.apply_()

    @property
    def start(self) -> State | None:
        """The rewind point: a state dict on the CPU. At the end of a search it becomes the ticket, zero where pruned.

        None until a pruner sets it, and while a method searches that ends trained: that never rewinds, and a copy is as
        large as the model.
        """
        return self._start

    @property
    def start_epoch(self) -> float:
        """How far into training the rewind point lies, in epochs."""
        return self._start_epoch

    def set_start_(self, state: Mapping[str, Tensor], epoch: float = 0.0) -> None:
        """Make a state the rewind point, in place of the one before.

        Args:
            state: A state dict on the CPU; a live view is copied.
            epoch: How far into training it lies, in epochs.
        """
        self._start = state if isinstance(state, dict) else dict(state)
        self._start_epoch = epoch

    def restart_(self) -> None:
        """Make the model as it is now the rewind point, in place of the one before; before `bake_`.

        Of gates, what they keep: standardised weights too are still what a seed or pretrained weights give again.
        """
        scales = {name: gate.scale.to("cpu", copy=True) for name, gate in self.gates.items()}
        self.scales = {one: scale for name, scale in scales.items() for one in self._all_names(name)}
        self._start = None  # first, or for a moment there would be two copies of the model
        self.set_start_(dict(self._without_gates(Gate.kept)), self._start_epoch)

    def rewind_(self) -> None:
        """Return to the rewind point: weights, biases, normalisation and buffers; then apply the mask.

        Within a round's only run that has passed a rewind point of its own (`Run.rewind`), that is this point.
        """
        if self._start is None:
            raise RuntimeError(
                "the subnet has no rewind point: a pruner sets it when its search begins, but not for a method "
                "that ends trained; that calls `restart_` when the model has its ticket's values"
            )
        self.load_(self._start)

    def hold_(
        self, optimizer: Any, then: Any = None, before: Any = None, hooks: bool = True, whole: bool = False
    ) -> Holder:
        """Keep pruned weights exactly zero from here on, as `holder.Holder` does.

        Args:
            optimizer: A torch optimizer, or Accelerate's or Lookahead's wrapper of one.
            then: Called after each optimizer step, once the masks are applied; ``before`` is called before each.
            hooks: Whether hooks apply the masks; else whoever steps does, and calls ``then`` and ``before`` too.
            whole: Whether to hold masks that keep everything, too, so that later ones are held in the same memory.

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
        masks = self._to_hold(ask=True, whole=whole)
        self._holder = Holder(self, masks, self.tap, optimizer, then, before, hooks)
        return self._holder

    def tap_(self, open: bool) -> None:
        """Keep the next step's gradients as they are before the mask, for `dense_gradients`, or keep none.

        A method that grows weights asks for those of the step before it looks: they take a model's size on the host.
        """
        self.tap.close_()
        self.tap.open = open

    def dense_gradients(self) -> Lazy:
        """The gradients of the last step before they were masked, by name, where `tap_` asked for them; else none.

        Each is made when it is read: on the CPU, the mean over the processes, which all have to read the same ones.
        """
        kept, weights = self.tap.kept, self.weights()

        def make(name: str) -> Tensor:
            # The processes can reach each other where the weights are.
            there = kept[name].to(weights[name].device) if world_size() > 1 else kept[name]
            return mean_over_processes({name: there})[name].cpu()

        return Lazy([name for name in self.names if name in kept], make)

    def release_(self) -> None:
        """Remove the hooks on this model, whoever put them there. The weights stay as they are."""
        release_(self.model)
        self._holder = None
        self.tap.close_()
