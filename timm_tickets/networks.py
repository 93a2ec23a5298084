"""`sparse.networks` under the name that is documented."""

from .sparse.networks import *  # noqa: F403
