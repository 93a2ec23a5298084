"""What a search's controls train: which masks, from which start; or the recipe of a plainer search."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config.files import OF_EVERY_PRUNER
from ..config.recipe import CONTROLS, Recipe, with_pruner
from ..core.errors import SettingError
from ..core.lazy import Lazy
from ..core.masks import Masks, full_masks, keep_count
from ..core.seeds import seed_from
from ..core.states import State, as_bytes
from ..data.datasets import Data
from ..pruning.method import Method
from ..pruning.pruner import Pruner
from ..pruning.registry import checked_method, get_method, goes_on
from ..sparse.subnet import Subnet
from ..storage.files import stored_state
from ..structure.shuffled import random_masks, shuffled_layers
from ..tickets.ticket import Ticket
from ..training.build import build_model

_OTHER_START = 0x0543
SAME_START = ("random_mask", "shuffled_layers")


def check_controls(recipe: Recipe) -> None:
    """Refuse, before anything is trained, controls that would compare a ticket of this recipe with something else.

    Raises:
        SettingError: One would; the message names those that can be had.
    """
    wrong = {name: why for name in recipe.controls if (why := refused(recipe, name))}
    if wrong:
        valid = [name for name in CONTROLS if not refused(recipe, name)]
        raise SettingError(
            f"controls: {'; '.join(f'{name} cannot be had: {why}' for name, why in wrong.items())}. With pruner.name="
            f"{recipe.pruner['name']} there are {', '.join(valid)}"
        )


def refused(recipe: Recipe, control: str) -> str:
    """Why a control makes no sense beside this recipe's ticket; empty where it does."""
    name = recipe.pruner["name"]
    kind = get_method(name)
    if control in (*SAME_START, "random_reinit"):
        if not kind.trains_weights:
            return f"{name} trains no weights, only which are kept, and the control would train them"
        if not kind.ends_trained and goes_on(recipe.pruner) == "all":
            return f"{name} prunes while it trains, and its ticket goes on from these weights; others have none such"
    if control == "random_reinit" and (recipe.model.pretrained or recipe.model.initial_checkpoint is not None):
        return "the model begins with trained weights, and another random start has none such"
    rate = checked_method(name, recipe.method_settings).round_rate()
    own = {"one_shot": name == "imp" and (rate or 0) >= recipe.pruner["sparsity"], "equal_rate_imp": name == "imp"}
    if own.get(control, control == "equal_cost" and name == "gradual"):
        return f"it is {name} with these settings, as this recipe searches"
    if control == "equal_rate_imp" and rate is None:
        return f"{name} does not prune at one rate, round by round"
    if control == "one_shot" and not recipe.pruner["sparsity"]:
        return "with a sparsity of 0 nothing is pruned"
    return ""


@dataclass(frozen=True)
class Beside:
    """A training beside a ticket's.

    Attributes:
        masks: Bool, by parameter name.
        start: The state dict that it begins with; what the masks prune counts as zero.
        index: Its number: trainings of one number see the same images in the same order.
        round: Of a search, as in its record.
        start_epoch: Epochs of the schedule that lie before it.
    """

    masks: Mapping[str, Tensor]
    start: Mapping[str, Tensor]
    index: int
    round: int = 0
    start_epoch: float = 0.0


def beside(control: str, recipe: Recipe, data: Data, pruner: Pruner, ticket: Ticket) -> Beside:
    """What a control of a search trains.

    Args:
        control: Its name; of those that are no searches of their own.
        recipe: The recipe.
        data: Its data.
        pruner: At the end of its search.
        ticket: What it has found.

    Raises:
        SettingError: The ticket does not begin as the control would have to.
    """
    method, masks, seed = pruner.method, ticket.masks, recipe.seed
    # The training of the ticket's own weights: of a method that ends trained, its last run.
    index = pruner.runs_done - (method.ends_trained and pruner.runs_done > 0)
    if control in ("dense", "equal_epochs"):
        return Beside(full_masks(masks), pruner.first_state, 0)
    if control == "random_reinit":
        return Beside(masks, other_start(recipe, data), index)
    start = pruner.first_state if method.ends_trained else _whole_start(control, pruner, ticket)
    draw = random_masks if control == "random_mask" else shuffled_layers
    return Beside(draw(method.units, masks, seed), start, index, start_epoch=ticket.metadata["start_epoch"])


def other_start(recipe: Recipe, data: Data) -> State:
    """The recipe's model as another seed draws it."""
    other = recipe.model_copy(update={"seed": seed_from(recipe.seed, _OTHER_START)})
    return Subnet(build_model(other, data.num_classes), ()).state()


def _whole_start(control: str, pruner: Pruner, ticket: Ticket) -> Mapping[str, Tensor]:
    """The state that the ticket's values were cut from, from the search's folder, a tensor at a time.

    It is one of its rewind points, or what the search began with; and equal to the ticket in all that this keeps.
    """
    assert pruner.folder is not None
    scales = pruner.subnet.scales
    for path in (*sorted(pruner.folder.glob("round_*/rewind.safetensors")), None):
        state = pruner.first_state if path is None else stored_state(path)
        whole = Lazy(state, lambda name, state=state: state[name] * scales[name] if name in scales else state[name])
        if _cut_from(whole, pruner.subnet, ticket):
            return whole
    raise SettingError(
        f"controls: {control} cannot be had: {pruner.method.name}'s ticket begins with other values than those of the "
        "search's start or of a rewind point, so what a mask of other weights would begin with is not known; leave "
        "the control out"
    )


def _cut_from(whole: Mapping[str, Tensor], subnet: Subnet, ticket: Ticket) -> bool:
    pruned: Any = subnet.pruned_state(whole, ticket.masks)
    same = (torch.equal(as_bytes(pruned[name]), as_bytes(value)) for name, value in ticket.values.items())
    return whole.keys() == ticket.values.keys() and all(same)


def rival(control: str, recipe: Recipe, folder: Path, sparsity: float, epochs: int) -> Recipe:
    """The recipe of such a control: all as in a recipe, but for its pruner.

    Args:
        control: Its name.
        recipe: The recipe of the ticket.
        folder: The ticket's run folder; the control's is in it.
        sparsity: Of the ticket.
        epochs: What the search of the ticket and its training took together.
    """
    pruner = {key: value for key, value in recipe.pruner.items() if key in OF_EVERY_PRUNER} | {"sparsity": sparsity}
    retrain = recipe.retrain.model_copy(update={"epochs": recipe.ticket_epochs})
    rate = checked_method(recipe.pruner["name"], recipe.method_settings).round_rate()
    if control == "equal_cost":
        pruner |= {"name": "gradual", "epochs": epochs}
        retrain = type(retrain)()
    else:
        rewind = recipe.pruner.get("rewind") or "0ep"
        pruner |= {"name": "imp", "rewind": rewind, "prune_rate": sparsity if control == "one_shot" else rate}
        pruner |= {"scope": recipe.pruner["scope"]} if rate is not None else {}
    return with_pruner(recipe, pruner, {"output": folder / control, "label": None, "controls": (), "retrain": retrain})


def reached(method: Method, masks: Masks) -> float:
    """The sparsity that a control has to ask for to have as many weights as a ticket: its own, mostly the asked one."""
    if method.granularity != "weight" or method.kept(masks) == keep_count(method.total(masks), method.sparsity):
        return method.sparsity
    return 1 - method.kept(masks) / method.total(masks)


def epochs_spent(rows: Sequence[dict[str, Any]]) -> int:
    """Passes over all training images that a search and the training of its ticket took, by their steps."""
    full = [row["steps"] / row["epochs"] for row in rows if row["all_images"] and row["steps"]]
    steps = sum(row["steps"] for row in rows if row["name"] not in CONTROLS)
    return max(1, round(steps / max(full))) if full else 1
