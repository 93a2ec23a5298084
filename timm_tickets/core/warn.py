"""Warnings that point at the user's line, however deep in the package their reason was found."""

import inspect
import warnings
from types import FrameType

# Where a call of ours passes through on its way from the user's line: optimizer hooks, context managers.
_BETWEEN = {"timm_tickets", "torch", "accelerate", "contextlib", "pydantic"}


def warn(text: str) -> None:
    """Warn (UserWarning) at the line that called this package."""
    frame: FrameType | None = inspect.currentframe()
    level = 1
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _BETWEEN:
        frame, level = frame.f_back, level + 1
    warnings.warn(text, stacklevel=level)
