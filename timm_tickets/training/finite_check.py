"""Noticing that a training has gone wrong: a loss or a weight that is not finite."""

from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from ..core.errors import TrainingError
from ..core.states import not_finite
from ..pruning.training import Training
from ..storage.files import is_writer, write_state

# On a GPU, asking whether a loss is finite waits for it: so ask only every so many steps.
_CHECK_EVERY = 50


class Watch:
    """Remembers the first step whose loss was not finite, without waiting for the device at every step."""

    def __init__(self, run: Training, device: torch.device, folder: Path | None):
        self.run, self.folder, self.good = run, folder, run.subnet.state()
        self.every = 1 if device.type == "cpu" else _CHECK_EVERY
        self.first = torch.full((), -1, dtype=torch.int64, device=device)

    def see(self, loss: Tensor) -> None:
        bad = ~loss.detach().isfinite() & (self.first < 0)
        self.first = torch.where(bad, self.run.step, self.first)
        if self.run.step % self.every == 0:
            self._check()

    def keep(self) -> None:
        """Check an epoch's end, and remember its state as the last good one."""
        self._check()
        state = self.run.subnet.live_state()
        if (name := not_finite(state, self.run.subnet.strange)) is not None:
            self._stop(f"{name} is not finite after step {self.run.step}")
        for name, value in state.items():  # one by one: a new copy of all would be a second model
            self.good[name] = value

    def _check(self) -> None:
        if (step := int(self.first)) >= 0:
            self._stop(f"the loss is not finite at step {step}")

    def _stop(self, what: str) -> None:
        kept = ""
        if self.folder is not None and is_writer():
            path = self.folder / "last_good.safetensors"
            with suppress(OSError):
                write_state(path, self.good)
                kept = f"; the weights at the end of the last good epoch are in {path}"
        raise TrainingError(
            f"{self.run.name}: {what} of the run{kept}. Finished rounds are kept. Lower training.lr or set "
            "training.clip_grad, and begin again with --restart or another output"
        )
