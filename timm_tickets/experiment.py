"""Experiments: a recipe searched, or a ticket trained, in a run folder that the same command continues.

The folder holds the resolved recipe, one folder a round (its ticket, its trained weights as a plain timm checkpoint,
``run.json`` written last), the final ticket, summary.csv and the plot.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from accelerate.utils import set_seed
from rich.console import Console

from .adapt import recompute_batch_norm_
from .begin import built, check_tweaks, claim, origin_of
from .build import build_model
from .files import is_writer
from .images import minding_workers
from .masks import full_masks, shuffled_masks
from .processes import apart
from .prunable import prunable_names
from .pruner import Parallel, refuse_split
from .recipe import Recipe, RetrainSettings, load_recipe
from .registry import create_pruner, get_method
from .report import RichProgress, plot, print_table, write_summary
from .run_folder import check_folder, finished, records, working_in, write_result
from .settings import SettingError, unknown
from .subnet import Subnet
from .ticket import Ticket, load_ticket
from .trainer import Trainer
from .trainings import Trainers, Trainings, control_of


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
        SettingError: A wrong recipe, splits that cannot be compared, another recipe's folder, one that was begun with
            other images, or one that another command works in.
        Stopped: SIGTERM came; a checkpoint is written, the same call continues. Not caught, it exits with code 143.
        TrainingError: A training's loss was NaN, an image cannot be read, or another process has died; finished rounds
            are kept.
        OSError: The folder cannot be written; what was written before is kept.
    """
    recipe = load_recipe(recipe, overrides)
    console = console or Console()
    with working_in(recipe.folder, partial(console.print, soft_wrap=True)), minding_workers():
        return _search(recipe, restart, console)


def _search(recipe: Recipe, restart: bool, console: Console) -> Result:
    folder, final = recipe.folder, recipe.folder / f"{recipe.name}.ticket"
    check_folder(folder, recipe, "search", restart)
    if (done := finished(folder, final)) is not None:
        console.print(f"{folder} is finished; nothing to do (--restart searches again)", soft_wrap=True)
        print_table(done["rows"], console)
        return Result(folder, load_ticket(final), done["rows"])

    data, model = built(recipe, console)
    pruner = create_pruner(recipe.pruner["name"], model, folder=folder, **recipe.method_settings)
    pruner.metadata |= origin_of(recipe, data, model)
    if pruner.method.ends_trained and recipe.retrain != RetrainSettings():
        raise SettingError(
            f"retrain: {pruner.method.name} ends with a trained ticket, which is not trained again; leave it out, or "
            "train the ticket on with `timm-tickets train`"
        )
    check_tweaks(recipe, model)
    learned = bool(pruner.subnet.gates)
    if learned and recipe.training.model_ema:
        raise SettingError(
            f"training.model_ema: an average of soft masks is no mask; set it to false for {pruner.method.name}"
        )
    trainers = Trainers(recipe, model, data)
    pruner.parallel, pruner.processes_per_run = _parallel(recipe, trainers), recipe.processes_per_run
    if trainers.of(recipe.parallel == "runs").splits:
        refuse_split(pruner.method)
    claim(folder, recipe, "search", data, console)  # only now: a recipe that cannot be built leaves no folder behind
    subnet, epochs = pruner.subnet, recipe.ticket_epochs
    as_long = recipe.pruner["epochs"] == epochs
    extra = 1 if pruner.runs and as_long else 2  # the ticket's own training, and a dense one where no run is as long
    with RichProgress(console, None if pruner.runs is None else pruner.runs + extra) as progress:
        for run in pruner:
            progress.replayed(pruner.replayed, folder)
            with apart(run.processes):
                trainers.of(run.processes is not None).fit(run, folder / run.name, progress)
            progress.end(run)
        progress.replayed(pruner.replayed, folder)
        ticket = pruner.ticket
        if learned:  # its parameters have changed: what was prepared is no longer the model
            if subnet.sealed:
                model = build_model(recipe, data.num_classes)
                subnet = Subnet(model, subnet.names)
            trainers = Trainers(recipe, model, data)
        # Where runs were handed out, one group trains the ticket too: then no number depends on how many there were.
        dense = recipe.dense and not (pruner.trained_dense and as_long)
        side_by_side = dense and not pruner.method.ends_trained and hands_out(pruner.parallel, 2, trainers.groups)
        by_itself = pruner.handed_out or side_by_side
        processes = recipe.processes_per_run if by_itself else None
        experiment = Trainings(
            folder, trainers.of(by_itself), subnet, progress, ticket.metadata, epochs, processes=processes
        )
        experiment = replace(experiment, follows=pruner.lineage[-1])
        if dense:
            experiment.train("dense", full_masks(subnet.weights()), pruner.first_state, index=0, by=1)
        experiment = replace(experiment, retrain=recipe.retrain, pretrained=ticket.pretrained)
        last = pruner.rounds_done
        experiment.train(
            name := f"round_{last:02d}",
            ticket.masks,
            ticket.values,
            pruner.runs_done,
            last,
            ticket.metadata["start_epoch"],
            train=not pruner.method.ends_trained,
        )
        *_, ticket.metadata["metrics"] = experiment.ended(*(["dense"] if dense else []), name)
    rows = records(folder, pruner.lineage)
    # A part's dense run, the first of COLT's, is another task.
    full = [row for row in rows if row["name"] == "dense" or (pruner.trained_dense and row["name"] != name)]
    control, why = control_of(full, epochs, recipe.dense)
    if control is not None:
        ticket.metadata["dense"] = control["metrics"]
    if is_writer():
        ticket.save(final)
        write_summary(rows, folder / "summary.csv")
        title = f"{recipe.name}: {recipe.model.model}, {recipe.pruner['name']}"
        plot(rows, folder / "accuracy.png", title, control)
        write_result(folder, rows, ticket.fingerprint)
        print_table(rows, console)
        if why:
            console.print(why, soft_wrap=True)
        size = f"{final.stat().st_size:,} bytes"
        console.print(f"ticket: {final} (sparsity {ticket.sparsity:.4f}, {size})", soft_wrap=True)
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
        SettingError, TrainingError, OSError: As `search`.
    """
    recipe = load_recipe(recipe, overrides)
    console = console or Console()
    given = None if ticket is None else load_ticket(ticket)
    stem = "dense" if ticket is None else Path(ticket).stem
    folder = recipe.output or Path("output") / f"{recipe.name}_train_{stem}"
    with working_in(folder, partial(console.print, soft_wrap=True)), minding_workers():
        return _train(recipe, given, folder, restart, console)


def _train(recipe: Recipe, given: Ticket | None, folder: Path, restart: bool, console: Console) -> Result:
    kind = "training of dense" if given is None else f"training of ticket {given.fingerprint}"
    check_folder(folder, recipe, kind, restart)
    data, model = built(recipe, console)
    if given is None:
        # The masks of the dense network name the weights that the recipe's pruner would prune.
        names = prunable_names(model, *(recipe.pruner[key] for key in ("include", "exclude", "classifier")))
        given = Ticket.of(model, full_masks(Subnet(model, names).weights()), origin_of(recipe, data, model))
    given.apply_(model)
    check_tweaks(recipe, model)
    if (done := finished(folder)) is not None:
        console.print(f"{folder} is finished; nothing to do (--restart trains again)", soft_wrap=True)
    else:
        trainer = Trainer(recipe, model, data)
        claim(folder, recipe, kind, data, console)
        subnet, epochs = Subnet(model, tuple(given.masks)), recipe.retrain.epochs or recipe.training.epochs
        with RichProgress(console, 1) as progress:
            more = (epochs, recipe.retrain, given.pretrained)
            experiment = Trainings(folder, trainer, subnet, progress, given.metadata, *more)
            experiment.train("round_00", given.masks, given.values, 0, 0, given.metadata.get("start_epoch", 0.0))
            experiment.ended("round_00")
        done = {"rows": records(folder), "fingerprint": given.fingerprint}
        if is_writer():
            write_summary(done["rows"], folder / "summary.csv")
            write_result(folder, **done)
    print_table(done["rows"], console)
    return Result(folder, given, done["rows"])


CONTROLS = ("dense", "random", "native")


def transfer(
    recipe: str | Path | Recipe,
    ticket: str | Path,
    overrides: Sequence[str] = (),
    *,
    controls: Sequence[str] = CONTROLS,
    recompute_batch_norm: bool = False,
    restart: bool = False,
    console: Console | None = None,
) -> Result:
    """Train a ticket found elsewhere under a recipe's data, which may have other classes, channels or image size.

    The run folder is the recipe's ``output``, else ``output/<recipe>_transfer_<ticket>``.

    Args:
        recipe: The target's recipe; its pruner is what the control `native` searches with.
        ticket: The ticket's file.
        overrides: Settings like ``training.epochs=20``.
        controls: What is trained beside it, each with the same images in the same order: ``dense``, the whole network
            from the recipe's seed; ``random``, the same start under a random mask with the ticket's layer counts;
            ``native``, a ticket searched on the target itself.
        recompute_batch_norm: Begin with batch-norm statistics of the target's training images.
        restart: Delete what an earlier transfer left in the folder, and begin again.
        console: Where progress and tables go; standard output where None.

    Returns:
        The transferred ticket and a row each for it (``ticket``) and its controls.

    Raises:
        TicketError: The ticket cannot be read, or does not correspond to the target's model.
        SettingError, TrainingError, OSError: As `search`.
    """
    for control in controls:
        if control not in CONTROLS:
            raise SettingError(unknown("control", control, CONTROLS))
    recipe = load_recipe(recipe, overrides)
    console = console or Console()
    given = load_ticket(ticket)
    folder = recipe.output or Path("output") / f"{recipe.name}_transfer_{Path(ticket).stem}"
    with working_in(folder, partial(console.print, soft_wrap=True)), minding_workers():
        return _transfer(recipe, given, folder, controls, recompute_batch_norm, restart, console)


def _transfer(
    recipe: Recipe,
    given: Ticket,
    folder: Path,
    controls: Sequence[str],
    recompute_batch_norm: bool,
    restart: bool,
    console: Console,
) -> Result:
    kind = f"transfer of ticket {given.fingerprint}" + ", batch norm recomputed" * recompute_batch_norm
    check_folder(folder, recipe, kind, restart)
    data, model = built(recipe, console)
    check_tweaks(recipe, model)
    native = recipe
    if get_method(recipe.pruner["name"]).ends_trained:  # it is not trained again, with or without tweaks
        native = recipe.model_copy(update={"retrain": RetrainSettings()})
    if restart and "native" in controls:
        check_folder(folder / "native", native, "search", restart)
    fresh = Subnet(model, ()).state()
    moved = given.transfer_(model)
    trainers = Trainers(recipe, model, data)
    trained = 1 + len({"dense", "random"}.intersection(controls))
    by_itself = hands_out(_parallel(recipe, trainers), trained, trainers.groups)
    trainer, processes = trainers.of(by_itself), recipe.processes_per_run if by_itself else None
    claim(folder, recipe, kind, data, console)
    if recompute_batch_norm:
        device = trainer.accelerator.device
        images = (images.to(device) for images, _ in trainer.train_loader)
        set_seed(recipe.seed)
        recompute_batch_norm_(model, images)
        moved = replace(Ticket.of(model, moved.masks, moved.metadata), pretrained=moved.pretrained)
    moved.metadata |= origin_of(recipe, data, model)
    starts = {"ticket": (moved.masks, moved.values)}
    starts["random"] = (shuffled_masks(moved.masks, recipe.seed), fresh)
    starts["dense"] = (full_masks(moved.masks), fresh)
    wanted = [name for name in starts if name == "ticket" or name in controls]
    subnet, epochs = Subnet(model, tuple(moved.masks)), recipe.retrain.epochs or recipe.training.epochs
    with RichProgress(console, len(wanted)) as progress:
        experiment = Trainings(folder, trainer, subnet, progress, moved.metadata, epochs, processes=processes)
        for number, name in enumerate(wanted):
            retrain = RetrainSettings() if name == "dense" else recipe.retrain
            source = moved.pretrained if name == "ticket" else None
            replace(experiment, retrain=retrain, pretrained=source).train(name, *starts[name], index=0, by=number)
        experiment.ended(*wanted)
    rows = records(folder)
    for row in rows:
        if row["name"] != "random" and row["epochs"] == epochs:
            moved.metadata["metrics" if row["name"] == "ticket" else "dense"] = row["metrics"]
    if "native" in controls:
        searched = search(native.model_copy(update={"output": folder / "native", "dense": False}), console=console)
        rows.append({**searched.rows[-1], "name": "native"})
    if is_writer():
        moved.save(folder / f"{recipe.name}.ticket")
        write_summary(rows, folder / "summary.csv")
        write_result(folder, rows, moved.fingerprint)
        print_table(rows, console)
    return Result(folder, moved, rows)


def _parallel(recipe: Recipe, trainers: Trainers) -> Parallel:
    """The recipe's, but that what spans the processes, a split model or synchronised statistics, is not handed out."""
    spans = trainers.of(recipe.parallel == "runs").splits or recipe.training.sync_bn
    return "data" if spans and recipe.parallel == "auto" else recipe.parallel


def hands_out(parallel: Parallel, count: int, groups: int) -> bool:
    """Whether each group trains its own of so many independent trainings, instead of all processes each together."""
    return groups > 1 and (parallel == "runs" or (parallel == "auto" and count >= groups))
