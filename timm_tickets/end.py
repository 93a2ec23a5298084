"""End: what a run came to, and whether that can be kept."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .masks import Masks
from .subnet import State


@dataclass(eq=False)
class End:
    """What a run ended with: plain data on the CPU.

    Attributes:
        state: The state dict at the end, pruned weights zero; behind gates, weights as before them. Empty where the
            run does not say that it `Run.reads` it.
        mask: The mask at the end.
        scores: What the method gathered in the run, or learned; as `state`.
        rewind: The state at the run's rewind point, where it was asked to take one.
        rewind_epoch: How far into training that point lies, in epochs; 0 where it was never reached.
        metrics: Whatever the trainer measured.
        digest: SHA-256 of what it ended with, once that is written down; not of the metrics.
    """

    state: Mapping[str, Tensor] = field(repr=False)
    mask: Masks = field(repr=False)
    scores: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    rewind: State | None = field(default=None, repr=False)
    rewind_epoch: float = 0.0
    metrics: dict[str, Any] = field(default_factory=dict)
    digest: str | None = None

    @property
    def weights(self) -> State:
        """The prunable weights at the end of the run."""
        return {name: self.state[name] for name in self.mask}

    def keep_(self, parts: Collection[str]) -> "End":
        """Copy these of ``state`` and ``scores``, which the model may still hold, and let go of the others."""
        self.state = dict(self.state) if "state" in parts else {}
        self.scores = dict(self.scores) if "scores" in parts else {}
        return self


def not_finite(state: Mapping[str, Tensor], strange: Mapping[str, Tensor]) -> str | None:
    """Name of the first tensor with a NaN or an infinity in it that was not there at the start, in ``strange``.

    Some models hold infinities for good: Gemma 4's clipping bounds before they are calibrated.
    """
    for name, value in state.items():
        bad = ~value.isfinite()
        if bad.any() and (name not in strange or (bad & (value != strange[name])).any()):
            return name
    return None


def plain_metrics(metrics: dict[str, Any]) -> dict[str, Any]:
    """Metrics as JSON types: scalar tensors and numpy numbers become Python's."""
    return {str(key): value.item() if hasattr(value, "item") else value for key, value in metrics.items()}
