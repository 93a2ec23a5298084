"""torch-pruning's group magnitude.

Source: Fang et al. 2023 (DepGraph), 2301.12900; torch-pruning's ``MagnitudeImportance``.
"""

from typing import Annotated, Any

from pydantic import Field

from ...pruning.registry import register_pruner
from .criterion import Criterion


@register_pruner("tp_magnitude")
class TPMagnitude(Criterion):
    """Prune the channels of the smallest norm over all layers of their group, by torch-pruning's magnitude importance.

    Use: on a trained or pretrained model as it is; with ``rounds``, trained first. ``rewind: 0ep`` makes it a lottery
    ticket, without it the weights stay as trained and the ticket is fine-tuned, as torch-pruning's users do.
    Suggested: rounds 1 to prune once, 3 or more to prune little by little.
    Cost: `rounds` trainings.
    Departures: groups are this package's, found on every architecture of timm's, each tried before it is pruned.
    """

    p: Annotated[int, Field(ge=1, description="norm: 1 for sums of absolute values, 2 for sums of squares")] = 2

    def importance(self, tp: Any) -> Any:
        return tp.importance.MagnitudeImportance(p=self.p)
