"""`core.masks` under the name that is documented."""

from .core.masks import *  # noqa: F403
