"""A ticket that is given, and its controls: what `train` and `transfer` do alike."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from ..config.parts import RetrainSettings
from ..config.recipe import CONTROLS, SEARCHED, Recipe, with_pruner
from ..core.errors import SettingError, unknown
from ..core.masks import full_masks
from ..core.patterns import parsed
from ..core.states import State
from ..data.datasets import Data
from ..pruning.registry import checked_method
from ..sparse.subnet import Subnet
from ..storage.files import is_writer
from ..structure.shuffled import random_masks, shuffled_layers
from ..structure.units import Pattern, Weights
from ..tickets.ticket import Ticket
from .baselines import SAME_START, Beside, other_start, rival
from .controls import Controls, Trainers
from .report import RichProgress, say
from .result import hands_out, parallel_of
from .run_folder import in_order, records
from .search import search
from .trackers import Trackers

# Of a search alone: how long that of a given ticket took, nobody knows.
_OF_A_SEARCH = ("equal_epochs", "equal_cost")


def check_names(controls: Sequence[str]) -> None:
    """Refuse names that are no control.

    Raises:
        SettingError: One is not.
    """
    for name in controls:
        if name not in (*CONTROLS, "native"):
            raise SettingError(unknown("control", name, (*CONTROLS, "native")))


def check_given(controls: Sequence[str], recipe: Recipe, ticket: Ticket | None, native: bool) -> None:
    """Refuse, before anything is trained, controls that a given ticket cannot have.

    Args:
        controls: Their names.
        recipe: The recipe that it is trained under.
        ticket: It; the dense network where None.
        native: Whether a ticket searched on the recipe's own task is a control.

    Raises:
        SettingError: It cannot; the message names those that it can.
    """
    if ticket is None and controls:
        raise SettingError(
            f"controls: {', '.join(controls)} cannot be had: they stand beside a ticket, and the dense network is "
            "trained alone; give a ticket, or controls=[]"
        )
    valid = [name for name in (*CONTROLS, *["native"] * native) if ticket and not _refused(name, recipe, ticket)]
    for name in controls:
        if ticket is not None and (why := _refused(name, recipe, ticket)):
            raise SettingError(f"controls: {name} cannot be had: {why}. There are {', '.join(valid)}")


def _refused(control: str, recipe: Recipe, ticket: Ticket) -> str:
    if control in _OF_A_SEARCH:
        return "how long the search of this ticket trained is not known; a search can have it, with the same setting"
    if control in SAME_START:
        try:
            kind = parsed(granularity_of(ticket)).kind
        except ValueError:
            kind = "unknown"
        if kind in ("channel", "head", "unknown"):
            return f"the ticket prunes units of kind {kind} as one, which only its search finds again"
    if control == "random_reinit" and (recipe.model.pretrained or recipe.model.initial_checkpoint is not None):
        return "the model begins with trained weights, and another random start has none such"
    if control == "one_shot" and not ticket.sparsity:
        return "the ticket prunes nothing"
    name = recipe.pruner["name"]
    if control == "equal_rate_imp" and checked_method(name, recipe.method_settings).round_rate() is None:
        return f"the recipe's pruner, {name}, does not prune at one rate, round by round"
    return ""


def granularity_of(ticket: Ticket) -> str:
    """What a ticket says was cut as one."""
    pruner = ticket.metadata.get("pruner")
    return str(pruner.get("granularity", "weight")) if isinstance(pruner, dict) else "weight"


def _simple(controls: Sequence[str]) -> list[str]:
    return [one for one in controls if one not in (*SEARCHED, "native")]


def shared_out(controls: Sequence[str], trainers: Trainers) -> bool:
    """Whether each group of processes trains its own of a ticket and its controls."""
    count = 1 + len(_simple(controls))
    return count > 1 and hands_out(parallel_of(trainers.recipe, trainers), count, trainers.groups)


def train_given(
    name: str,
    ticket: Ticket,
    trainers: Trainers,
    fresh: State,
    controls: Sequence[str],
    folder: Path,
    console: Console,
) -> list[dict[str, Any]]:
    """Train a ticket, and its controls from the recipe's own start; skip what is finished.

    Args:
        name: Of the ticket's training.
        ticket: It, fit for the model.
        trainers: Of the recipe that it is trained under, with its model and data.
        fresh: The state that the model begins with without a ticket.
        controls: Their names.
        folder: The run folder.
        console: Where progress goes.

    Returns:
        Their records, in order.
    """
    recipe, subnet = trainers.recipe, Subnet(trainers.model, tuple(ticket.masks))
    simple, by_itself = _simple(controls), shared_out(controls, trainers)
    trainer, processes = trainers.of(by_itself), recipe.processes_per_run if by_itself else None
    epochs = recipe.retrain.epochs or recipe.training.epochs
    with RichProgress(console, 1 + len(simple), Trackers(recipe, folder)) as progress:
        plain = Controls(folder, trainer, subnet, progress, ticket.metadata, epochs, processes=processes)
        retrained = replace(plain, retrain=recipe.retrain)
        start_epoch = ticket.metadata.get("start_epoch", 0.0)
        own = replace(retrained, pretrained=ticket.pretrained)
        own.train(name, ticket.masks, ticket.values, 0, 0, start_epoch)
        for by, control in enumerate(simple, 1):
            how = plain if control == "dense" else retrained
            how.train(control, **vars(_beside(control, recipe, trainers.data, ticket, subnet, fresh)), by=by)
        plain.ended(name, *simple)
    rows = records(folder)
    for control in [one for one in controls if one not in simple]:
        other = _native(recipe, folder) if control == "native" else rival(control, recipe, folder, ticket.sparsity, 1)
        if is_writer():
            say(console, f"{control}: a search of its own, in {other.folder}")
        rows.append({**search(other, console=console).rows[-1], "name": control})
    return in_order(rows)


def _beside(control: str, recipe: Recipe, data: Data, ticket: Ticket, subnet: Subnet, fresh: State) -> Beside:
    """What a control of a given ticket trains: from the recipe's own start, as nobody knows what was pruned of it."""
    if control == "dense":
        return Beside(full_masks(ticket.masks), fresh, 0)
    if control == "random_reinit":
        return Beside(ticket.masks, other_start(recipe, data), 0)
    kind, units = parsed(granularity_of(ticket)), Weights(subnet.standardised)
    if kind.kind != "weight":
        units = Pattern(kind, subnet.model, {name: tuple(mask.shape) for name, mask in ticket.masks.items()})
    draw = random_masks if control == "random_mask" else shuffled_layers
    return Beside(draw(units, ticket.masks, recipe.seed), fresh, 0)


def _native(recipe: Recipe, folder: Path) -> Recipe:
    others: dict[str, Any] = {"output": folder / "native", "label": None, "controls": ()}
    if checked_method(recipe.pruner["name"], recipe.method_settings).ends_trained:
        others["retrain"] = RetrainSettings()  # it is not trained again, with or without tweaks
    return with_pruner(recipe, recipe.pruner, others)
