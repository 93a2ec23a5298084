"""The log of a run's epochs: a file of one row an epoch, on disk as soon as the epoch has ended.

The file is small and is written anew each time, so that whatever kills the process leaves whole rows; a run that goes
on from a checkpoint drops the rows of the epochs that it trains again.
"""

from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.warn import warn
from ..distributed.collectives import mean_over_processes
from ..pruning.training import Training
from ..storage.files import DamagedError, is_writer
from ..storage.tables import read_csv, write_csv

EPOCHS = "epochs.csv"
COLUMNS: tuple[str, ...] = (
    "run",
    "epoch",
    "epochs",
    "train_loss",
    "val_top1",
    "val_loss",
    "lr",
    "sparsity",
    "seconds",
    "time",
)


class EpochLog:
    """The log of one run.

    Args:
        run: The run.
        folder: The run's own; nothing is written where None.
        done: How far the run is, as its checkpoints have it. Of the epoch so far, ``loss`` is the sum of the losses and
            their number and ``lr`` the last step's, which the trainer sets, so that an epoch that is gone on with has
            its whole row.
        continued: Whether the run goes on from a checkpoint.
    """

    def __init__(self, run: Training, folder: Path | None, done: dict[str, Any], continued: bool):
        self.run, self.done = run, done
        self.path = None if folder is None or not is_writer() else folder / EPOCHS
        self._rows: list[Mapping[str, Any]] = []
        if self.path is not None and continued:
            self._rows += [row for row in rows_of(self.path.parent) if int(row["epoch"]) <= done["epoch"]]

    def see(self, loss: Tensor) -> None:
        """A batch's loss, before its step; the device is not waited for."""
        if self.done["loss"].device != loss.device:  # once an epoch
            self.done["loss"] = self.done["loss"].to(loss.device)
        total, count = self.done["loss"].unbind()
        total.add_(loss.detach())
        count.add_(1)

    def end_epoch(self, epoch: int, val: Mapping[str, float], seconds: float) -> dict[str, Any]:
        """Write the row of an epoch that has ended; every process has to call it.

        Args:
            epoch: Its number, from 0.
            val: Top-1 (percent) and loss on the validation split.
            seconds: That the run has taken so far.

        Returns:
            The row; its loss is the mean over all batches and processes, with what the method adds to it.
        """
        device = next(self.run.subnet.model.parameters()).device  # gone on with at its end, they come from a checkpoint
        total, count = mean_over_processes({"loss": self.done["loss"].to(device)})["loss"].tolist()
        row = {
            "run": self.run.name,
            "epoch": epoch + 1,
            "epochs": self.run.schedule_epochs,
            "train_loss": float(f"{total / max(count, 1):.6g}"),
            "val_top1": round(val["top1"], 4),
            "val_loss": float(f"{val['loss']:.6g}"),
            "lr": float(f"{self.done['lr']:.6g}"),
            "sparsity": round(self.run.sparsity, 6),
            "seconds": round(seconds, 2),
            "time": datetime.now().astimezone().isoformat(timespec="seconds"),
        }
        self.done |= nothing_yet()
        if self.path is not None:
            self._rows.append(row)
            write_csv(self._rows, COLUMNS, self.path)
        return row


def nothing_yet() -> dict[str, Any]:
    """What an epoch's row is made of, at its beginning."""
    return {"loss": torch.zeros(2, dtype=torch.float64), "lr": 0.0}


def rows_of(folder: Path) -> list[dict[str, str]]:
    """The rows of the run of this folder; none, and that is said, where its log is damaged."""
    try:
        rows = read_csv(folder / EPOCHS, COLUMNS)
        return [row for row in rows if row["run"] == folder.name and int(row["epoch"]) > 0]
    except (DamagedError, ValueError) as error:
        warn(f"{error}; the epochs before are left out of the log, and nothing else depends on it")
        return []
