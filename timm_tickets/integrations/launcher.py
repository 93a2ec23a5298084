"""Launcher: an unedited training script run under a ticket or a pruner.

What a script makes of timm is taken as it is made: the task when the script makes its optimizer, as `wrap` would there;
the optimizer and the loader as they are made; the epochs from the arguments that it has parsed. All of it is put back
when the script has ended.
"""

import argparse
import logging
import runpy
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import timm.data
import timm.optim
import timm.scheduler
import timm.task
import timm.utils
import torch
from timm.task.task import TrainingTask

from ..core.errors import SettingError, check, shown
from ..pruning.registry import get_method
from ..tickets.ticket import Ticket, load_ticket
from .ticketed import Ticketed
from .timm_task import wrap
from .trained import Start

_logger = logging.getLogger(__name__)


class Launcher:
    """Runs a script so that it trains what is given here.

    Args:
        ticket: The path of a ticket to train.
        pruner: The name of a pruner.
        settings: Of the pruner; its ``epochs`` are the script's where not given.
        folder: Where the search is written down.
        start: Whose weights a ticket's training starts from, as for `wrap`.

    Raises:
        SettingError: Not one of ticket and pruner, or a wrong setting.
        TicketError: The ticket cannot be read.
    """

    def __init__(
        self,
        ticket: str | None,
        pruner: str | None,
        settings: dict[str, Any],
        folder: Path | None = None,
        start: Start | None = None,
    ):
        if (ticket is None) == (pruner is None):
            raise SettingError("run: give either --ticket FILE to train, or --pruner NAME to search with")
        if pruner is not None:
            check(get_method(pruner), settings, "pruner")
        self.given = {"pruner": pruner, "folder": folder, "start": start, **settings}
        self.ticket: Ticket | None = None if ticket is None else load_ticket(ticket)
        self.arguments: Any = None  # what the script has parsed
        self.task: Any = None
        self.optimizer: Any = None
        self.loader: Any = None
        self.attached = False
        self._waiting: dict[TrainingTask, Any] = {}

    def run(self, script: Path, arguments: list[str]) -> None:
        """Run a script to its end.

        Args:
            script: A Python file.
            arguments: Its own.

        Raises:
            SettingError: It made nothing that could be trained so, or trains other epochs than the pruner.
            TrainingError: It ended before the run was done.
        """
        if not script.is_file():
            raise SettingError(f"script: there is no file '{shown(str(script))}'; give timm's train.py, or one like it")
        with self._watching(), _as_main(script, arguments):
            try:
                runpy.run_path(str(script), run_name="__main__")
            except SystemExit as error:
                if error.code not in (None, 0) or {"-h", "--help"} & {*arguments}:
                    raise
            self._check_end()

    def _check_end(self) -> None:
        if not self.attached:
            missing = [
                what
                for what, found in (
                    ("training task of timm.task", self.task or self._waiting),
                    ("optimizer by timm.optim.create_optimizer_v2", self.optimizer),
                    ("training loader by timm.data.create_loader", self.loader),
                )
                if not found
            ]
            raise SettingError(
                f"script: it has ended and trained no ticket, for it made no {', and no '.join(missing)}; edit it as "
                "docs/timm_train.md says (`timm_tickets.wrap`), or write the loop with `timm_tickets.create_pruner`"
            )
        self.task.check_end()

    @contextmanager
    def _watching(self) -> Iterator[None]:
        with ExitStack() as stack:

            def instead(of: Any, name: str, by: Callable[[Any], Any]) -> None:
                stack.enter_context(_replaced(of, name, by))

            instead(argparse.ArgumentParser, "parse_args", self._parsing)
            instead(TrainingTask, "__init__", self._making_task)
            instead(timm.optim, "create_optimizer_v2", self._making_optimizer)
            instead(timm.scheduler, "create_scheduler_v2", self._making_schedule)
            instead(timm.utils, "update_summary", self._summing_up)
            for name in ("create_loader", "create_naflex_loader"):
                if hasattr(timm.data, name):
                    instead(timm.data, name, self._making_loader)
            yield

    def _parsing(self, parse: Any) -> Any:
        def parse_args(*args: Any, **kwargs: Any) -> Any:
            found = parse(*args, **kwargs)
            if hasattr(found, "epochs"):
                self.arguments = found
            return found

        return parse_args

    def _making_task(self, make: Any) -> Any:
        def init(task: TrainingTask, *args: Any, **kwargs: Any) -> None:
            make(task, *args, **kwargs)
            self._waiting[task] = task.register_forward_pre_hook(_refuse_dense)

        return init

    def _making_optimizer(self, make: Any) -> Any:
        def create_optimizer_v2(*args: Any, **kwargs: Any) -> Any:
            if self.task is not None:
                return make(*args, **kwargs)
            if not self._waiting:
                raise SettingError(
                    "script: it makes its optimizer before any training task of timm.task; edit it as "
                    "docs/timm_train.md says (`timm_tickets.wrap`), or write the loop with `timm_tickets.create_pruner`"
                )
            task = next(reversed(self._waiting))
            self._take(task)
            self._waiting.pop(task).remove()
            self.optimizer = make(*args, **kwargs)
            self._attach()
            return self.optimizer

        return create_optimizer_v2

    def _making_loader(self, make: Any) -> Any:
        def create_loader(*args: Any, **kwargs: Any) -> Any:
            loader = make(*args, **kwargs)
            if kwargs.get("is_training", False) and not self.attached:
                self.loader = loader
                self._attach()
            return loader

        return create_loader

    def _making_schedule(self, make: Any) -> Any:
        def create_scheduler_v2(*args: Any, **kwargs: Any) -> Any:
            scheduler, epochs = make(*args, **kwargs)
            run = None if self.task is None else self.task.run
            if run is not None and epochs != run.schedule_epochs:
                raise SettingError(
                    f"epochs: the script's schedule has {epochs}, and {run.name} was begun with {run.schedule_epochs}; "
                    f"leave epochs out of --set, or set epochs={epochs}"
                )
            return scheduler, epochs

        return create_scheduler_v2

    def _summing_up(self, update: Any) -> Any:
        def update_summary(epoch: int, train_metrics: Any, eval_metrics: Any, *args: Any, **kwargs: Any) -> Any:
            if self.task is not None:
                eval_metrics = OrderedDict({**(eval_metrics or {}), "sparsity": self.task.sparsity})
            return update(epoch, train_metrics, eval_metrics, *args, **kwargs)

        return update_summary

    def _take(self, task: TrainingTask) -> None:
        given, parsed = dict(self.given), self.arguments
        given.setdefault("epochs", None if parsed is None else scheduled_epochs(parsed))
        began = getattr(parsed, "start_epoch", None)
        if self.ticket is not None and began is not None:
            given["start_epoch"] = began
        self.task = wrap(task, ticket=self.ticket, **given)
        late = self.task.start_epoch
        if late and began is None and hasattr(parsed, "start_epoch") and not getattr(parsed, "resume", ""):
            parsed.start_epoch = late  # pyright: ignore[reportOptionalMemberAccess]
            if task.verbose:
                _logger.info(f"the script's start_epoch is set to {late}: the weights are from there")

    def _attach(self) -> None:
        if self.task is None or self.optimizer is None or (self.loader is None and self.task.run is not None):
            return
        _, loader = self.task.attach(self.optimizer, self.loader)
        if loader is not self.loader:  # the script has it already: what it holds becomes the part
            vars(self.loader).clear()
            vars(self.loader).update(vars(loader))
        self.attached = True


def scheduled_epochs(arguments: Any) -> int:
    """How many epochs a script with timm's arguments will train: those of its schedule, cooldown and warmup included.

    Args:
        arguments: With ``epochs``, and timm's own names for the rest of the schedule.
    """
    parameter = torch.nn.Parameter(torch.zeros(()))
    try:
        kwargs: dict[str, Any] = timm.scheduler.scheduler_kwargs(arguments)
        kwargs["updates_per_epoch"] = 1  # any number gives the same epochs
        return timm.scheduler.create_scheduler_v2(torch.optim.SGD([parameter], 0.1), **kwargs)[1]
    except (AttributeError, TypeError):  # a script with another kind of schedule
        return arguments.epochs


def _refuse_dense(task: TrainingTask, _: Any) -> None:
    if task.training and not isinstance(task, Ticketed):
        raise SettingError(
            "script: it trains a task that has no optimizer by timm.optim.create_optimizer_v2, so nothing would hold "
            "its pruned weights; edit it as docs/timm_train.md says (`timm_tickets.wrap`)"
        )


@contextmanager
def _replaced(of: Any, name: str, by: Callable[[Any], Any]) -> Iterator[None]:
    """Put something else in place of a function, wherever timm's modules that are loaded have it."""
    old = getattr(of, name)
    new = wraps(old)(by(old))
    places = [of]
    if not isinstance(of, type):
        loaded = [module for key, module in sys.modules.items() if key.startswith("timm.")]
        places = [module for module in loaded if vars(module).get(name) is old]
    for place in places:
        setattr(place, name, new)
    try:
        yield
    finally:
        for place in places:
            setattr(place, name, old)


@contextmanager
def _as_main(script: Path, arguments: list[str]) -> Iterator[None]:
    """Arguments and import path as Python gives them to a script."""
    before = sys.argv, list(sys.path)
    sys.argv = [str(script), *arguments]
    sys.path.insert(0, str(script.resolve().parent))
    try:
        yield
    finally:
        sys.argv, sys.path[:] = before
