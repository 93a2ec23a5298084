"""Pruners and tweaks by name: those in methods/ and tweaks/, and those of other packages through entry points.

An entry point of the group ``timm_tickets.pruners`` or ``timm_tickets.tweaks`` names a module; importing it runs its
`register_pruner` or `register_tweak` decorators.
"""

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any, Generic, TypeVar

from pydantic.dataclasses import dataclass
from torch import nn
from typing_extensions import dataclass_transform

from . import methods, tweaks
from .method import Method
from .pruner import Pruner
from .settings import SettingError, check, unknown
from .sharded import reshard_
from .tweak import Tweak, Tweaks
from .warn import warn

C = TypeVar("C")
M = TypeVar("M", bound=type[Method])
W = TypeVar("W", bound=type[Tweak])


class _Registry(Generic[C]):
    """Classes by name, found when first asked for.

    Args:
        kind: What they are, in messages; ``timm_tickets.<kind>s`` is the group of their entry points.
        package: The subpackage whose modules register this package's own.
    """

    def __init__(self, kind: str, package: ModuleType):
        self.kind, self.package = kind, package
        self.classes: dict[str, type[C]] = {}
        self._loaded = False

    def add(self, name: str, cls: Any) -> Any:
        taken = self.classes.get(name)
        if taken is not None and (taken.__module__, taken.__qualname__) != (cls.__module__, cls.__qualname__):
            where = f"{taken.__module__}.{taken.__qualname__}"
            raise ValueError(f"{self.kind} {name!r} is registered already, by {where}")
        made: Any = dataclass(frozen=True, kw_only=True, config={"extra": "forbid"})(cls)
        made.name = name
        self.classes[name] = made
        return made

    def load(self) -> dict[str, type[C]]:
        if not self._loaded:
            self._loaded = True
            for module in pkgutil.iter_modules(self.package.__path__):
                importlib.import_module(f"{self.package.__name__}.{module.name}")
            for point in entry_points(group=f"timm_tickets.{self.kind}s"):
                try:
                    point.load()
                except Exception as error:  # another package's code: whatever it raises must not stop ours
                    warn(f"the {self.kind}s of {point.value} cannot be loaded: {error!r}")
        return self.classes

    def names(self, filter: str) -> list[str]:
        return sorted(name for name in self.load() if fnmatchcase(name, filter))

    def get(self, name: str) -> type[C]:
        if name not in self.load():
            raise SettingError(unknown(self.kind, name, self.classes))
        return self.classes[name]


_pruners: _Registry[Method] = _Registry("pruner", methods)
_tweaks: _Registry[Tweak] = _Registry("tweak", tweaks)


@dataclass_transform(kw_only_default=True, frozen_default=True)
def register_pruner(name: str) -> Callable[[M], M]:
    """Class decorator: make a `Method` available as a pruner under this name.

    The class becomes a frozen dataclass; its annotated fields are its settings and are checked when it is created.

    Raises:
        ValueError: The name is taken by another class.
    """
    return lambda cls: _pruners.add(name, cls)


@dataclass_transform(kw_only_default=True, frozen_default=True)
def register_tweak(name: str) -> Callable[[W], W]:
    """Class decorator: make a `Tweak` available under this name, as `register_pruner` does a method.

    Raises:
        ValueError: The name is taken by another class.
    """
    return lambda cls: _tweaks.add(name, cls)


def list_pruners(filter: str = "*") -> list[str]:
    """Sorted names of the registered pruners that match a wildcard."""
    return _pruners.names(filter)


def list_tweaks(filter: str = "*") -> list[str]:
    """Sorted names of the registered retraining tweaks that match a wildcard."""
    return _tweaks.names(filter)


def get_method(name: str) -> type[Method]:
    """The class of a pruner.

    Raises:
        SettingError: There is none of this name; the message names the closest.
    """
    return _pruners.get(name)


def get_tweak(name: str) -> type[Tweak]:
    """The class of a tweak.

    Raises:
        SettingError: There is none of this name; the message names the closest.
    """
    return _tweaks.get(name)


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


def create_tweaks(model: nn.Module, tweaks: Sequence[str] | Mapping[str, Mapping[str, Any]]) -> Tweaks:
    """Put retraining tweaks on a model for one training; it is the plain model again when that ends.

    Args:
        model: The model to train, usually with a ticket applied; before ``torch.compile`` and DDP, or inside them.
        tweaks: Registered names, or the settings of each by name.

    Raises:
        SettingError: An unknown tweak or setting, or a tweak that this model cannot have; the model is unchanged.
    """
    if tweaks and reshard_(model):
        raise SettingError(
            "tweaks: FSDP2 has split this model, and they need it whole; leave them out, or train with DDP"
        )
    return Tweaks(model, checked_tweaks(tweaks))


def checked_tweaks(tweaks: Sequence[str] | Mapping[str, Mapping[str, Any]]) -> list[Tweak]:
    """Tweaks from their names, or from the settings of each by name.

    Raises:
        SettingError: An unknown tweak or setting.
    """
    named = isinstance(tweaks, Mapping)
    if not named and (isinstance(tweaks, str) or not isinstance(tweaks, Sequence)):
        raise SettingError(f"tweaks: {tweaks!r} is not valid; give a list of names, or settings by name")
    settings = dict(tweaks) if named else dict.fromkeys(map(str, tweaks))
    for name, given in settings.items():
        if given is not None and not isinstance(given, Mapping):
            raise SettingError(f"tweaks.{name}: {given!r} is not valid; give its settings by name, or {{}}")
    return [check(get_tweak(name), given or {}, f"tweaks.{name}") for name, given in settings.items()]
