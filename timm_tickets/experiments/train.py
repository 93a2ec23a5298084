"""Training a recipe's ticket, or its dense network."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from rich.console import Console

from ..config.recipe import Recipe, load_recipe
from ..core.masks import full_masks
from ..data.images import minding_workers
from ..sparse.prunable import prunable_names
from ..sparse.subnet import Subnet
from ..storage.files import is_writer
from ..tickets.ticket import Ticket, load_ticket
from .begin import built, check_tweaks, claim, origin_of
from .console import console_here
from .controls import Trainers
from .given import check_given, shared_out, train_given
from .outcome import tell_files, write_model
from .report import print_table, say, write_summary
from .result import Result
from .run_folder import check_folder, finished, working_in, write_result


def train(
    recipe: str | Path | Recipe,
    ticket: str | Path | None = None,
    overrides: Sequence[str] = (),
    *,
    restart: bool = False,
    console: Console | None = None,
) -> Result:
    """Train a ticket, or the dense network where none is given, under a recipe's data and training.

    The run folder is the recipe's ``output``, else ``output/<recipe>_train_<ticket>``. Beside a ticket the recipe's
    ``controls`` are trained, where it has any; those that are masks begin with the recipe's own start.

    Raises:
        TicketError: The ticket cannot be read, or is for another architecture.
        SettingError, TrainingError, OSError: As `search`.
    """
    recipe = load_recipe(recipe, overrides)
    console = console or console_here()
    given = None if ticket is None else load_ticket(ticket)
    stem = "dense" if ticket is None else Path(ticket).stem
    folder = recipe.output or Path("output") / f"{recipe.name}_train_{stem}"
    controls = recipe.chosen_controls or ()
    if given is not None or controls != ("dense",):
        check_given(controls, recipe, given, native=False)
    with working_in(folder, partial(say, console)), minding_workers():
        return _train(recipe, given, folder, controls if given is not None else (), restart, console)


def _train(
    recipe: Recipe, given: Ticket | None, folder: Path, controls: Sequence[str], restart: bool, console: Console
) -> Result:
    kind = "training of dense" if given is None else f"training of ticket {given.fingerprint}"
    check_folder(folder, recipe, kind, restart)
    data, model = built(recipe, console)
    fresh = Subnet(model, ()).state() if controls else {}
    if given is None:
        # The masks of the dense network name the weights that the recipe's pruner would prune.
        names = prunable_names(model, *(recipe.pruner[key] for key in ("include", "exclude", "classifier")))
        given = Ticket.of(model, full_masks(Subnet(model, names).weights()), origin_of(recipe, data, model))
    given.apply_(model)
    check_tweaks(recipe, model)
    done = finished(folder)
    missing = [one for one in controls if done is not None and one not in [row["name"] for row in done["rows"]]]
    if done is not None and not missing:
        say(console, f"{folder} is finished; nothing to do (--restart trains again)")
    else:
        if missing:
            say(console, f"{folder} is finished but for its controls: {', '.join(missing)}")
        trainers = Trainers(recipe, model, data)
        trainers.of(shared_out(controls, trainers))
        claim(folder, recipe, kind, data, console)
        rows = train_given("round_00", given, trainers, fresh, controls, folder, console)
        done = {"rows": rows, "fingerprint": given.fingerprint}
        if is_writer():
            write_summary(done["rows"], folder)
            files = write_model(folder, "round_00", recipe, data, model, "round_00")
            write_result(folder, **done, files=files)
    print_table(done["rows"], console)
    tell_files(folder, recipe, done["rows"], "round_00", console)
    return Result(folder, given, done["rows"])
