"""End: what a run came to."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..core.lazy import Lazy
from ..core.states import State
from ..sparse.subnet import Subnet


@dataclass(eq=False)
class End:
    """What a run ended with: plain data on the CPU.

    The pruner holds it until the method asks for its next round, and then lets go of all tensors in it. Of the only run
    of a round, ``state``, ``mask`` and learned ``scores`` are views of the model, which refuse to be read once it has
    changed. Of several, or where the run was read from its folder, they are copies.

    Attributes:
        state: The state dict at the end, pruned weights zero; behind gates, weights as before them.
        mask: The mask at the end.
        scores: What the method gathered in the run, or learned.
        rewind: The state at the run's rewind point, where it was asked to take one.
        rewind_epoch: How far into training that point lies, in epochs; 0 where it was never reached.
        metrics: Whatever the trainer measured.
        digest: SHA-256 of what it ended with, once that is written down; not of the metrics.
    """

    state: Mapping[str, Tensor] = field(repr=False)
    mask: Mapping[str, Tensor] = field(repr=False)
    scores: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    rewind: State | None = field(default=None, repr=False)
    rewind_epoch: float = 0.0
    metrics: dict[str, Any] = field(default_factory=dict)
    digest: str | None = None

    @property
    def weights(self) -> State:
        """The prunable weights at the end of the run."""
        return {name: self.state[name] for name in self.mask}

    def copy_(self) -> None:
        """Make ``state``, ``mask`` and ``scores`` copies: the model goes on to another run."""
        self.state, self.mask, self.scores = dict(self.state), dict(self.mask), dict(self.scores)

    def release_(self) -> None:
        """Let go of every tensor: each part is as large as a model, and another run is about to be trained."""
        self.state, self.mask, self.scores, self.rewind = {}, {}, {}, None


def fresh_view(view: Lazy, subnet: Subnet, name: str) -> Lazy:
    """A view of a model that refuses to be read once that has changed: it would be of another model.

    Args:
        view: The view.
        subnet: The model with its mask.
        name: Of the run that has ended, in the message.
    """
    version = subnet.version

    def make(key: str) -> Tensor:
        if subnet.version != version:
            raise RuntimeError(
                f"{name}: the model has changed since this run ended, and what it ended with is a view of it; read "
                "`end.state`, `end.mask` and `end.scores` before `set_mask_`, `rewind_` or `load_`"
            )
        return view[key]

    return Lazy(view, make)


def plain_metrics(metrics: dict[str, Any]) -> dict[str, Any]:
    """Metrics as JSON types: scalar tensors and numpy numbers become Python's."""
    return {str(key): value.item() if hasattr(value, "item") else value for key, value in metrics.items()}
