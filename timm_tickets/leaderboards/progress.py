"""How far a leaderboard is: one bar for the whole on a terminal, else a line for each experiment as it ends."""

import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ..config.leaderboard import Cell
from ..core.errors import shown
from ..experiments.report import say


class BoardProgress:
    """Counts the experiments that have ended, by whoever has carried them out, and estimates the time left.

    Args:
        cells: All of them.
        console: Where to; quiet in all processes but the first.
    """

    def __init__(self, cells: Sequence[Cell], console: Console):
        self.cells, self.console = cells, console
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=console,
            transient=True,
            disable=not console.is_interactive or console.quiet,
        )
        self._task = self._bar.add_task("leaderboard", total=len(cells), left="")
        self._took: dict[int, float] = {}  # seconds, by number
        self._alike: dict[Any, list[float]] = {}  # how many took how long together, by what `_likeness` says
        self._before: int | None = None  # how many had ended before we began
        self._worked, self._since = 0.0, time.monotonic()

    def __enter__(self) -> "BoardProgress":
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self._bar.stop()

    def ended(self, number: int, rows: Sequence[dict[str, Any]]) -> None:
        """An experiment has ended, with these records."""
        self._took[number] = took = sum(row["metrics"]["seconds"] for row in rows)
        for key in _likeness(self.cells[number]):
            count, seconds = self._alike.get(key, (0, 0.0))
            self._alike[key] = [count + 1, seconds + took]
        if self._before is None:
            return
        self._worked += took
        score = f"test {rows[-1]['metrics']['test_top1']:.2f} %, {_time(took)} of training"
        left = self._redraw()
        told = f"{len(self._took)} of {len(self.cells)}: {self.cells[number].name}: {score}"
        say(self.console, told + (f"; about {left} left" if left and not self._bar.live.is_started else ""))

    def begun(self) -> None:
        """All that had ended before has been counted."""
        if self._before is not None:
            return
        self._before, self._since = len(self._took), time.monotonic()
        before = f", {self._before} of them finished before" if self._before else ""
        say(self.console, f"{len(self.cells)} experiments{before}")
        self._redraw()

    def begins(self, number: int) -> None:
        self._bar.update(self._task, description=self.cells[number].name)

    def waits(self) -> None:
        self._bar.update(self._task, description="waiting for others")

    def failed(self, number: int, why: str) -> None:
        say(self.console, f"{self.cells[number].name} has failed, the others go on: {shown(why, 300)}")

    def left(self) -> str:
        """The time left at the speed of all processes since we began, in words; empty while nobody can know."""
        if not self._worked:
            return ""
        speed = self._worked / max(1e-9, time.monotonic() - self._since)
        left = [number for number in range(len(self.cells)) if number not in self._took]
        return _time(sum(map(self._expected, left)) / speed) if left else ""

    def _expected(self, number: int) -> float:
        """Seconds that an experiment may take: as others of its entry at its sparsity, else of its entry, else all."""
        for key in _likeness(self.cells[number]):
            if key in self._alike:
                count, seconds = self._alike[key]
                return seconds / count
        return 0.0

    def _redraw(self) -> str:
        left = self.left()
        self._bar.update(self._task, completed=len(self._took), left=f"about {left} left" if left else "")
        return left


def _likeness(cell: Cell) -> tuple[Any, ...]:
    """What experiments share that take about as long, the most alike first."""
    return (cell.label, cell.sparsity), cell.label, None


def _time(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6_000 else f"{seconds / 3600:.1f} h"
