"""Noticing that a training has gone wrong: a loss or a weight that is not finite."""

from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from ..core.errors import TrainingError
from ..core.states import not_finite
from ..distributed.fsdp2 import is_split
from ..pruning.training import Training
from ..storage.files import is_writer, write_state

# On a GPU, asking whether a loss is finite waits for it: so ask only every so many steps.
_CHECK_EVERY = 50
# The last good state stays on a GPU where it takes at most this share of the memory that is free there.
_SHARE = 0.1


class Watch:
    """Remembers the first step whose loss was not finite, without waiting for the device at every step.

    Args:
        run: The run, as it begins.
        device: Where losses are.
        folder: Where the last good state is written when something is wrong; nowhere where None.
        good: Of an earlier run of the same model, whose memory is taken; it is filled.
    """

    def __init__(self, run: Training, device: torch.device, folder: Path | None, good: dict[str, Tensor] | None = None):
        self.run, self.folder, self.good = run, folder, {} if good is None else good
        self.every = 1 if device.type == "cpu" else _CHECK_EVERY
        self.losses = torch.zeros(self.every, device=device)
        self.steps: list[int] = []  # of the losses that were not looked at yet
        self._remember()

    def see(self, loss: Tensor) -> None:
        """A batch's loss, before its step."""
        self.losses[len(self.steps)].copy_(loss.detach())
        self.steps.append(self.run.step)
        if len(self.steps) == self.every:
            self._check()

    def keep(self) -> None:
        """Check an epoch's end, and remember its state as the last good one."""
        self._check()
        there, strange = self.run.subnet.state_there(), self.run.subnet.strange
        split = any(map(is_split, there.values()))
        if split or not torch.stack([value.isfinite().all() for value in there.values()]).all():
            state = self.run.subnet.live_state() if split or strange else there
            if (name := not_finite(state, strange)) is not None:
                self._stop(f"{name} is not finite after step {self.run.step}")
        self._remember()

    def _remember(self) -> None:
        there = self.run.subnet.state_there()
        if self.good.keys() != there.keys():
            self.good.clear()
        if self.good or _fits(there):
            for name, value in there.items():
                if name in self.good:
                    self.good[name].copy_(value)
                else:
                    self.good[name] = value.clone(memory_format=torch.contiguous_format)
            return
        for name, value in self.run.subnet.live_state().items():  # one by one: all of them would be a second model
            self.good[name] = value

    def _check(self) -> None:
        if self.steps and not (losses := self.losses[: len(self.steps)]).isfinite().all():
            found = losses.isfinite().tolist()
            self._stop(f"the loss is not finite at step {self.steps[found.index(False)]}")
        self.steps.clear()

    def _stop(self, what: str) -> None:
        kept = ""
        if self.folder is not None and is_writer():
            path = self.folder / "last_good.safetensors"
            with suppress(OSError):
                write_state(path, {name: value.cpu() for name, value in self.good.items()})
                kept = f"; the weights at the end of the last good epoch are in {path}"
        raise TrainingError(
            f"{self.run.name}: {what} of the run{kept}. Finished rounds are kept. Lower training.lr or set "
            "training.clip_grad, and begin again with --restart or another output"
        )


def _fits(state: dict[str, Tensor]) -> bool:
    """Whether a copy of a state may stay beside it; of what FSDP2 has split, no process has the whole."""
    if any(map(is_split, state.values())):
        return False
    on_card = [value for value in state.values() if value.device.type == "cuda"]
    if not on_card:
        return True
    free, _ = torch.cuda.mem_get_info(on_card[0].device)
    return sum(value.nbytes for value in on_card) <= _SHARE * free
