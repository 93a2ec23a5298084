"""`core.scores` under the name that is documented."""

from .core.scores import *  # noqa: F403
