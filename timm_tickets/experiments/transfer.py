"""Training a ticket under another recipe's data, beside its controls."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from accelerate.utils import set_seed
from rich.console import Console

from ..config.parts import RetrainSettings
from ..config.recipe import Recipe, load_recipe
from ..core.errors import SettingError, unknown
from ..core.masks import full_masks, shuffled_masks
from ..data.images import minding_workers
from ..pruning.registry import get_method
from ..sparse.subnet import Subnet
from ..storage.files import is_writer
from ..tickets.ticket import Ticket, load_ticket
from ..tickets.transfer import recompute_batch_norm_
from .begin import built, check_tweaks, claim, origin_of
from .console import console_here
from .controls import Controls, Trainers
from .outcome import tell_files, write_model
from .report import RichProgress, print_table, say, write_summary
from .result import Result, hands_out, parallel_of
from .run_folder import check_folder, records, working_in, write_result
from .search import search
from .trackers import Trackers

CONTROLS = ("dense", "shuffled_layers", "native")


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
            from the recipe's seed; ``shuffled_layers``, the same start under a random mask with the ticket's layer
            counts; ``native``, a ticket searched on the target itself.
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
    console = console or console_here()
    given = load_ticket(ticket)
    folder = recipe.output or Path("output") / f"{recipe.name}_transfer_{Path(ticket).stem}"
    with working_in(folder, partial(say, console)), minding_workers():
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
    trained = 1 + len({"dense", "shuffled_layers"}.intersection(controls))
    by_itself = hands_out(parallel_of(recipe, trainers), trained, trainers.groups)
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
    starts["shuffled_layers"] = (shuffled_masks(moved.masks, recipe.seed), fresh)
    starts["dense"] = (full_masks(moved.masks), fresh)
    wanted = [name for name in starts if name == "ticket" or name in controls]
    subnet, epochs = Subnet(model, tuple(moved.masks)), recipe.retrain.epochs or recipe.training.epochs
    with RichProgress(console, len(wanted), Trackers(recipe, folder)) as progress:
        beside = Controls(folder, trainer, subnet, progress, moved.metadata, epochs, processes=processes)
        for number, name in enumerate(wanted):
            retrain = RetrainSettings() if name == "dense" else recipe.retrain
            source = moved.pretrained if name == "ticket" else None
            replace(beside, retrain=retrain, pretrained=source).train(name, *starts[name], index=0, by=number)
        beside.ended(*wanted)
    rows, native_row = records(folder), []
    for row in rows:
        if row["name"] != "shuffled_layers" and row["epochs"] == epochs:
            moved.metadata["metrics" if row["name"] == "ticket" else "dense"] = row["metrics"]
    if "native" in controls:
        searched = search(native.model_copy(update={"output": folder / "native", "controls": ()}), console=console)
        native_row.append({**searched.rows[-1], "name": "native"})
    if is_writer():
        moved.save(folder / f"{recipe.name}.ticket")
        write_summary(rows, folder, native_row)
        files = write_model(folder, "ticket", recipe, data, subnet.model, "ticket")
        write_result(folder, [*rows, *native_row], moved.fingerprint, files)
        print_table([*rows, *native_row], console)
        tell_files(folder, recipe, [*rows, *native_row], "ticket", console)
    return Result(folder, moved, [*rows, *native_row])
