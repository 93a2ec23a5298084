"""Training a ticket under another recipe's data, beside its controls."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from accelerate.utils import set_seed
from rich.console import Console

from ..config.recipe import Recipe, load_recipe
from ..data.images import minding_workers
from ..sparse.subnet import Subnet
from ..storage.files import is_writer
from ..tickets.ticket import Ticket, load_ticket
from ..tickets.transfer import recompute_batch_norm_
from .begin import built, check_tweaks, claim, origin_of
from .console import console_here
from .controls import Trainers
from .given import check_given, check_names, granularity_of, shared_out, train_given
from .outcome import tell_files, write_model
from .report import print_table, say, write_summary
from .result import Result
from .run_folder import check_folder, working_in, write_result

CONTROLS = ("dense", "shuffled_layers", "native")  # where nobody has chosen any


def transfer(
    recipe: str | Path | Recipe,
    ticket: str | Path,
    overrides: Sequence[str] = (),
    *,
    controls: Sequence[str] | None = None,
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
        controls: What is trained beside it, each with the same images in the same order: those of a recipe, which begin
            with the recipe's own start here, and ``native``, a ticket searched on the target itself. Where None, the
            recipe's; where that has none either, ``dense``, ``shuffled_layers`` and ``native``.
        recompute_batch_norm: Begin with batch-norm statistics of the target's training images.
        restart: Delete what an earlier transfer left in the folder, and begin again.
        console: Where progress and tables go; standard output where None.

    Returns:
        The transferred ticket and a row each for it (``ticket``) and its controls.

    Raises:
        TicketError: The ticket cannot be read, or does not correspond to the target's model.
        SettingError, TrainingError, OSError: As `search`.
    """
    check_names(controls or ())
    recipe = load_recipe(recipe, overrides)
    console = console or console_here()
    given = load_ticket(ticket)
    if controls is None and (controls := recipe.chosen_controls) is None:
        structured = granularity_of(given) in ("channel", "head")  # of which single weights are no control
        controls = [one for one in CONTROLS if not (structured and one == "shuffled_layers")]
    check_given(controls, recipe, given, native=True)
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
    fresh = Subnet(model, ()).state()
    moved = given.transfer_(model)
    trainers = Trainers(recipe, model, data)
    trainer = trainers.of(shared_out(controls, trainers))
    claim(folder, recipe, kind, data, console)
    if recompute_batch_norm:
        device = trainer.accelerator.device
        images = (images.to(device) for images, _ in trainer.train_loader)
        set_seed(recipe.seed)
        recompute_batch_norm_(model, images)
        moved = replace(Ticket.of(model, moved.masks, moved.metadata), pretrained=moved.pretrained)
    moved.metadata |= origin_of(recipe, data, model)
    rows = train_given("ticket", moved, trainers, fresh, controls, folder, console)
    epochs = recipe.retrain.epochs or recipe.training.epochs
    for row in rows:
        if row["name"] in ("ticket", "dense") and row["epochs"] == epochs:
            moved.metadata["metrics" if row["name"] == "ticket" else "dense"] = row["metrics"]
    if is_writer():
        moved.save(folder / f"{recipe.name}.ticket")
        write_summary(rows, folder)
        files = write_model(folder, "ticket", recipe, data, model, "ticket")
        write_result(folder, rows, moved.fingerprint, files)
        print_table(rows, console)
        tell_files(folder, recipe, rows, "ticket", console)
    return Result(folder, moved, rows)
