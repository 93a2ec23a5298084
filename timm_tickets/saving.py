"""Saving within a run: when, and what a checkpoint holds; and what a trainer tells while it works."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from accelerate.utils import gather_object
from timm.utils import ModelEmaV3

from .checkpoint import load_checkpoint, save_checkpoint
from .processes import any_of, rank, world_size
from .randomness import Epoch, own_generator
from .run import Run
from .sharded import load_optimizer_state_, load_state_, optimizer_state, whole
from .stop import Stopped, stop_asked

if TYPE_CHECKING:
    from .trainer import Trainer

# Several processes have to agree on when to save or stop; asking at every step would cost them.
_AGREE_EVERY = 8
# The next checkpoint waits at least so many times as long as the last one took to write: 2 % of the time at most.
_WORTH = 50


class Progress(Protocol):
    """What the trainer tells while it works."""

    def begin(self, run: Run, steps: int) -> None: ...
    def step(self) -> None: ...
    def epoch(self, epoch: int, metrics: dict[str, float]) -> None: ...
    def say(self, text: str) -> None: ...


class Silent:
    """Progress that is not shown."""

    def begin(self, run: Run, steps: int) -> None: ...
    def step(self) -> None: ...
    def epoch(self, epoch: int, metrics: dict[str, float]) -> None: ...
    def say(self, text: str) -> None: ...


class Saving:
    """A run's checkpoints: loaded at its beginning, saved when the interval has passed or a stop is asked.

    Args:
        trainer: The trainer.
        run: The run.
        epochs: Its epochs' batches.
        ema: The moving average of its weights, if there is one.
        folder: Where its checkpoints go; nowhere where None.
        done: How far the run is; the trainer keeps it up to date, and loading changes it.

    Attributes:
        states: The random states to go on with within the epoch; None where an epoch, or the run, begins.
    """

    def __init__(
        self,
        trainer: "Trainer",
        run: Run,
        epochs: Epoch,
        ema: ModelEmaV3 | None,
        folder: Path | None,
        done: dict[str, Any],
    ):
        self.trainer, self.run, self.epochs, self.ema, self.folder, self.done = trainer, run, epochs, ema, folder, done
        self.states: dict[str, Any] | None = None
        self.began = self.last = time.monotonic()
        self.interval = trainer.settings.checkpoint_interval

    def seconds(self) -> float:
        """Seconds that the run has taken so far, over all the processes that have trained it one after the other."""
        return self.done["seconds"] + time.monotonic() - self.began

    def look(self, update: int | None = None) -> None:
        """Save where it is time to.

        Args:
            update: Number of the step just taken; None at an epoch's end.

        Raises:
            Stopped: SIGTERM came; it is saved.
        """
        if world_size() > 1 and update is not None and update % _AGREE_EVERY:
            return
        now = time.monotonic()
        late = rank() == 0 and now - self.last >= self.interval
        save, stop = any_of([late and self.folder is not None, stop_asked()])
        if self.folder is not None and (save or stop):
            self._save(self.folder)
            self.last = time.monotonic()
            if self.interval:  # a large model on a slow disk must not spend its time on this
                self.interval = max(self.interval, _WORTH * (self.last - now))
        if stop:
            self.trainer.accelerator.wait_for_everyone()  # the first to end would have the others ended while they save
            raise Stopped

    @property
    def _of(self) -> str | None:
        """Of what run a checkpoint is; of any that stands there, in a folder of an earlier version."""
        return None if self.run.follows is None else f"{self.run.name} of {self.run.follows}"

    def _save(self, folder: Path) -> None:
        trainer, scaler = self.trainer, self.trainer.accelerator.scaler
        draws = own_generator(trainer.optimizer)
        # Each process loads its own images, and so draws for itself.
        states = [self.epochs.states()] if self.done["batch"] else None
        states = gather_object(states) if world_size() > 1 and states is not None else states
        model, optimizer = self.run.subnet.model, trainer.optimizer
        state = model.state_dict()
        if trainer.splits:  # every process has to give its part
            state = {name: whole(value).cpu() for name, value in state.items()}
        steps = optimizer_state(optimizer)
        if rank() != 0:
            return
        saved = {
            "model": state,
            "optimizer": steps,
            "run": self.run.progress_state(),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "draws": None if draws is None else draws.generator.get_state(),
            "random": states,
            "done": self.done | {"seconds": self.seconds()},
        }
        save_checkpoint(folder, saved, self._of)

    def load_(self, progress: Progress) -> bool:
        """Go on with the run where a checkpoint is; whether there is one."""
        saved, told = (None, []) if self.folder is None else load_checkpoint(self.folder, self._of)
        for text in told:
            progress.say(text)
        if saved is None:
            return False
        trainer, model = self.trainer, self.run.subnet.model
        self.run.load_progress_(saved["run"])
        load_state_(model, saved["model"])
        load_optimizer_state_(trainer.optimizer, saved["optimizer"])
        if self.ema is not None:
            self.ema.load_state_dict(saved["ema"])
        if trainer.accelerator.scaler is not None:
            trainer.accelerator.scaler.load_state_dict(saved["scaler"])
        if (draws := own_generator(trainer.optimizer)) is not None:
            draws.generator = torch.Generator(trainer.accelerator.device)
            draws.generator.set_state(saved["draws"])
        self.done |= saved["done"]
        batches = f" and {self.done['batch']} batches" if self.done["batch"] else ""
        progress.say(
            f"{self.run.name} goes on after {self.done['epoch']} of {self.run.schedule_epochs} epochs{batches}"
        )
        states = saved["random"]
        if states is not None and len(states) != world_size():
            progress.say(
                f"{self.run.name} was trained by {len(states)} processes and now is by {world_size()}: it goes on, but "
                "not with the same draws"
            )
        self.states = None if states is None else states[min(rank(), len(states) - 1)]
        return True
