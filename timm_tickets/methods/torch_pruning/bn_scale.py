"""torch-pruning's batch-normalisation scales.

Source: Liu et al. 2017 (network slimming), 1708.06519; torch-pruning's ``BNScalePruner`` and ``BNScaleImportance``.
"""

from typing import Any

from ...pruning.registry import register_pruner
from ...pruning.training import Training
from .regularised import Regularised


@register_pruner("tp_bn_scale")
class TPBNScale(Regularised):
    """Train with torch-pruning's penalty on the scales of batch normalisations, prune the channels of the smallest.

    Use: on networks with batch normalisation; channels without one stay. Then the ticket is trained: fine-tuned from
    the trained weights, or from where ``rewind`` says.
    Cost: `rounds` trainings.
    Departures: groups are this package's. The penalty is added right before the optimizer's step, after any clipping.
    """

    def importance(self, tp: Any) -> Any:
        return tp.importance.BNScaleImportance()

    def kind(self, tp: Any) -> Any:
        return tp.pruner.BNScalePruner

    def held(self, groups: list[Any], run: Training) -> dict[str, Any]:
        return {"reg": self.reg, "group_lasso": False}
