"""Label smoothing.

Source: Szegedy et al. 2016, 1512.00567; for tickets Chen et al. 2021, 2101.03255.
"""

from functools import partial
from typing import Annotated, Any, Literal

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from ..core.errors import SettingError
from .base import Criterion, Tweak
from .registry import register_tweak


@register_tweak("label_smoothing")
class LabelSmoothing(Tweak):
    """Cross-entropy against targets that give some of their weight to the other classes.

    Suggested: amount 0.1, the paper's.
    ``others``, the paper's: 1 - amount on the target, amount / (C - 1) on each of the other C - 1 classes; ``all``,
    timm's and torch's: the amount is spread over all C, the target among them. The first is the second with an amount
    C / (C - 1) times as large, and at most 1: with two classes an amount over 0.5 counts as 0.5.
    """

    amount: Annotated[float, Field(ge=0, lt=1, description="weight taken from the target")] = 0.1
    over: Annotated[Literal["others", "all"], Field(description="the classes that share it")] = "others"

    def criterion(self, criterion: Criterion) -> Criterion:
        if criterion is not functional.cross_entropy and not _is_plain_cross_entropy(criterion):
            found = getattr(criterion, "__name__", type(criterion).__name__)
            raise SettingError(
                f"tweaks.label_smoothing: it smooths plain cross-entropy, and the training's criterion is {found}; set "
                "training.smoothing to 0, bce_loss to false, mixup and cutmix to 0, or leave this tweak out"
            )
        return partial(smoothed_cross_entropy, amount=self.amount, over=self.over)


def smoothed_cross_entropy(output: Any, target: Tensor, amount: float, over: Literal["others", "all"]) -> Tensor:
    """Mean cross-entropy of logits (batch, classes) against smoothed class indices (batch,)."""
    classes = output.shape[1]
    epsilon = amount * classes / (classes - 1) if over == "others" and classes > 1 else amount
    # torch refuses amounts over 1; the paper's reaches that only where the target would be the least likely class.
    return functional.cross_entropy(output, target, label_smoothing=min(1.0, epsilon))


def _is_plain_cross_entropy(criterion: Any) -> bool:
    return (
        type(criterion) is nn.CrossEntropyLoss
        and criterion.label_smoothing == 0
        and criterion.weight is None
        and criterion.reduction == "mean"
        and criterion.ignore_index == -100
    )
