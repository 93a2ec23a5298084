"""What torch-pruning's regularisers share: they add to the gradients before every optimizer step."""

from dataclasses import replace
from typing import Annotated, Any

from pydantic import Field

from ...core.optional import torch_pruning
from ...core.private import regulariser
from ...core.settings import settings
from ...pruning.run import Run
from ...pruning.training import Training
from ...structure.dependencies import items_of, read_by
from .criterion import Criterion


@settings
class Regularised(Criterion):
    """Trains under a regulariser of torch-pruning's, then cuts by its importance."""

    rounds: Annotated[int, Field(ge=1, description="trainings, each followed by a cut")] = 1
    reg: Annotated[float, Field(ge=0, description="strength of the regularisation; 0 trains without it")] = 1e-5

    def training(self, first: bool) -> Run:
        return replace(super().training(first), before_step=Regularisation(self) if self.reg else None)

    def kind(self, tp: Any) -> Any:
        """The class of torch-pruning's whose regulariser it is."""
        raise NotImplementedError

    def held(self, groups: list[Any], run: Training) -> dict[str, Any]:
        """What that class keeps of its settings, by the names it keeps them by."""
        return {"reg": self.reg}

    def regularise_(self, theirs: Any, run: Training) -> None:
        """Add to the gradients, before a step."""
        theirs.regularize(run.subnet.model)


class Regularisation:
    """A regulariser of torch-pruning's over the groups that a run has left, made when its first step comes.

    Args:
        method: Whose it is.
    """

    def __init__(self, method: Regularised):
        self.method, self.theirs = method, None

    def __call__(self, run: Training) -> None:
        if self.theirs is None:
            self.theirs = self._made(run)
        self.method.regularise_(self.theirs, run)

    def _made(self, run: Training) -> Any:
        method, units, subnet = self.method, self.method.channels, run.subnet
        tp = torch_pruning(method.name)
        importance = method.importance(tp)
        items = items_of(subnet.model, units.groups, read_by(importance), units.gone(subnet.mask))
        # Strengths go by the distance from the largest importance to the smallest: of one channel there is none.
        groups = [one.group for one in items if len(one.of) > 1]
        return regulariser(method.kind(tp), tp.DependencyGraph(), groups, importance, **method.held(groups, run))
