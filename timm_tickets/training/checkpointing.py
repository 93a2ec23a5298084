"""Saving within a run: when, and what a checkpoint holds; and what a trainer tells while it works."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import gather_object
from timm.utils import ModelEmaV3

from ..distributed.fsdp2 import gathered, load_optimizer_state_, load_state_, optimizer_state
from ..distributed.processes import any_of, rank, world_size
from ..distributed.sigterm import Stopped, stop_asked
from ..pruning.training import Training
from ..storage.checkpoint_file import load_checkpoint, save_checkpoint
from .randomness import Epoch, own_generator

# Several processes have to agree on when to save or stop; asking at every step would cost them.
_AGREE_EVERY = 8
# The next checkpoint waits at least so many times as long as the last one took to write: 2 % of the time at most.
_WORTH = 50


class Progress(Protocol):
    """What the trainer tells while it works; of an epoch, its row in the log."""

    def begin(self, run: Training, steps: int) -> None: ...
    def step(self) -> None: ...
    def epoch(self, row: dict[str, Any]) -> None: ...
    def say(self, text: str) -> None: ...


class Silent:
    """Progress that is not shown."""

    def begin(self, run: Training, steps: int) -> None: ...
    def step(self) -> None: ...
    def epoch(self, row: dict[str, Any]) -> None: ...
    def say(self, text: str) -> None: ...


@dataclass
class Prepared:
    """What Accelerate has made ready for a run, and the trainer holds on to: a checkpoint has its state.

    Attributes:
        accelerator: Accelerate's object.
        optimizer: The optimizer, as prepared.
        epochs: The batches of the run's epochs.
        ema: The moving average of its weights, if there is one.
    """

    accelerator: Accelerator
    optimizer: Any
    epochs: Epoch
    ema: ModelEmaV3 | None

    @property
    def splits(self) -> bool:
        """Whether FSDP2 has split the model over the processes."""
        return self.accelerator.distributed_type == DistributedType.FSDP


class Saving:
    """A run's checkpoints: loaded at its beginning, saved when the interval has passed or a stop is asked.

    Args:
        run: The run.
        prepared: What it is trained with.
        folder: Where its checkpoints go; nowhere where None.
        done: How far the run is; the trainer keeps it up to date, and loading changes it.
        interval: Seconds between two checkpoints, at least.

    Attributes:
        states: The random states to go on with within the epoch; None where an epoch, or the run, begins.
    """

    def __init__(self, run: Training, prepared: Prepared, folder: Path | None, done: dict[str, Any], interval: float):
        self.run, self.prepared, self.folder, self.done, self.interval = run, prepared, folder, done, interval
        self.states: dict[str, Any] | None = None
        self.began = self.last = time.monotonic()

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
            # The first to end would have the others ended while they save.
            self.prepared.accelerator.wait_for_everyone()
            raise Stopped

    @property
    def _of(self) -> str | None:
        """Of what run a checkpoint is; None, and any that stands there will do, where its search has no folder."""
        return None if self.run.place.follows is None else f"{self.run.name} of {self.run.place.follows}"

    def _save(self, folder: Path) -> None:
        prepared, scaler = self.prepared, self.prepared.accelerator.scaler
        draws = own_generator(prepared.optimizer)
        # Each process loads its own images, and so draws for itself.
        states = [prepared.epochs.states()] if self.done["batch"] else None
        states = gather_object(states) if world_size() > 1 and states is not None else states
        model, ema = self.run.subnet.model, prepared.ema
        state = model.state_dict()
        if prepared.splits:  # every process has to give its part
            state = {name: gathered(value).cpu() for name, value in state.items()}
        steps = optimizer_state(prepared.optimizer)
        steps["param_groups"] = [{**group, "lr": float(group["lr"])} for group in steps["param_groups"]]
        if rank() != 0:
            return
        saved = {
            "model": state,
            "optimizer": steps,
            "run": self.run.progress_state(),
            "ema": None if ema is None else ema.state_dict(),
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
        prepared, model = self.prepared, self.run.subnet.model
        self.run.load_progress_(saved["run"])
        load_state_(model, saved["model"])
        load_optimizer_state_(prepared.optimizer, saved["optimizer"])
        if prepared.ema is not None:
            prepared.ema.load_state_dict(saved["ema"])
        if prepared.accelerator.scaler is not None:
            prepared.accelerator.scaler.load_state_dict(saved["scaler"])
        if (draws := own_generator(prepared.optimizer)) is not None:
            draws.generator = torch.Generator(prepared.accelerator.device)
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
