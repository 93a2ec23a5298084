"""Experiments: a recipe searched, or a ticket trained, in a run folder that the same command continues.

The folder holds the resolved recipe, one folder a round (its ticket, its trained weights as a plain timm checkpoint,
``run.json`` written last), the final ticket, summary.csv and the plot.
"""

import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from .data import Data
from .files import is_writer, read_json, write_bytes, write_json, write_state
from .masks import Masks, full_masks
from .pruner import End, Run, run_record
from .recipe import Recipe, _flat, load_recipe
from .registry import create_pruner
from .report import RichProgress, plot, print_table, write_summary
from .settings import SettingError
from .subnet import State, Subnet
from .ticket import Ticket, describe_model, load_ticket
from .trainer import Trainer, build_model, model_kwargs


@dataclass(frozen=True)
class Result:
    """What an experiment left.

    Attributes:
        folder: The run folder.
        ticket: The final ticket, its metrics in its metadata.
        rows: One record a training, as in summary.csv.
    """

    folder: Path
    ticket: Ticket
    rows: list[dict[str, Any]]


def search(
    recipe: str | Path | Recipe,
    overrides: Sequence[str] = (),
    *,
    restart: bool = False,
    console: Console | None = None,
) -> Result:
    """Search a recipe's ticket and train it; called again, continue where it stopped.

    Args:
        recipe: Name of a shipped recipe, path, or a loaded one.
        overrides: Settings like ``pruner.sparsity=0.9``.
        restart: Delete what an earlier search left in the folder, and begin again.
        console: Where progress and tables go; standard output where None.

    Raises:
        SettingError: A wrong recipe, or another recipe's folder.
        NonFiniteLoss: A training's loss was NaN; finished rounds are kept.
        OSError: The folder cannot be written; what was written before is kept.
    """
    recipe = load_recipe(recipe, overrides)
    console = console or Console()
    folder = _open_folder(recipe, recipe.folder, restart)
    final = folder / f"{recipe.name}.ticket"
    if (done := read_json(folder / "result.json")) is not None:
        console.print(f"{folder} is finished; nothing to do (--restart searches again)", soft_wrap=True)
        print_table(done["rows"], console)
        return Result(folder, load_ticket(final), done["rows"])

    data = Data(recipe.data)
    model = build_model(recipe, data.num_classes)
    pruner = create_pruner(recipe.pruner["name"], model, folder=folder, **recipe.method_settings)
    pruner.metadata |= _origin(recipe, data, model)
    trainer = Trainer(recipe, model, data)
    subnet = pruner.subnet
    extra = 1 if pruner.runs else 2  # the ticket's own training, and a dense one where no run of the search is
    with RichProgress(console, None if pruner.runs is None else pruner.runs + extra) as progress:
        for run in pruner:
            progress.replayed(pruner.replayed, folder)
            trainer.fit(run, folder / run.name, progress)
            progress.end(run)
        progress.replayed(pruner.replayed, folder)
        ticket = pruner.ticket
        experiment = _Experiment(folder, trainer, subnet, progress, ticket.metadata)
        if recipe.dense and not any(row["sparsity"] == 0 for row in _records(folder)):
            experiment.train("dense", full_masks(subnet.weights()), pruner.first_state, index=0)
        last = pruner.rounds_done
        metrics = experiment.train(
            f"round_{last:02d}", ticket.masks, ticket.values, pruner.runs_done, last, ticket.metadata["start_step"]
        )
    ticket.metadata["metrics"] = metrics
    rows = _records(folder)
    if is_writer():
        ticket.save(final)
        write_summary(rows, folder / "summary.csv")
        plot(rows, folder / "accuracy.png", f"{recipe.name}: {recipe.model.model}, {recipe.pruner['name']}")
        write_json(folder / "result.json", {"rows": rows, "fingerprint": ticket.fingerprint})
    print_table(rows, console)
    console.print(f"ticket: {final} (sparsity {ticket.sparsity:.4f}, {final.stat().st_size:,} bytes)", soft_wrap=True)
    return Result(folder, ticket, rows)


def train(
    recipe: str | Path | Recipe,
    ticket: str | Path | None = None,
    overrides: Sequence[str] = (),
    *,
    restart: bool = False,
    console: Console | None = None,
) -> Result:
    """Train a ticket, or the dense network where none is given, under a recipe's data and training.

    The run folder is the recipe's ``output``, else ``output/<recipe>_train_<ticket>``.

    Raises:
        TicketError: The ticket cannot be read, or is for another architecture.
        SettingError, NonFiniteLoss, OSError: As `search`.
    """
    recipe = load_recipe(recipe, overrides)
    console = console or Console()
    given = None if ticket is None else load_ticket(ticket)
    stem = "dense" if ticket is None else Path(ticket).stem
    data = Data(recipe.data)
    model = build_model(recipe, data.num_classes)
    if given is None:
        # Through the pruner's own settings, so that the dense network's masks name the same weights.
        weights = create_pruner(recipe.pruner["name"], model, **recipe.method_settings).subnet.weights()
        given = Ticket.of(model, full_masks(weights), {**_origin(recipe, data, model), "start_step": 0})
    given.apply_(model)
    folder = _open_folder(recipe, recipe.output or Path("output") / f"{recipe.name}_train_{stem}", restart, given)
    if (done := read_json(folder / "result.json")) is not None:
        console.print(f"{folder} is finished; nothing to do (--restart trains again)", soft_wrap=True)
    else:
        subnet = Subnet(model, tuple(given.masks))
        with RichProgress(console, 1) as progress:
            experiment = _Experiment(folder, Trainer(recipe, model, data), subnet, progress, given.metadata)
            start_step = given.metadata.get("start_step", 0)
            experiment.train("round_00", given.masks, given.values, 0, 0, start_step)
        done = {"rows": _records(folder), "fingerprint": given.fingerprint}
        if is_writer():
            write_summary(done["rows"], folder / "summary.csv")
            write_json(folder / "result.json", done)
    print_table(done["rows"], console)
    return Result(folder, given, done["rows"])


@dataclass(frozen=True)
class _Experiment:
    """Trainings that are not part of a search: a ticket's own and the dense control's."""

    folder: Path
    trainer: Trainer
    subnet: Subnet
    progress: RichProgress
    metadata: dict[str, Any]

    def train(
        self, name: str, masks: Masks, start: State, index: int, round: int = 0, start_step: int = 0
    ) -> dict[str, Any]:
        """Train these masks from this start into the folder of this name; skip what is finished there."""
        where = self.folder / name
        if (record := read_json(where / "run.json")) is not None:
            self.progress.say(f"{name} is finished; skipped")
            return record["metrics"]
        self.subnet.set_mask_(masks)
        self.subnet.load_(start)
        epochs = self.trainer.settings.epochs
        run = Run(epochs, index=index, round=round, name=name, start_step=start_step, subnet=self.subnet)
        self.trainer.fit(run, where, self.progress)
        self.progress.end(run)
        end = run.finish_()
        if is_writer():
            ticket = Ticket.from_state(start, masks, {**self.metadata, "metrics": run.metrics})
            ticket.save(where / f"{name}.ticket")
            write_state(where / "model.safetensors", end.state)
            write_json(where / "run.json", run_record(run, End(end.state, masks, metrics=run.metrics)))
        return run.metrics


def _origin(recipe: Recipe, data: Data, model: Any) -> dict[str, Any]:
    """What a ticket says of where it comes from."""
    described = describe_model(model) | {"kwargs": model_kwargs(recipe, data.num_classes)}
    return {"model": described, "recipe": {"name": recipe.name, "hash": recipe.hash, "dataset": recipe.data.dataset}}


def _open_folder(recipe: Recipe, folder: Path, restart: bool, ticket: Ticket | None = None) -> Path:
    """Make the run folder, or find out that this very recipe may be continued in it."""
    stored = folder / "recipe.yaml"
    given = folder / "start.ticket"
    if restart and stored.exists() and is_writer():
        _clear_folder(folder)
    if stored.exists():
        old = _flat(yaml.safe_load(stored.read_text()))
        new = recipe.compared()
        changed = [f"{key}: {old.get(key)} there, {value} now" for key, value in new.items() if old.get(key) != value]
        if ticket is not None and given.exists() and load_ticket(given).fingerprint != ticket.fingerprint:
            changed.append("the ticket: another one was trained there")
        if changed:
            raise SettingError(
                f"{folder} holds another recipe's results:\n  "
                + "\n  ".join(changed)
                + "\ncontinue it with the old settings, choose another output=, or begin again with --restart"
            )
    elif is_writer():
        if ticket is not None:
            ticket.save(given)
        write_bytes(stored, recipe.to_yaml().encode())
    if is_writer():
        for left in folder.rglob(".*.tmp"):  # of a process that was killed while it wrote
            left.unlink()
    return folder


def _clear_folder(folder: Path) -> None:
    """Delete what an experiment wrote, and nothing else that a user may keep there; the recipe goes last."""
    for path in [*folder.glob("round_*"), folder / "dense"]:
        if path.is_dir():
            shutil.rmtree(path)
    for pattern in ("result.json", "*.ticket", "start.safetensors", "summary.csv", "accuracy.png", "recipe.yaml"):
        for path in folder.glob(pattern):
            with suppress(FileNotFoundError):
                path.unlink()


def _records(folder: Path) -> list[dict[str, Any]]:
    """The finished trainings of a folder, in order: dense first, then by round and part."""
    found = [read_json(path) for path in folder.glob("*/run.json")]
    return sorted(found, key=lambda row: (row["name"] != "dense", row["round"], row["part"]))
