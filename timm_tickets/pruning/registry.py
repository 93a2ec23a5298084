"""Pruners by name: those in methods/, and those of other packages through entry points.

An entry point of the group ``timm_tickets.pruners`` names a module; importing it runs its `register_pruner` decorators.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from torch import nn
from typing_extensions import dataclass_transform

from ..core.errors import SettingError, check
from ..core.registry import Registry
from .method import Method
from .pruner import Pruner
from .run import rewind_parts

M = TypeVar("M", bound=type[Method])


_pruners: Registry[Method] = Registry("pruner", "timm_tickets.methods")


@dataclass_transform(kw_only_default=True, frozen_default=True)
def register_pruner(name: str) -> Callable[[M], M]:
    """Class decorator: make a `Method` available as a pruner under this name.

    The class becomes a frozen dataclass; its annotated fields are its settings and are checked when it is created.

    Raises:
        ValueError: The name is taken by another class.
    """
    return lambda cls: _pruners.add(name, cls)


def list_pruners(filter: str = "*") -> list[str]:
    """Sorted names of the registered pruners that match a wildcard."""
    return _pruners.names(filter)


def get_method(name: str) -> type[Method]:
    """The class of a pruner.

    Raises:
        SettingError: There is none of this name; the message names the closest.
    """
    return _pruners.get(name)


def checked_method(name: str, settings: Mapping[str, Any]) -> Method:
    """A pruner's settings, checked; one that only other pruners have is told with their names.

    Raises:
        SettingError: There is no such pruner, or a setting is wrong.
    """

    def hint(key: str) -> str:
        having = [one for one in list_pruners() if key in getattr(get_method(one), "__pydantic_fields__", {})]
        return f"it is a setting of {' and '.join(having)}, not of {name}; leave it out." if having else ""

    return check(get_method(name), settings, "pruner", hint)


def goes_on(pruner: Mapping[str, Any], steps: int = 0) -> Literal["all", "first"] | None:
    """Which of a search's runs have trained the weights that its ticket begins with: all, the first, none.

    Args:
        pruner: Its name and settings.
        steps: Of the first run, where they are known.
    """
    if get_method(pruner["name"]).ends_trained or pruner.get("rewind", "0ep") is None:
        return "all"
    number, unit = rewind_parts(str(pruner.get("rewind", "0ep")))
    end = pruner["epochs"] if unit == "ep" else steps  # a rewind point that the run has not passed is its end
    return "first" if 0 < end <= number else None


def trained_before(pruner: Mapping[str, Any], runs: Sequence[tuple[int, int]]) -> int:
    """Epochs that a ticket's first weights were trained for in its search, by the runs that they come from.

    Args:
        pruner: Its name and settings.
        runs: Epochs and steps of one run a round, in order; of those that took steps.
    """
    on = goes_on(pruner, runs[0][1] if runs else 0)
    return sum(epochs for epochs, _ in (runs if on == "all" else runs[:1] if on == "first" else ()))


def create_pruner(name: str, model: nn.Module, *, folder: str | Path | None = None, **settings: Any) -> Pruner:
    """Bind a method to a model.

    Args:
        name: A registered name; `list_pruners` has them.
        model: The model to prune, in place.
        folder: Where finished runs are written down; created again on the same folder, the pruner replays them and
            asks only for the rest. It starts from the weights it was first given.
        **settings: ``sparsity`` (fraction to prune, in [0, 1)), ``epochs`` of one run, and the method's own.

    Raises:
        SettingError: An unknown pruner or setting, a value out of range, nothing to prune in the model, or a sparsity
            that its prunable weights cannot reach.
    """
    if not isinstance(model, nn.Module):
        raise SettingError(
            f"model: a {type(model).__name__} is no model; write create_pruner(name, model, ...), the name first"
        )
    if any(parameter.is_meta for parameter in model.parameters()):
        raise SettingError("model: its weights are on the meta device, which holds none; build it on the CPU or a GPU")
    return Pruner(checked_method(name, settings), model, folder)
