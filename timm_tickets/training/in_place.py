"""What a compiled or captured step reads and writes, kept where it is: learning rates, optimizer states, classes."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class Rates:
    """The learning rates of an optimizer's groups as tensors that are filled; schedules write numbers.

    Args:
        optimizer: The optimizer, inside any wrapper.
    """

    def __init__(self, optimizer: Optimizer):
        self.optimizer = optimizer
        self._rates: list[Tensor] = []
        self._numbers: list[float] = []

    def take_(self) -> None:
        """Put tensors in the place of numbers, and fill these with them."""
        for number, group in enumerate(self.optimizer.param_groups):
            if number == len(self._rates):  # a method may have added a group
                self._rates.append(torch.zeros((), device=group["params"][0].device))
                self._numbers.append(0.0)
            if group["lr"] is not self._rates[number]:
                self._numbers[number] = float(group["lr"])
                self._rates[number].fill_(self._numbers[number])
                group["lr"] = self._rates[number]

    def highest(self) -> float:
        """The highest of them, without asking the device."""
        known = dict(zip(map(id, self._rates), self._numbers, strict=True))
        rates = [group["lr"] for group in self.optimizer.param_groups]
        return max(known[id(rate)] if id(rate) in known else float(rate) for rate in rates)


class States:
    """An optimizer's states, which stay the same tensors when others are loaded.

    Args:
        optimizer: The optimizer, inside any wrapper.
        fused: Whether it is to step by one kernel that reads rates and counters where they are, as a capture needs.
    """

    def __init__(self, optimizer: Optimizer, fused: bool):
        self.optimizer, self.fused = optimizer, fused
        self._known: dict[tuple[Tensor, str], Tensor] = {}
        self.keep_()

    def keep_(self) -> None:
        """Copy states that were put in place of known ones into these; know new ones from here on."""
        if self.fused:
            for group in self.optimizer.param_groups:  # a checkpoint may be of another machine
                group |= {"fused": True, "foreach": False}
        for parameter, state in self.optimizer.state.items():
            for name, value in state.items():
                if not isinstance(value, Tensor):
                    continue
                if self.fused and value.device != parameter.device:
                    value = value.to(parameter.device)
                known = self._known.setdefault((parameter, name), value)
                if known is not value:
                    known.copy_(value)
                state[name] = known


class Slice:
    """Logits and targets of a run's classes, whose numbers stand in tensors: other classes may take their place.

    Args:
        count: How many classes.
        of: How many there are in all.
        device: Where logits and targets are.
    """

    def __init__(self, count: int, of: int, device: torch.device):
        self.index = torch.zeros(count, dtype=torch.int64, device=device)
        self.place = torch.zeros(of, dtype=torch.int64, device=device)

    def take_(self, classes: Sequence[int]) -> None:
        """Be of these classes, ``count`` many."""
        self.index.copy_(torch.as_tensor(classes))
        self.place[self.index] = torch.arange(len(classes), device=self.place.device)

    def __call__(self, output: Any, target: Tensor) -> tuple[Any, Tensor]:
        """As `slice_classes`, for targets of these classes alone, without looking at them."""
        if isinstance(output, tuple | list):
            output = tuple(one.index_select(1, self.index) for one in output)
        else:
            output = output.index_select(1, self.index)
        if target.ndim == 1:
            return output, self.place.index_select(0, target)
        part = target.index_select(1, self.index)
        return output, part / part.sum(dim=1, keepdim=True)


def identity(call: Callable[..., Any] | None) -> Any:
    """What tells functions apart that do different things: two of the same code over the same objects do not."""
    if call is None:
        return None
    function: Any = getattr(call, "__func__", call)
    cells = tuple(id(cell.cell_contents) for cell in getattr(function, "__closure__", None) or ())
    return id(getattr(call, "__self__", None)), getattr(function, "__code__", call), cells
