"""Layers that no gradient reaches: what is learned or scored by gradient says nothing of them, so they are named."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from ..core.warn import warn
from ..distributed.fsdp2 import local


def flat(gradient: Tensor | None) -> Tensor:
    """Whether a gradient tells no weight from another: zero, or, where a penalty adds to it, the same everywhere.

    A part without elements, as FSDP2 may leave a process, tells nothing and is not flat. The answer is a bool tensor on
    the gradient's device, which is not waited for.
    """
    if gradient is None:
        return torch.tensor(True)
    gradient = local(gradient)
    if gradient.numel() < 2:
        return (gradient == 0).all() if gradient.numel() else torch.tensor(False)
    return gradient.min() == gradient.max()


def warn_of_blind_layers(who: str, blind: Iterable[str], layers: int, so: str) -> None:
    """Name the layers that no gradient reaches, if there are any.

    timm starts the last scale of a residual branch at zero in many models; what is before it has no gradient then.

    Args:
        who: The pruner or the run.
        blind: Their names.
        layers: How many there are in all.
        so: What follows from it, such as ``so their scores say nothing``.
    """
    names = list(blind)
    if names:
        told = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        warn(
            f"{who}: no gradient reaches {len(names)} of {layers} layers ({told}), {so}; build the model with "
            "zero_init_last=False where it has that argument, start from a trained one, or leave these layers out "
            "with exclude"
        )


def warn_of_blind_scores(who: str, names: Sequence[str], readings: Mapping[str, Tensor]) -> None:
    """Name the layers whose scores, made of these readings, are all zero: they would be cut first, whatever they do."""
    blind = [name for name in names if not readings[name].any()]
    warn_of_blind_layers(who, blind, len(names), "so their scores are all zero and they are cut first")


class Reached:
    """Finds, over the first steps of a run, the layers whose learned scores get no gradient.

    Not the first step alone: a branch whose last scale begins at zero opens with the second, if that scale trains.

    Args:
        who: The run's name.
        layers: Names of the layers.
    """

    STEPS = 3

    def __init__(self, who: str, layers: Iterable[str]):
        self.who, self.layers, self.left = who, list(layers), self.STEPS
        self.blind: list[list[Tensor]] = []  # of each look, whether it found each layer's gradient flat

    def look(self, gradients: Mapping[str, Tensor | None]) -> None:
        """Look at one step's gradients; the device is not waited for."""
        if self.left and self.layers:
            self.blind.append([flat(gradients[name]) for name in self.layers])
            self.left -= 1

    def tell(self) -> None:
        """Say, once and after the last look, what was never reached; this waits for the device."""
        if self.left or not self.blind:
            return
        never = [name for name, *looks in zip(self.layers, *self.blind, strict=True) if all(map(bool, looks))]
        self.blind = []
        warn_of_blind_layers(self.who, never, len(self.layers), "so their masks are not learned")
