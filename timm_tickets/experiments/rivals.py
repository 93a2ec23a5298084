"""Controls that are searches of their own: recipes of plainer methods for the ticket's sparsity, or its cost."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..config.files import OF_EVERY_PRUNER
from ..config.recipe import CONTROLS, Recipe, with_pruner
from ..core.masks import Masks, keep_count
from ..pruning.method import Method
from ..pruning.registry import checked_method


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
