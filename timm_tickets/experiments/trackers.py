"""Accelerate's trackers: every epoch's row goes to those that a recipe names in ``training.log_with``.

What a tracker does is its own package's business, often over a network: where one fails in the middle of a search, that
is told once and the training goes on. The log on disk has everything.
"""

from pathlib import Path
from types import TracebackType
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import LoggerType

from ..config.recipe import Recipe
from ..core.errors import SettingError
from ..core.warn import warn
from ..distributed.processes import from_first
from ..storage.files import is_writer
from ..training.epoch_log import EPOCHS, rows_of

FOLDER = "trackers"


def check_trackers(recipe: Recipe) -> None:
    """Refuse, before anything is trained, trackers whose package is not there: Accelerate leaves them out in silence.

    Raises:
        SettingError: One is not.
    """
    there = {str(one.value) for one in get_available_trackers()}
    missing = [one for one in recipe.training.log_with if one in LoggerType.list() and one not in there]
    if missing:
        packages = " ".join(one.replace("_", "-") for one in missing)
        raise SettingError(
            f"training.log_with: {', '.join(missing)} is not installed here; `pip install {packages}`, or leave it out "
            f"(there are: {', '.join(sorted(there)) or 'none'}). Every epoch is in {EPOCHS} in any case"
        )


class Trackers:
    """The trackers of an experiment; each group of processes that trains by itself has its own.

    One step of theirs is one epoch of the whole experiment, in the order in which its trainings were begun.

    Args:
        recipe: The recipe, which names them; they get its settings too.
        folder: The run folder; those that write files do so in its folder `trackers`.
    """

    def __init__(self, recipe: Recipe, folder: Path):
        self.recipe, self.folder = recipe, folder
        self._open: list[Any] | None = None
        self._before: dict[str, int] = {}  # a training's first step

    def __enter__(self) -> "Trackers":
        problem = None
        try:
            self._start_all()
        except SettingError as error:
            problem = str(error)
        if (problem := from_first(problem)) is not None:  # in every process, or the others would wait for this one
            raise SettingError(problem)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        for tracker in self._open or ():
            self._tell(tracker, tracker.finish)
        self._open = None

    def log(self, row: dict[str, Any]) -> None:
        """Log an epoch's row; numbers only, and the training's name as the trackers take text."""
        if not (trackers := self._opened()):
            return
        name, numbers = row["run"], {key: value for key, value in row.items() if isinstance(value, int | float)}
        if name not in self._before:
            others = (path.parent for path in self.folder.glob(f"*/{EPOCHS}") if path.parent.name != name)
            self._before[name] = sum(len(rows_of(other)) for other in others)
        step = self._before[name] + row["epoch"]
        for tracker in trackers:
            self._tell(tracker, tracker.log, {**numbers, "run": name}, step=step)

    def _opened(self) -> list[Any]:
        if self._open is None:  # the first of another group, which works by itself now
            try:
                self._start_all()
            except SettingError as error:
                warn(str(error))
                self._open = []
        return self._open or []

    def _start_all(self) -> None:
        if not (self.recipe.training.log_with and is_writer()):
            return
        settings = {
            key: value if isinstance(value, bool | int | float | str) else str(value)
            for key, value in self.recipe.compared().items()
        }
        self._open = [self._start(name, settings) for name in self.recipe.training.log_with]

    def _start(self, name: str, settings: dict[str, Any]) -> Any:
        kind = LOGGER_TYPE_TO_CLASS[name]
        try:
            where = [str(self.folder / FOLDER)] if kind.requires_logging_directory else []
            tracker = kind(self.recipe.name, *where)
            if hasattr(tracker, "start"):  # older Accelerate starts them as they are made
                tracker.start()
            tracker.store_init_configuration(settings)
        except Exception as error:  # another package's: whatever it raises
            raise SettingError(
                f"training.log_with: {name} cannot be started: {error!r}; mend that, or leave it out"
            ) from error
        return tracker

    def _tell(self, tracker: Any, call: Any, *args: Any, **kwargs: Any) -> None:
        try:
            call(*args, **kwargs)
        except Exception as error:
            warn(
                f"training.log_with: {tracker.name} has failed ({error!r}); the training goes on, and {EPOCHS} has all"
            )
            if self._open is not None:
                self._open = [one for one in self._open if one is not tracker]
