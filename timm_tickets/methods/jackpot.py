"""Lottery jackpots: subnetworks of pretrained weights that are never trained.

Source: Zhang et al. 2021, 2104.08700 (TPAMI 2023).
"""

import math
from collections.abc import Generator
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import nn

from ..core.lazy import Lazy
from ..core.masks import all_kept, full_masks, swaps
from ..core.scores import magnitude
from ..core.warn import warn
from ..pruning.method import Method
from ..pruning.registry import register_pruner
from ..pruning.run import Run
from ..pruning.run_end import End
from ..pruning.training import Training
from ..sparse.gates import Gate, new_scores
from ..sparse.pretrained import is_pretrained, pretrained_tag
from ..sparse.prunable import classifier_names, norms
from ..sparse.subnet import Subnet


@register_pruner("jackpot")
class Jackpot(Method):
    """Freeze pretrained weights, start from the magnitude mask, let learned scores swap weights within each layer.

    Use: a timm model with ``pretrained=true``, or one trained before (``initial_checkpoint``). A new classifier trains.
    Suggested: SGD 0.1/0.9, cosine, batch 256, weight decay 5e-4 on the scores (1e-4 on ImageNet), 30 epochs.
    Cost: one training of scores as large as the weights. The ticket's values are the pretrained weights; where they are
    those of the model's timm tag, its file holds the tag and a hash instead of them.
    Departures: `rate`, the share of the due swaps that a step makes, falls along training as the paper says; in the
    released code it stays 1.
    """

    ends_trained: ClassVar[bool] = True
    trains_weights: ClassVar[bool] = False
    fall: Annotated[
        Literal["cosine", "quartic", "none"],
        Field(description="how the share of swaps falls: cosine, (1 - t)^4, not"),
    ] = "cosine"
    low_score: Annotated[
        float, Field(gt=0, le=1, description="first score of what magnitude prunes; 1 is the rest's")
    ] = 0.99
    weight_decay: Annotated[float, Field(ge=0, description="weight decay of the scores")] = 5e-4
    train_classifier: Annotated[
        bool, Field(description="train the classifier, as a new one must be; false where it was trained before")
    ] = True

    def of_weights(self) -> str:
        return "swaps single weights"

    def prepare_(self, subnet: Subnet) -> None:
        """Freeze everything but scores and classifier, and put gates before the weights."""
        if looks_untrained(subnet.model):
            warn(
                "jackpot: this model's normalisation layers have never been trained, so its weights look random; a "
                "jackpot is searched in pretrained weights (pretrained=True, or a checkpoint)",
            )
        elif not is_pretrained(subnet.model, subnet.names):
            tag = pretrained_tag(subnet.model) or "pretrained models"
            warn(
                f"jackpot: these are not the weights of timm's {tag} as stored on this machine; it goes on, and "
                "its ticket will hold the kept weights, not a tag",
            )
        heads = tuple(f"{name}." for name in (classifier_names(subnet.model) if self.train_classifier else ()))
        subnet.freeze_(p for name, p in subnet.model.named_parameters() if not name.startswith(heads))
        subnet.freeze_(subnet.parameters().values())
        full = full_masks(subnet.weights())
        subnet.gate_(lambda name, weight: Gate(new_scores(weight), full[name], by_magnitude=False))

    def search(self, subnet: Subnet) -> Generator[list[Run], list[End], None]:
        # One global magnitude threshold: it decides how many each layer keeps, for good, and the first mask.
        weights = subnet.device_weights()
        subnet.set_mask_(self.cut(all_kept(weights), magnitude(weights)))
        mask = subnet.device_mask()
        subnet.load_scores_(Lazy(subnet.names, lambda name: torch.where(mask[name], 1.0, self.low_score)))
        # A claim only: a model knows its tag whether or not it was built with pretrained=True. The ticket checks it.
        tag = pretrained_tag(subnet.model)
        subnet.origin = {"start": "pretrained", "tag": tag} if tag else {}
        yield [Run(schedule=self.numbers, each_step=self.step_, weight_decay=self.weight_decay)]
        subnet.restart_()
        subnet.bake_()

    def numbers(self, progress: float) -> dict[str, float]:
        return {"rate": self.scheduled(progress)}

    def step_(self, run: Training) -> None:
        masks, scores = run.subnet.device_mask(), run.subnet.device_scores()
        found = swaps(list(masks.values()), list(scores.values()), run.subnet.now["rate"])
        run.subnet.set_mask_(dict(zip(masks, found, strict=True)))

    def scheduled(self, progress: float) -> float:
        """Share of the due swaps to make after this fraction of training: the short restriction."""
        falls = {"cosine": (1 + math.cos(math.pi * progress)) / 2, "quartic": (1 - progress) ** 4, "none": 1.0}
        return falls[self.fall]

    def runs(self, subnet: Subnet) -> int:
        return 1


def looks_untrained(model: nn.Module) -> bool:
    """Whether every normalisation layer, if there is any, is as a constructor leaves it: means 0, scales equal."""
    found = norms(model)
    means = [norm.running_mean for norm in found if getattr(norm, "running_mean", None) is not None]
    scales = [norm.weight for norm in found if norm.weight is not None]
    return not any(m.any() for m in means) and all(s.unique().numel() == 1 for s in scales)
