"""Pruners by name: those in methods/, and those of other packages through the entry points ``timm_tickets.pruners``.

An entry point names a module; importing it runs its `register_pruner` decorators.
"""

import importlib
import pkgutil
import warnings
from collections.abc import Callable
from fnmatch import fnmatchcase
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, TypeVar

from pydantic.dataclasses import dataclass
from torch import nn
from typing_extensions import dataclass_transform

from . import methods
from .method import Method
from .pruner import Pruner
from .settings import SettingError, check, unknown

M = TypeVar("M", bound=type[Method])

_methods: dict[str, type[Method]] = {}


@dataclass_transform(kw_only_default=True, frozen_default=True)
def register_pruner(name: str) -> Callable[[M], M]:
    """Class decorator: make a `Method` available as a pruner under this name.

    The class becomes a frozen dataclass; its annotated fields are its settings and are checked when it is created.

    Raises:
        ValueError: The name is taken by another class.
    """

    def register(cls: M) -> M:
        taken = _methods.get(name)
        if taken is not None and (taken.__module__, taken.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(f"pruner {name!r} is registered already, by {taken.__module__}.{taken.__qualname__}")
        made: Any = dataclass(frozen=True, kw_only=True, config={"extra": "forbid"})(cls)
        made.name = name
        _methods[name] = made
        return made

    return register


@cache
def _load() -> None:
    for module in pkgutil.iter_modules(methods.__path__):
        importlib.import_module(f"{methods.__name__}.{module.name}")
    for point in entry_points(group="timm_tickets.pruners"):
        try:
            point.load()
        except Exception as error:  # another package's code: whatever it raises must not stop ours
            warnings.warn(f"the pruners of {point.value} cannot be loaded: {error!r}", stacklevel=2)


def list_pruners(filter: str = "*") -> list[str]:
    """Sorted names of the registered pruners that match a wildcard."""
    _load()
    return sorted(name for name in _methods if fnmatchcase(name, filter))


def get_method(name: str) -> type[Method]:
    """The class registered under a name.

    Raises:
        SettingError: There is none; the message names the closest.
    """
    _load()
    if name not in _methods:
        raise SettingError(unknown("pruner", name, _methods))
    return _methods[name]


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
    return Pruner(check(get_method(name), settings, "pruner"), model, folder)
