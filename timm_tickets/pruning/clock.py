"""Clock: how far a training is in its schedule."""

import math
from typing import Any

from .run import rewind_parts


class Clock:
    """Counts the steps and batches of one training, and says where in its schedule they are.

    Args:
        schedule_epochs: Length of the whole schedule, in epochs.
        start_epoch: Epochs of it that lie before this training.

    Attributes:
        epochs: Epochs to train: what is left of the schedule, rounded up. `complete` says within the last when it is
            over.
        schedule_epochs: Length of the whole schedule, of which `start_epoch` lie before this training.
        start_epoch: How far into the schedule the starting weights are, in epochs: late rewinding goes on from there.
        step: Optimizer steps taken.
        heard, stepped: Batches whose loss was taken by this very object, and steps: not by one before a checkpoint.
        batches: Batches whose loss was taken: more than `step` under gradient accumulation.
        batches_per_epoch: Set by the first `Training.subset` of a loader; a trainer may set it itself.
    """

    def __init__(self, schedule_epochs: int, start_epoch: float = 0.0):
        self.schedule_epochs, self.start_epoch = schedule_epochs, start_epoch
        self.epochs = max(0, math.ceil(schedule_epochs - start_epoch - 1e-6))
        self.step = self.batches = 0
        self.batches_per_epoch: int | None = None
        self._pending = 0  # batches whose loss was taken since the last step
        self.heard = self.stepped = 0

    @property
    def position(self) -> float:
        """Epochs of the schedule that are done.

        Raises:
            RuntimeError: Nobody has said how long an epoch is.
        """
        return self._at(self.batches)

    def _at(self, batches: int) -> float:
        if self.batches_per_epoch is None:
            raise RuntimeError(
                "the run's schedule needs the length of an epoch: train on `run.subset(loader)`, or set "
                "`run.batches_per_epoch` before the first step"
            )
        return self.start_epoch + batches / self.batches_per_epoch

    @property
    def progress(self) -> float:
        """Fraction of the schedule that is done, in [0, 1]: `position` over `schedule_epochs`."""
        return min(1.0, self.position / self.schedule_epochs)

    @property
    def ahead(self) -> float:
        """What `progress` will be once the next step is taken."""
        return min(1.0, self._at(self.batches + max(1, self._pending)) / self.schedule_epochs)

    @property
    def complete(self) -> bool:
        """Whether every batch was taken, one whose step a gradient scaler has left out included."""
        if self.batches_per_epoch is None:
            return False
        return self.position + self._pending / self.batches_per_epoch > self.schedule_epochs - 1e-6

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch, as far as the steps taken tell: each may take several batches."""
        if self.batches_per_epoch is None or not self.step:
            return self.batches_per_epoch or 1
        return max(1, round(self.batches_per_epoch / max(1, round(self.batches / self.step))))

    def every(self, asked: int | None, share: float) -> int:
        """Optimizer steps between two exchanges or prunings: 100 where not asked, and at most this share of all steps.

        So a short training has its exchanges or prunings too.
        """
        return asked or min(100, max(1, int(share * self.schedule_epochs * self.steps_per_epoch)))

    def passed(self, point: str) -> bool:
        """Whether a rewind point, such as ``'2ep'`` or ``'500it'``, has been reached."""
        number, unit = rewind_parts(point)
        if unit == "it":
            return self.step >= number
        return self.batches_per_epoch is not None and self.batches >= number * self.batches_per_epoch

    def count_batch_(self) -> None:
        """The loss of a batch was taken."""
        self._pending += 1
        self.heard += 1

    def count_step_(self) -> None:
        """The optimizer has stepped."""
        self.step += 1
        self.stepped += 1
        # A loop that takes its loss elsewhere still counts one batch a step.
        self.batches += max(1, self._pending)
        self._pending = 0

    @property
    def taken(self) -> int:
        """Batches whose loss was taken, those included that no step has followed yet."""
        return self.batches + self._pending

    def counters(self) -> dict[str, Any]:
        """What a checkpoint holds of it."""
        return {"step": self.step, "batches": self.batches, "pending": self._pending}

    def load_counters_(self, saved: dict[str, Any]) -> None:
        self.step, self.batches, self._pending = saved["step"], saved["batches"], saved["pending"]
