"""A leaderboard searched: each process takes the next experiment that nobody holds, until none is left."""

import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from ..config.leaderboard import DENSE, Cell, Leaderboard, load_leaderboard
from ..config.recipe import CONTROLS
from ..core.errors import SettingError, TicketError, TrainingError
from ..distributed.processes import (
    apart,
    decided,
    ending_with_others,
    from_first,
    join_processes,
    place,
    wait_for_others,
)
from ..distributed.sigterm import Stopped, stop_asked, stoppable
from ..experiments.baselines import check_controls
from ..experiments.console import console_here
from ..experiments.controls import groups_apart, lacking
from ..experiments.report import say
from ..experiments.run_folder import RESULT, changes, whole_result
from ..experiments.search import search
from ..experiments.train import train
from ..reports.page import report
from ..storage.files import is_writer
from ..storage.lock import FolderInUse, held
from ..storage.tables import write_csv
from .progress import BoardProgress

SUMMARY = "leaderboard.csv"
_COLUMNS = ("entry", "sparsity", "seed", "test_top1", "val_top1", "sparsity_reached", "steps", "seconds", "folder")
_PAUSE = 1.0  # seconds between two looks at experiments that others carry out
_WAIT = -1


@dataclass
class Ranked:
    """What a leaderboard left.

    Attributes:
        folder: Of all run folders.
        rows: One for each finished experiment, as in leaderboard.csv; scores in percent.
        page: The report.
    """

    folder: Path
    rows: list[dict[str, Any]] = field(repr=False)
    page: Path


def leaderboard(
    leaderboard: str | Path,
    overrides: Sequence[str] = (),
    *,
    output: str | Path | None = None,
    console: Console | None = None,
) -> Ranked:
    """Search every entry of a leaderboard at every sparsity with every seed, and report; called again, continue.

    Each experiment is what `search` does, in a folder of its own: ``<output>/<entry>/<sparsity>/seed_<n>``; the dense
    network is trained once a seed, in ``<output>/dense/seed_<n>``. Any number of calls may work on one output at once,
    on machines that share it too: each takes the next experiment that nobody works on. The processes of one call do so
    as well, in groups of the recipe's ``processes_per_run``, unless its ``parallel`` is ``data``.

    Args:
        leaderboard: Name of a shipped one, or the path of a YAML file.
        overrides: Settings like ``training.epochs=4``, which hold over all entries, or ``seeds=[0,1]``.
        output: The folder of all run folders; the file's, else ``output/<name>``, where None.
        console: Where progress goes; standard output where None.

    Raises:
        SettingError: The leaderboard is wrong, or the output holds searches with other settings.
        TrainingError: Experiments have failed; the message names each. All others were carried out, and are reported.
        Stopped, OSError: As `search`.
    """
    console, board = console or console_here(), load_leaderboard(leaderboard, overrides, output)
    join_processes()  # from here on one of them writes
    with stoppable(), ending_with_others():
        decided(lambda: _check(board))
        _, groups = groups_apart(board.cells[0].recipe)
        told = console if place()[0] == 0 else Console(quiet=True)
        size = board.cells[0].recipe.processes_per_run if groups > 1 else None
        with apart(size), BoardProgress(board.cells, told) as progress:
            failed = _Work(board.cells, progress).all()
        wait_for_others()
        found = _written(board, console)
        lines = [f"{cell.name}: {why}" for cell, why in zip(board.cells, from_first(failed), strict=True) if why]
        if lines:
            raise TrainingError(
                f"{len(lines)} of {len(failed)} experiments have failed; the same command tries them again:\n  "
                + "\n  ".join(lines)
            )
    return found


class _Work:
    """What one process, or one group of them, does."""

    def __init__(self, cells: Sequence[Cell], progress: BoardProgress):
        self.cells, self.progress = cells, progress
        self.failed: dict[int, str] = {}
        self.done: set[int] = set()
        self._unfinished: dict[int, int] = {}  # when a result was written that is damaged, or lacks controls

    def all(self) -> list[str]:
        """Carry out what nobody else does until nothing is left; for each experiment why it has failed, or nothing."""
        while (number := decided(self._next)) is not None:
            if from_first(stop_asked()):
                raise Stopped
            if number == _WAIT:
                time.sleep(_PAUSE)
            else:
                self._carry_out(number)
        return [self.failed.get(number, "") for number in range(len(self.cells))]

    def _next(self) -> int | None:
        """The next one that can be begun; `_WAIT` where others work on all that are left, None where none is left."""
        left = [number for number in range(len(self.cells)) if not self._is_done(number)]
        self.progress.begun()
        waits = False
        for number in left:
            cell = self.cells[number]
            if number in self.failed:
                continue
            first = None if cell.after is None else self.cells.index(cell.after)
            if first in self.failed:
                self._fails(number, f"it starts from the weights of {self.cells[first].name}, which has failed")
            elif first in left or held(cell.folder):
                waits = True
            else:
                self.progress.begins(number)
                return number
        self.progress.waits()
        return _WAIT if waits else None

    def _is_done(self, number: int) -> bool:
        if number in self.done:
            return True
        cell = self.cells[number]
        try:
            written = (cell.folder / RESULT).stat().st_mtime_ns
        except OSError:
            return False
        if self._unfinished.get(number) == written:  # what is wrong is told once
            return False
        ticket = None if cell.label == DENSE else cell.folder / f"{cell.recipe.name}.ticket"
        result = whole_result(cell.folder, ticket)
        if result is None or (cell.label != DENSE and lacking(cell.recipe, result["rows"])):
            self._unfinished[number] = written
            return False
        self.done.add(number)
        self.progress.ended(number, result["rows"])
        return True

    def _carry_out(self, number: int) -> None:
        cell, quiet = self.cells[number], Console(quiet=True, force_terminal=False)
        try:
            with _naming(cell):
                (train if cell.label == DENSE else search)(cell.recipe, console=quiet)
        except FolderInUse:  # another was quicker
            pass
        except (SettingError, TicketError, TrainingError) as error:
            self._fails(number, str(error))

    def _fails(self, number: int, why: str) -> None:
        self.failed[number] = why
        self.progress.failed(number, why)


@contextmanager
def _naming(cell: Cell) -> Iterator[None]:
    """Let what is warned of within the block name the experiment, of which nothing else is shown."""
    before = warnings.showwarning

    def show(text: Any, *place: Any, **more: Any) -> None:
        before(f"{cell.name}: {text}", *place, **more)

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = before


def _check(board: Leaderboard) -> None:
    """Refuse now, and not at each of them in turn, controls that cannot be had and run folders of other settings."""
    for cell in board.cells:
        try:
            check_controls(cell.recipe)
        except SettingError as error:
            raise SettingError(f"entries.{cell.label}: {error}") from None
        stored = cell.folder / "recipe.yaml"
        if stored.is_file() and (changed := changes(stored, cell.recipe)):
            raise SettingError(
                f"{cell.folder} holds an experiment with other settings:\n  " + "\n  ".join(changed) + "\ncontinue "
                f"with the old settings, choose another --output, or delete {board.folder} to begin again"
            )


def _written(board: Leaderboard, console: Console) -> Ranked:
    """The table of all experiments and the report, by the writing process."""
    rows = decided(lambda: [row for cell in board.cells if (row := _row(cell)) is not None])
    where = board.folder / "report"
    if not rows:
        return Ranked(board.folder, rows, where / "report.html")
    if is_writer():
        write_csv(rows, _COLUMNS, board.folder / SUMMARY)
        say(console, f"{board.folder / SUMMARY}: every experiment, a row each")
        files, left = report([board.folder], where)
        for line in left[:20]:
            say(console, line)
        say(console, f"{files[0]}: the report; the same command makes it again, `timm-tickets report` too")
    return Ranked(board.folder, rows, where / "report.html")


def _row(cell: Cell) -> dict[str, Any] | None:
    if not (cell.folder / RESULT).exists() or (result := whole_result(cell.folder)) is None:
        return None
    rows = [row for row in result["rows"] if row["name"] not in CONTROLS]
    last = rows[-1]
    values = (
        *(cell.label, cell.sparsity, cell.recipe.seed, last["metrics"]["test_top1"], last["metrics"]["val_top1"]),
        *(last["sparsity"], sum(row["steps"] for row in rows), sum(row["metrics"]["seconds"] for row in rows)),
        str(cell.folder),
    )
    return dict(zip(_COLUMNS, values, strict=True))
