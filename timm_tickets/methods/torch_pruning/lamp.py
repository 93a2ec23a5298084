"""torch-pruning's LAMP.

Source: Lee et al. 2021, 2010.07611; torch-pruning's ``LAMPImportance``.
"""

from typing import Annotated, Any

from pydantic import Field

from ...core.masks import Scope
from ...pruning.registry import register_pruner
from .criterion import Criterion


@register_pruner("tp_lamp")
class TPLamp(Criterion):
    """Prune the channels of the smallest LAMP score, compared across layers, by torch-pruning's importance.

    Use: as `tp_magnitude`. Within a layer both order channels alike; LAMP is made to compare layers with one another.
    Cost: `rounds` trainings.
    Departures: groups are this package's.
    """

    scope: Annotated[Scope, Field(description="compare channels across all layers, or within each")] = "global"
    p: Annotated[int, Field(ge=1, description="norm: 1 for sums of absolute values, 2 for sums of squares")] = 2

    def importance(self, tp: Any) -> Any:
        return tp.importance.LAMPImportance(p=self.p)
