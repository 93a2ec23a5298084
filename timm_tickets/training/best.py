"""The best epoch's weights, kept in a file of their own beside the last one's where a recipe asks for that."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from timm.utils import ModelEmaV3

from ..core.states import digest
from ..pruning.training import Training
from ..sparse.subnet import Subnet
from ..storage.files import is_writer, write_state

BEST = "model_best.safetensors"


class Best:
    """Writes a run's weights whenever validation is better than at all epochs before; the test split is never asked.

    Where a method moves the mask within the run, only epochs with the same mask are compared, so that what stays at the
    end has the run's last one. Behind soft masks or tweaks nothing is kept: what is validated is another model.

    Args:
        run: The run.
        folder: The run's own; nothing is kept where None.
        done: How far the run is, as its checkpoints have it.
        continued: Whether the run goes on from a checkpoint; else a file of an earlier training is deleted.
    """

    def __init__(self, run: Training, folder: Path | None, done: dict[str, Any], continued: bool):
        self.run, self.folder, self.done = run, folder, done
        if folder is not None and not continued and is_writer():
            (folder / BEST).unlink(missing_ok=True)

    def look(self, epoch: int, val: Mapping[str, float], ema: ModelEmaV3 | None) -> None:
        """After an epoch, from 0, was validated; every process has to call it."""
        run = self.run
        if self.folder is None:
            return
        moves = run.request.moves
        found = {"mask": digest(run.subnet.mask) if moves else "", "top1": val["top1"], "epoch": epoch + 1}
        before = self.done.get("kept")
        if before is not None and before["mask"] == found["mask"] and before["top1"] >= found["top1"]:
            return
        self.done["kept"] = found
        state = run.subnet.state() if ema is None else Subnet(ema.module, ()).state()
        if is_writer():  # what it is stands in the file itself, and so is true of it whatever happens beside it
            told = {"val_top1": f"{val['top1']:.4f}", "epoch": str(epoch + 1)}
            write_state(self.folder / BEST, state, told)


def told_of(path: Path) -> dict[str, str]:
    """What a file of the best weights says of itself: ``val_top1`` (percent) and ``epoch``, from 1."""
    with safe_open(path, "pt") as file:
        return file.metadata() or {}
