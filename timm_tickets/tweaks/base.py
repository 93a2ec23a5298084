"""Tweaks: what changes one training of a ticket, its mask fixed, and is gone when that training ends.

A tweak is one file under tweaks/: a frozen dataclass of settings that overrides what it needs of `Tweak`. Nothing it
does may stay in the model: no module, key or parameter.
"""

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field, TypeAdapter
from torch import Tensor, nn

from ..core.masks import kept, total
from ..core.settings import Settings, settings
from ..sparse.optimizers import after_step
from ..sparse.wrappers import plain_model

Criterion = Callable[[Any, Tensor], Tensor]


@settings
class Tweak(metaclass=Settings):
    """What a tweak may change of a training; everything is optional.

    Attributes:
        name: The registered name.
    """

    name: ClassVar[str] = ""

    def criterion(self, criterion: Criterion) -> Criterion:
        """The criterion to train with, given the one that the training has.

        Raises:
            SettingError: The tweak does not go with this criterion.
        """
        return criterion

    def rescale_(
        self, model: nn.Module, masks: Mapping[str, Tensor], batches: Iterable[tuple[Tensor, Tensor]], loss: Criterion
    ) -> None:
        """Change the weights once, before training; zeros stay zero.

        Args:
            model: The plain model.
            masks: The ticket's masks.
            batches: Images and targets of the training, on the model's device, without end.
            loss: The training's criterion.
        """

    def inject_(self, model: nn.Module, share: Tensor) -> list[Any]:
        """Put hooks on the model whose effect is ``share`` of the whole, and which at share 0 change no bit.

        Args:
            model: The plain model.
            share: Float, a scalar on the CPU, in [0, 1]; it falls as training goes on.

        Returns:
            Handles with a ``remove`` that takes back everything.

        Raises:
            SettingError: The model has no place for it.
        """
        return []

    def share(self, progress: float) -> float:
        """The share, in [0, 1], after a fraction of the training, in [0, 1]; 0 at its end."""
        return 0.0

    def described(self) -> dict[str, Any]:
        """Every setting, as JSON types."""
        return TypeAdapter(type(self)).dump_python(self, mode="json")


@settings
class Annealed(Tweak):
    """A tweak that is whole at the start of training and falls linearly to nothing."""

    until: Annotated[float, Field(gt=0, le=1, description="fraction of the training after which it is gone")] = 0.5

    def share(self, progress: float) -> float:
        return max(0.0, 1 - progress / self.until)


class Tweaks:
    """Tweaks on a model, for one training.

    Args:
        model: The model, wrapped or not.
        tweaks: The tweaks; in this order they change the criterion and the weights.

    Attributes:
        added: Parameters that are in the model only because of them.

    Raises:
        SettingError: A tweak has no place in this model, which is then unchanged.
    """

    def __init__(self, model: nn.Module, tweaks: Sequence[Tweak]):
        self.model, self.tweaks = plain_model(model), tuple(tweaks)
        self._shares = [torch.ones(()) for _ in self.tweaks]
        self._handles: list[list[Any]] = []
        self._steps: Any = None
        before = _count(self.model)
        try:
            for tweak, share in zip(self.tweaks, self._shares, strict=True):
                self._handles.append(tweak.inject_(self.model, share))
        except BaseException:
            self.remove_()
            raise
        self.added = _count(self.model) - before
        if any(self._handles):
            _forget_compiled()
        self.at_(0.0)

    def criterion(self, criterion: Criterion) -> Criterion:
        """The criterion to train with.

        Raises:
            SettingError: A tweak does not go with this criterion.
        """
        for tweak in self.tweaks:
            criterion = tweak.criterion(criterion)
        return criterion

    def rescale_(
        self, masks: Mapping[str, Tensor], batches: Iterable[tuple[Tensor, Tensor]], criterion: Criterion
    ) -> None:
        """Change the starting weights, where a tweak does that. Call it once, before the first step.

        Args:
            masks: The ticket's masks.
            batches: Images and targets of the training, on the model's device; gone through again when they end.
            criterion: The training's own, which the tweaks are still to change.
        """
        loss = self.criterion(criterion)
        for tweak in self.tweaks:
            tweak.rescale_(self.model, masks, _without_end(batches), loss)

    def attach(self, optimizer: Any, steps: int, done: int = 0) -> Any:
        """Anneal by the steps of an optimizer; after the last, or `remove_`, the model is plain.

        A step that a ``GradScaler`` skips is none: call `remove_` at the end of such a training.

        Args:
            optimizer: The training's optimizer, plain or wrapped by Accelerate.
            steps: Its steps in the whole training.
            done: How many of them were taken before, where a training is continued.

        Returns:
            The same optimizer.
        """
        if steps < 1:
            raise ValueError(f"steps: {steps} is not valid; give the optimizer steps of the whole training, at least 1")
        self.at_(done / steps)

        def stepped() -> None:
            nonlocal done
            done += 1
            self.at_(min(1.0, done / steps))

        if self._steps is not None:
            self._steps.remove()
        self._steps = after_step(optimizer, stepped)
        return optimizer

    @property
    def gone(self) -> bool:
        """Whether nothing of the annealed ones is left in the function that the model computes."""
        return not self._handles or not any(share.item() for share in self._shares)

    def at_(self, progress: float) -> None:
        """Set every share to what it is after a fraction of the training; at 1 take everything back."""
        for tweak, share in zip(self.tweaks, self._shares, strict=True):
            share.fill_(tweak.share(progress))
        if progress >= 1:
            self.remove_()

    def remove_(self) -> None:
        """Take everything back: the model is the plain one."""
        for share in self._shares:
            share.zero_()  # a compiled graph or an averaged copy may still hold the hooks
        for handle in (handle for handles in self._handles for handle in handles):
            handle.remove()
        self._handles = []
        if self._steps is not None:
            self._steps.remove()
            self._steps = None

    def sparsity(self, masks: Mapping[str, Tensor]) -> float:
        """Sparsity with what the tweaks add counted as dense, in [0, 1): the ticket's own once they are gone."""
        return 1 - (kept(masks) + self.added) / (total(masks) + self.added)


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _without_end(batches: Iterable[Any]) -> Iterable[Any]:
    while True:
        empty = True
        for batch in batches:
            empty = False
            yield batch
        if empty:
            raise ValueError("batches: there are none; give the training's loader")


def _forget_compiled() -> None:
    """Have compiled models compile again: hooks that come later are not seen by graphs that are there already."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
