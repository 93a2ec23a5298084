"""A model's prunable weights by timm's names, wherever they are now."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..core.counting import wide
from ..distributed.fsdp2 import check_supported, reshard_
from .gates import Gate
from .standardised import STANDARDISED, check_channels
from .wrappers import plain_model


class NamedWeights:
    """A model's prunable weights, addressed by timm's names, whether or not gates stand before them.

    Args:
        model: The model, wrapped or not.
        names: Names of the prunable weights.

    Attributes:
        model: The plain model.
        names: Names of the prunable weights, in the model's order.
        gates: The gates before the weights, by name, while a search learns its masks.
        standardised: Names of the weights that their layers standardise: what is kept of them has mean zero in every
            output channel of which something is pruned.
        now: Numbers that move with the steps (`Run.schedule`), by name: scalars beside the weights, the same tensors in
            all runs, so that a compiled or captured step can read them.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]):
        self.model = plain_model(model)
        check_supported(self.model)  # before names are looked up, which FSDP1 changes
        self.names = tuple(names)
        self.gates: dict[str, Gate] = {}
        self.now: dict[str, Tensor] = {}
        self._aliases = aliases(self.model, self.names)
        self.standardised = {n for n in self.names if any(isinstance(m, STANDARDISED) for m, _ in self._owners(n))}
        self.check_supported()

    def check_supported(self) -> None:
        """Refuse a model whose weights cannot be masked where they are; again when it may have been prepared.

        Raises:
            SettingError: DeepSpeed or FSDP1 has taken them apart, or FSDP2 has split channels that are standardised.
        """
        check_supported(self.model)
        parameters = self.parameters() if self.standardised else {}
        for name in self.standardised:
            check_channels(name, parameters[name])

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
        for one in self._all_names(name):
            layer, _, leaf = one.rpartition(".")
            module = self.model.get_submodule(layer)
            found[id(module)] = module, leaf
        return list(found.values())

    def _all_names(self, name: str) -> tuple[str, ...]:
        """This name and the others of the same weight, where it is shared."""
        return name, *self._aliases.get(name, ())

    def state_there(self) -> dict[str, Tensor]:
        """The state dict under timm's names, where it is, not copied: weights as before their gates, without scores."""
        reshard_(self.model)
        state = {name: value.detach() for name, value in self.model.state_dict().items()}
        for name in self.gates:
            for one in self._all_names(name):
                state[one] = state.pop(self._behind_gate(one))
        return {n: v for n, v in state.items() if not n.endswith(".score") or ".parametrizations." not in f".{n}"}

    def put_(self, numbers: Mapping[str, float]) -> None:
        """Put numbers that move with the steps where the weights are; see `now`."""
        for name, number in numbers.items():
            if name not in self.now:
                device = next(self.model.parameters()).device
                self.now[name] = torch.zeros((), dtype=wide(device), device=device)
            self.now[name].fill_(number)

    def weights(self) -> dict[str, Tensor]:
        """The prunable weights, detached, not copied; under FSDP2, this process's parts as DTensors."""
        return {name: parameter.detach() for name, parameter in self.parameters().items()}


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
