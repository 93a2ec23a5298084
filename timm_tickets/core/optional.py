"""Libraries that only a part of this package needs: asked for by name where they are missing."""

import importlib
from importlib.metadata import version
from typing import Any

from packaging.version import Version

from .errors import SettingError

TORCH_PRUNING = "1.6"  # the first whose groups, importances and regularisers are as they are used here


def torch_pruning(what: str) -> Any:
    """The library torch-pruning.

    Args:
        what: What needs it, in the message.

    Raises:
        SettingError: It is not installed, or too old.
    """
    install = "pip install 'timm-tickets[torch-pruning]'"
    try:
        found: Any = importlib.import_module("torch_pruning")
    except ImportError as error:
        if error.name != "torch_pruning":  # it is there, and something else is wrong with it
            raise
        raise SettingError(f"{what} needs torch-pruning, which is not installed: {install}") from None
    installed = version("torch-pruning")  # 1.6.0 itself does not say
    if Version(installed) < Version(TORCH_PRUNING):
        told = f"{what} needs torch-pruning {TORCH_PRUNING} or later, and {installed} is installed"
        raise SettingError(f"{told}: {install}")
    return found
