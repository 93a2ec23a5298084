"""torch-pruning's group norm: sparse training by groups.

Source: Fang et al. 2023 (DepGraph), 2301.12900, section 3.3; torch-pruning's ``GroupNormPruner``.
"""

from typing import Annotated, Any

from pydantic import Field

from ...pruning.registry import register_pruner
from ...pruning.training import Training
from .regularised import Regularised


@register_pruner("tp_group_norm")
class TPGroupNorm(Regularised):
    """Train while torch-pruning shrinks the weakest channels of each group most, then prune those of the smallest norm.

    Use: for a network that is sparse by channels before it is cut. Then the ticket is trained: fine-tuned from the
    trained weights, or from where ``rewind`` says.
    Cost: `rounds` trainings, and at each step the importance of every group.
    Departures: groups are this package's. The penalty is added right before the optimizer's step, after any clipping.
    """

    reg: Annotated[float, Field(ge=0, description="strength of the regularisation; 0 trains without it")] = 1e-4
    alpha: Annotated[
        float, Field(ge=0, description="the weakest channel is shrunk 2^alpha times as much as the strongest")
    ] = 4

    def importance(self, tp: Any) -> Any:
        return tp.importance.MagnitudeImportance()

    def kind(self, tp: Any) -> Any:
        return tp.pruner.GroupNormPruner

    def held(self, groups: list[Any], run: Training) -> dict[str, Any]:
        return {"reg": self.reg, "cnt": 0}

    def regularise_(self, theirs: Any, run: Training) -> None:
        theirs.regularize(run.subnet.model, alpha=2**self.alpha)
