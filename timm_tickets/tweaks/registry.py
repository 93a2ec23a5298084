"""Tweaks by name."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from torch import nn
from typing_extensions import dataclass_transform

from ..core.errors import SettingError, check
from ..core.registry import Registry
from ..distributed.fsdp2 import reshard_
from .base import Tweak, Tweaks

W = TypeVar("W", bound=type[Tweak])

_tweaks: Registry[Tweak] = Registry("tweak", "timm_tickets.tweaks")


@dataclass_transform(kw_only_default=True, frozen_default=True)
def register_tweak(name: str) -> Callable[[W], W]:
    """Class decorator: make a `Tweak` available under this name, as `register_pruner` does a method.

    Raises:
        ValueError: The name is taken by another class.
    """
    return lambda cls: _tweaks.add(name, cls)


def list_tweaks(filter: str = "*") -> list[str]:
    """Sorted names of the registered retraining tweaks that match a wildcard."""
    return _tweaks.names(filter)


def get_tweak(name: str) -> type[Tweak]:
    """The class of a tweak.

    Raises:
        SettingError: There is none of this name; the message names the closest.
    """
    return _tweaks.get(name)


def create_tweaks(model: nn.Module, tweaks: Sequence[str] | Mapping[str, Mapping[str, Any]]) -> Tweaks:
    """Put retraining tweaks on a model for one training; it is the plain model again when that ends.

    Args:
        model: The model to train, usually with a ticket applied; before ``torch.compile`` and DDP, or inside them.
        tweaks: Registered names, or the settings of each by name.

    Raises:
        SettingError: An unknown tweak or setting, or a tweak that this model cannot have; the model is unchanged.
    """
    if not isinstance(model, nn.Module):
        raise SettingError(f"model: a {type(model).__name__} is no model; write create_tweaks(model, tweaks)")
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
