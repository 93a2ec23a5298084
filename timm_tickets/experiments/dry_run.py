"""A dry run: what a search would take, from a few timed steps on a model that is thrown away; nothing is written."""

import shutil
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from ..config.recipe import SEARCHED, Recipe, load_recipe
from ..data.images import minding_workers
from ..data.placing import bytes_in_words
from ..pruning.pruner import Pruner
from ..pruning.registry import checked_method, trained_before
from ..pruning.run import Run
from ..pruning.run_files import RECORD
from ..pruning.training import Training
from ..storage.files import is_writer
from ..training.trainer import Trainer
from .baselines import rival
from .begin import built, filled
from .console import console_here
from .report import say
from .search import create_search

_STEPS = 8  # that are timed, after as many as warm up
_WARM_UP = 3


@dataclass(frozen=True)
class Estimate:
    """What a search would take.

    Attributes:
        runs: How many trainings; where `at_least`, there may be more: the method ends when it is there.
        epochs: Of all of them together.
        steps: Optimizer steps of all of them together.
        disk: Bytes that the run folder holds at the end, at most.
        passing: Bytes of the checkpoints while a run is trained, at most.
        seconds: Of training and scoring; a guess.
        at_least: Whether the number of runs is not known beforehand.
    """

    runs: int
    epochs: int
    steps: int
    disk: int
    passing: int
    seconds: float
    at_least: bool


def dry_run(recipe: str | Path | Recipe, overrides: Sequence[str] = (), *, console: Console | None = None) -> Estimate:
    """Say how many runs, epochs and steps a search has, and about how much time and disk it takes.

    A few steps are taken on a model of its own: they show that the recipe can be trained at all.

    Args:
        recipe: Name of a shipped recipe, path, or a loaded one.
        overrides: Settings like ``pruner.sparsity=0.9``.
        console: Where it is said; standard output where None.

    Raises:
        SettingError, TrainingError: As `search`.
    """
    recipe = load_recipe(recipe, overrides)
    console = console or console_here()
    with minding_workers():
        data, model = built(recipe, console)
        pruner = create_search(recipe, data, model, None)
        trainer = Trainer(recipe, model, data)
        filled(data, console)
        found = _Timed(trainer, pruner, recipe)
    estimate = found.estimate()
    if is_writer():
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
        for name, text in {**_told(recipe, pruner, estimate), "time": found.told(estimate)}.items():
            table.add_row(name, Text(text, overflow="fold"))
        console.print(table, highlight=False)
        say(console, "nothing was trained or written")
    return estimate


def _told(recipe: Recipe, pruner: Pruner, found: Estimate) -> dict[str, str]:
    count = sum(mask.numel() for mask in pruner.subnet.mask.values())
    least = "at least " if found.at_least else ""
    why = f": {pruner.method.name} ends when it is there, and how many that takes is unknown" if found.at_least else ""
    there = next(path for path in (recipe.folder.absolute(), *recipe.folder.absolute().parents) if path.exists())
    finished = len([*recipe.folder.glob(f"*/{RECORD}")])
    return {
        "search": f"{pruner.method.name} to sparsity {pruner.method.sparsity:g} of the {count:,} prunable weights of "
        f"{recipe.model.model}",
        "runs": f"{least}{found.runs:,}{why}" + (f"; {finished} are finished in {recipe.folder}" if finished else ""),
        "epochs": f"{least}{found.epochs:,}",
        "steps": f"{least}{found.steps:,}, of {recipe.training.batch_size * recipe.training.grad_accum_steps:,} images",
        "disk": f"at most {bytes_in_words(found.disk)}{' for so many runs' if found.at_least else ''} in "
        f"{recipe.folder}, and {bytes_in_words(found.passing)} of checkpoints on the way; "
        f"{bytes_in_words(shutil.disk_usage(there).free)} are free",
    }


class _Timed:
    """A search's first run and what a step and a scoring of it take."""

    def __init__(self, trainer: Trainer, pruner: Pruner, recipe: Recipe):
        self.trainer, self.pruner, self.recipe = trainer, pruner, recipe
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a run that is given up after a few steps
            self.first = next(pruner, None)
            self.reading = 0.0
            plain = self.first
            if plain is None or plain.reads_only:
                if plain is not None:
                    batches, seconds = self._step(plain)
                    self.reading = batches * seconds
                    plain.finish_()
                plain = Training(Run(recipe.ticket_epochs), pruner.subnet)
            self.batches, self.seconds = self._step(plain)
        scored = [(self._batch(loader), len(loader)) for loader in (trainer.val_loader, trainer.test_loader)]
        self.validation, self.test = (seconds * count for seconds, count in scored)

    def estimate(self) -> Estimate:
        recipe, pruner, first = self.recipe, self.pruner, self.first
        method, known, epochs = pruner.method, pruner.runs, recipe.ticket_epochs
        runs = 1 if known is None else known
        searched = recipe.pruner["epochs"]
        trains = first is not None and not first.reads_only
        # Whether the search itself trains the dense network on everything, as imp's first run does.
        moves = first is not None and (first.request.moves or len(pruner.subnet.gates) > 0)
        sparse = first is not None and (moves or first.sparsity or first.request.penalised)
        dense_first = first is not None and first.all_images and not sparse
        whole, accumulated = len(self.trainer.train_loader), recipe.training.grad_accum_steps
        in_search = runs * searched * trains
        own = in_search * self.batches + epochs * whole * (not method.ends_trained)
        beside = self._beside(dense_first and searched == epochs, max(1, round(own / whole)))
        after = epochs * (not method.ends_trained) + sum(beside)  # of the ticket, and of its controls
        batches = in_search * self.batches + after * whole
        steps = in_search * -(-self.batches // accumulated) + after * -(-whole // accumulated)
        scorings = runs * trains + len(beside) + 1
        seconds = batches * self.seconds + (in_search + after) * self.validation + runs * self.reading * (not trains)
        disk, passing = self._disk(runs, scorings, trains)
        seconds += scorings * (self.validation * method.ends_trained + self.test)
        return Estimate(runs + len(beside) + 1, in_search + after, steps, disk, passing, seconds, known is None)

    def _beside(self, dense_there: bool, spent: int) -> list[int]:
        """Epochs of each training of a control; of a search of its own all of them as they are known beforehand.

        Args:
            dense_there: Whether the search trains the dense network as long as the ticket is trained.
            spent: Epochs of search and ticket together.
        """
        recipe, subnet, found = self.recipe, self.pruner.subnet, list[int]()
        run = [(recipe.pruner["epochs"], recipe.pruner["epochs"] * self.batches)] * (self.pruner.runs or 1)
        own = 0 if self.pruner.method.ends_trained else recipe.ticket_epochs
        in_all = own + trained_before(recipe.pruner, run)
        for control in recipe.controls:
            if control in SEARCHED:
                other = rival(control, recipe, recipe.folder, recipe.pruner["sparsity"], spent)
                method = checked_method(other.pruner["name"], other.method_settings)
                found += [method.epochs] * (method.runs(subnet) or 1)
                found += [] if method.ends_trained else [other.ticket_epochs]
            elif control == "equal_epochs":
                same = in_all == recipe.ticket_epochs and (dense_there or "dense" in recipe.controls)
                found += [] if same else [in_all]
            elif control != "dense" or not dense_there:
                found.append(recipe.ticket_epochs)
        return found

    def told(self, found: Estimate) -> str:
        where = self.trainer.accelerator.device.type
        least = "at least " if found.at_least else "about "
        return (
            f"{least}{_duration(found.seconds)} on this machine's {where}: {1000 * self.seconds:.3g} ms a step, "
            f"{self.validation:.2g} s a validation (measured over {_STEPS} steps; more while others use the machine)"
        )

    def _step(self, run: Training) -> tuple[int, float]:
        """Batches of an epoch of a run, and the seconds that one takes."""
        clock = _Clock(self._wait)
        with suppress(_Enough):
            self.trainer.fit(run, None, clock)
        return clock.batches, clock.seconds

    def _wait(self) -> None:
        if self.trainer.accelerator.device.type == "cuda":
            torch.cuda.synchronize()

    @torch.no_grad()
    def _batch(self, loader: Any) -> float:
        """Seconds that a batch takes to score."""
        self.trainer.model.eval()
        began, count = time.perf_counter(), 0
        for images, _ in islice(loader, _STEPS):
            with self.trainer.accelerator.autocast():
                self.trainer.model(images)
            count += 1
        self._wait()
        return (time.perf_counter() - began) / max(count, 1)

    def _disk(self, runs: int, trainings: int, trains: bool) -> tuple[int, int]:
        """Bytes of the folder at the end, at most, and of checkpoints on the way."""
        t, gates = self.recipe.training, len(self.pruner.subnet.gates) > 0
        model = _size(self.pruner.subnet.model.state_dict().values())
        state = _size(value for one in self.trainer.optimizer.state.values() for value in one.values())
        # Weights and ticket of each; behind gates the weights before them and the scores too, of readings the scores.
        each = 2 + t.model_ema + t.keep_best
        first = 2 + (
            getattr(self.pruner.method, "rewind", None) is not None
        )  # the start, the final ticket, the rewind point
        count = each * trainings + (2 * gates if trains else 3) * runs + first
        return count * model, 2 * (state + model * (1 + t.model_ema))


class _Enough(Exception):
    """So many steps are timed."""


class _Clock:
    """Progress that times steps, and ends the training after enough of them."""

    def __init__(self, wait: Callable[[], None]):
        self.wait, self.batches, self.last = wait, 0, 0.0
        self.times: list[float] = []

    @property
    def seconds(self) -> float:
        """Of a step, once warm."""
        return statistics.mean(self.times[min(_WARM_UP, len(self.times) - 1) :])

    def begin(self, run: Training, steps: int) -> None:
        self.batches, self.last = steps, time.perf_counter()

    def step(self) -> None:
        self.wait()
        now = time.perf_counter()
        self.times.append(now - self.last)
        self.last = now
        if len(self.times) == _WARM_UP + _STEPS:
            raise _Enough

    def epoch(self, row: dict[str, Any]) -> None:
        self.last = time.perf_counter()  # the validation before is no step

    def say(self, text: str) -> None: ...


def _size(values: Any) -> int:
    return sum(value.numel() * value.element_size() for value in values if isinstance(value, Tensor))


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86_400), ("hours", 3_600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.2g} {unit}" if seconds < 10 * length else f"{seconds / length:.0f} {unit}"
    return f"{seconds:.2g} seconds" if seconds < 10 else f"{seconds:.0f} seconds"
