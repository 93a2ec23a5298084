"""`distributed.processes` under the name that is documented."""

from .distributed.processes import *  # noqa: F403
