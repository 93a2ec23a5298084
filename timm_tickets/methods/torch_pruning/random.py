"""torch-pruning's random importance.

Source: torch-pruning's ``RandomImportance``.
"""

from typing import Any

from ...pruning.registry import register_pruner
from .criterion import Criterion


@register_pruner("tp_random")
class TPRandom(Criterion):
    """Prune channels at random, by torch-pruning's importance: the control of its other criteria.

    Cost: `rounds` trainings.
    Departures: drawn from the seed, whatever else has drawn random numbers before.
    """

    def importance(self, tp: Any) -> Any:
        return tp.importance.RandomImportance()
