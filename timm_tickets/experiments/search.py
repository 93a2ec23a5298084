"""Experiments: a recipe searched, or a ticket trained, in a run folder that the same command continues.

The folder holds the resolved recipe, one folder a round (its ticket, its trained weights as a plain timm checkpoint,
``run.json`` written last), the final ticket, summary.csv and the plot.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import nn

from ..config.parts import RetrainSettings
from ..config.recipe import SEARCHED, Recipe, load_recipe
from ..core.errors import SettingError
from ..core.warn import warn
from ..data.datasets import Data
from ..data.images import minding_workers
from ..distributed.processes import apart, decided
from ..pruning.checks import refuse_split
from ..pruning.pruner import Pruner
from ..pruning.registry import create_pruner
from ..pruning.run import rewind_parts
from ..sparse.subnet import Subnet
from ..storage.files import is_writer
from ..tickets.ticket import Ticket, load_ticket
from ..training.build import build_model
from .baselines import beside, check_controls, epochs_spent, reached, rival
from .begin import built, check_tweaks, claim, origin_of
from .console import console_here
from .controls import Controls, Trainers, control_of, lacking, weights_trained
from .outcome import tell_files, write_model
from .report import RichProgress, counted, plot, print_table, say, write_summary
from .result import Result, hands_out, parallel_of
from .run_folder import check_folder, finished, in_order, records, working_in, write_result
from .trackers import Trackers


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
        SettingError: A wrong recipe, splits that cannot be compared, another recipe's folder, one that was begun with
            other images, or one that another command works in.
        Stopped: SIGTERM came; a checkpoint is written, the same call continues. Not caught, it exits with code 143.
        TrainingError: A training's loss was NaN, an image cannot be read, or another process has died; finished rounds
            are kept.
        OSError: The folder cannot be written; what was written before is kept.
    """
    recipe = load_recipe(recipe, overrides)
    console = console or console_here()
    with working_in(recipe.folder, partial(say, console)), minding_workers():
        return _search(recipe, restart, console)


def _search(recipe: Recipe, restart: bool, console: Console) -> Result:
    folder, final = recipe.folder, recipe.folder / f"{recipe.name}.ticket"
    check_folder(folder, recipe, "search", restart)
    done = finished(folder, final)
    if done is not None and (missing := lacking(recipe, done["rows"])):
        say(console, f"{folder} is finished but for its controls: {', '.join(missing)}")
    elif done is not None:
        say(console, f"{folder} is finished; nothing to do (--restart searches again)")
        print_table(done["rows"], console)
        tell_files(folder, recipe, done["rows"], done["rows"][-1]["name"], console)
        return Result(folder, load_ticket(final), done["rows"])

    data, model = built(recipe, console)
    pruner = create_search(recipe, data, model, folder)
    learned, trainers = bool(pruner.subnet.gates), Trainers(recipe, model, data)
    pruner.parallel, pruner.processes_per_run = parallel_of(recipe, trainers), recipe.processes_per_run
    if trainers.of(trainers.parallel == "runs").splits:
        refuse_split(pruner.method)
    claim(folder, recipe, "search", data, console)  # only now: a recipe that cannot be built leaves no folder behind
    simple = [one for one in recipe.controls if one not in SEARCHED]
    extra = 1 + len(simple) - ("dense" in recipe.controls and bool(pruner.runs) and _as_long(recipe))
    trainings = None if pruner.runs is None else pruner.runs + extra
    with RichProgress(console, trainings, Trackers(recipe, folder)) as progress:
        for run in pruner:
            progress.replayed(pruner.replayed, folder)
            with apart(run.processes):
                trainers.of(run.processes is not None).fit(run, folder / run.name, progress)
            progress.end(run)
        progress.replayed(pruner.replayed, folder)
        ticket, subnet = pruner.ticket, pruner.subnet
        if learned:  # its parameters have changed: what was prepared is no longer the model
            if subnet.sealed:
                model = build_model(recipe, data.num_classes)
                subnet = Subnet(model, subnet.names)
            trainers = Trainers(recipe, model, data)
        name = _train_beside(recipe, data, pruner, ticket, subnet, trainers, progress)
    rows, control, why = _compared(recipe, pruner, name)
    if control is not None:
        ticket.metadata["dense"] = control["metrics"]

    def write(rows: list[dict[str, Any]]) -> None:
        ticket.save(final)
        write_summary(rows, folder)
        title = f"{recipe.name}: {recipe.model.model}, {recipe.pruner['name']}"
        plot(rows, folder / "accuracy.png", title, control)
        best = f"round_{pruner.rounds_done - 1:02d}" if pruner.method.ends_trained else name
        files = write_model(folder, name, recipe, data, subnet.model, best)
        write_result(folder, rows, ticket.fingerprint, files)

    if is_writer():
        write(rows)
    if searched := _search_beside(recipe, pruner, ticket, rows, console):
        rows = in_order([*rows, *searched])
        if is_writer():
            write(rows)
    if is_writer():
        print_table(rows, console, why)
        tell_files(folder, recipe, rows, name, console)
    return Result(folder, ticket, rows)


def _as_long(recipe: Recipe) -> bool:
    """Whether a search's runs are as long as the ticket's own training."""
    return recipe.pruner["epochs"] == recipe.ticket_epochs


def _train_beside(
    recipe: Recipe,
    data: Data,
    pruner: Pruner,
    ticket: Ticket,
    subnet: Subnet,
    trainers: Trainers,
    progress: RichProgress,
) -> str:
    """Train the ticket that a search has found, and its controls; the name of the ticket's own training."""
    last, trains = pruner.rounds_done, not pruner.method.ends_trained
    there = pruner.trained_dense and _as_long(recipe)
    wanted = [one for one in recipe.controls if one not in SEARCHED and (one != "dense" or not there)]
    epochs = in_all = recipe.ticket_epochs
    if "equal_epochs" in wanted:
        rows = decided(lambda: records(recipe.folder, pruner.history.lineage))
        in_all = weights_trained(recipe, [row for row in rows if row["round"] < last])
        if in_all == epochs and (there or "dense" in wanted):
            wanted.remove("equal_epochs")
            progress.say(
                f"equal_epochs: the ticket's weights are trained for {counted(in_all)} in all, as the dense network is "
                "too; it is not trained twice"
            )
    # Where runs were handed out, one group trains the ticket too: then no number depends on how many there were.
    count = len(wanted) + trains
    side_by_side = count > 1 and hands_out(pruner.parallel, count, trainers.groups)
    by_itself = pruner.handed_out or side_by_side
    processes = recipe.processes_per_run if by_itself else None
    plain = Controls(
        recipe.folder,
        trainers.of(by_itself),
        subnet,
        progress,
        ticket.metadata,
        epochs,
        processes=processes,
        follows=pruner.history.lineage[-1],
    )
    retrained = replace(plain, retrain=recipe.retrain)
    replace(retrained, pretrained=ticket.pretrained).train(
        name := f"round_{last:02d}",
        ticket.masks,
        ticket.values,
        pruner.runs_done,
        last,
        ticket.metadata["start_epoch"],
        train=trains,
    )
    for by, control in enumerate(wanted, 1):
        # Tweaks are the ticket's, and of what stands in its place.
        how = {"dense": plain, "equal_epochs": replace(plain, epochs=in_all)}.get(control, retrained)
        how.train(control, **vars(beside(control, recipe, data, pruner, ticket)), by=by)
    *_, ticket.metadata["metrics"] = plain.ended(*wanted, name)
    return name


def _search_beside(
    recipe: Recipe, pruner: Pruner, ticket: Ticket, rows: list[dict[str, Any]], console: Console
) -> list[dict[str, Any]]:
    """A row for each control that is a search of its own, now searched; as of its ticket's training."""
    found = []
    sparsity, epochs = reached(pruner.method, ticket.masks), epochs_spent(rows)
    for control in [one for one in recipe.controls if one in SEARCHED]:
        other = rival(control, recipe, recipe.folder, sparsity, epochs)
        if is_writer():
            say(console, f"{control}: {_told(other)}, in {other.folder}")
        found.append({**search(other, console=console).rows[-1], "name": control})
    return found


def _told(recipe: Recipe) -> str:
    pruner = recipe.pruner
    rate = f", pruning {pruner['prune_rate']:.4g} a round" if "prune_rate" in pruner else ""
    return f"{pruner['name']} to sparsity {pruner['sparsity']:.4g}{rate}, runs of {counted(pruner['epochs'])}"


def create_search(recipe: Recipe, data: Data, model: nn.Module, folder: Path | None) -> Pruner:
    """The recipe's pruner on its model, in a folder where it has one.

    Raises:
        SettingError: What the recipe trains with does not go with it.
    """
    pruner = create_pruner(recipe.pruner["name"], model, folder=folder, **recipe.method_settings)
    pruner.metadata |= origin_of(recipe, data, model)
    if pruner.method.ends_trained and recipe.retrain != RetrainSettings():
        raise SettingError(
            f"retrain: {pruner.method.name} ends with a trained ticket, which is not trained again; leave it out, or "
            "train the ticket on with `timm-tickets train`"
        )
    check_controls(recipe)
    check_tweaks(recipe, model)
    number, unit = rewind_parts(getattr(pruner.method, "rewind", None) or "0ep")
    if unit == "ep" and number >= pruner.method.epochs:
        warn(
            f"pruner.rewind: a run of {pruner.method.epochs} epochs ends without passing its rewind point "
            f"'{number}ep'; set one before its end"
        )
    if pruner.subnet.gates and recipe.training.model_ema:
        raise SettingError(
            f"training.model_ema: an average of soft masks is no mask; set it to false for {pruner.method.name}"
        )
    return pruner


def _compared(recipe: Recipe, pruner: Pruner, name: str) -> tuple[list[dict[str, Any]], dict[str, Any] | None, str]:
    """The rows of a search, and the dense network's that may be compared with the ticket; else why there is none.

    Args:
        recipe: The recipe.
        pruner: At the end of its search.
        name: Of the ticket's own training.
    """
    rows = records(recipe.folder, pruner.history.lineage)
    # A part's dense run, the first of COLT's, is another task.
    full = [row for row in rows if row["name"] == "dense" or (pruner.trained_dense and row["name"] != name)]
    return rows, *control_of(full, recipe.ticket_epochs, "dense" in recipe.controls)
