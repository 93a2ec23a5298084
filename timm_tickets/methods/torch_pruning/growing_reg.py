"""torch-pruning's growing regularisation.

Source: Wang et al. 2021, 2012.09243; torch-pruning's ``GrowingRegPruner``.
"""

from typing import Annotated, Any

import torch
from pydantic import Field

from ...pruning.registry import register_pruner
from ...pruning.training import Training
from .regularised import Regularised


@register_pruner("tp_growing_reg")
class TPGrowingReg(Regularised):
    """Train while torch-pruning decays the weakest channels ever more strongly, then prune those of the smallest norm.

    Use: for a network that is sparse by channels before it is cut. Then the ticket is trained: fine-tuned from the
    trained weights, or from where ``rewind`` says.
    Suggested: delta_reg so large that after all increases the decay of the weakest channels outweighs the loss.
    Cost: `rounds` trainings, and at each step the importance of every group.
    Departures: groups are this package's. The penalty is added right before the optimizer's step, after any clipping.
    """

    delta_reg: Annotated[float, Field(ge=0, description="how much the weakest channel's strength grows")] = 1e-5
    interval: Annotated[
        int | None, Field(ge=1, description="optimizer steps between two increases; 100 or less where not given")
    ] = None

    def importance(self, tp: Any) -> Any:
        return tp.importance.MagnitudeImportance()

    def kind(self, tp: Any) -> Any:
        return tp.pruner.GrowingRegPruner

    def held(self, groups: list[Any], run: Training) -> dict[str, Any]:
        # A checkpoint within a run holds what it has gathered: here by how much strengths have grown.
        grown = [run.scores.get(f"strength_{number}", torch.zeros(1)).cpu() for number in range(len(groups))]
        first = [torch.full((len(group[0].idxs),), self.reg) for group in groups]
        strengths = {group: one + more for group, one, more in zip(groups, first, grown, strict=True)}
        return {"group_reg": strengths, "delta_reg": self.delta_reg}

    def regularise_(self, theirs: Any, run: Training) -> None:
        if run.step and run.step % run.every(self.interval, 0.05) == 0:
            before = dict(theirs.group_reg)
            theirs.update_reg()
            grown = [(now - before[group]).to(group[0].dep.layer.weight) for group, now in theirs.group_reg.items()]
            run.add_scores_({f"strength_{number}": one for number, one in enumerate(grown)})
        theirs.regularize(run.subnet.model)
