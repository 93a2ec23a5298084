"""edge-popup: a strong lottery ticket, a subnetwork of random weights that are never trained.

Source: Ramanujan et al. 2020, 1911.13299.
"""

import math
from collections.abc import Generator
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from ..core.draws import Kind
from ..core.masks import Masks, Scope, all_kept, kept, total
from ..core.scores import magnitude
from ..pruning.method import Method
from ..pruning.registry import register_pruner
from ..pruning.run import Run
from ..pruning.run_end import End
from ..pruning.training import Training
from ..sparse.gates import ranked_gate, scale_of
from ..sparse.prunable import norms
from ..sparse.random_start import FirstScores, draw_scores_, draw_weights_, frozen_patterns, reset_norms_
from ..sparse.subnet import Subnet


@register_pruner("edge_popup")
class EdgePopup(Method):
    """Freeze random weights, learn a score for each, keep those of the largest |score|.

    Suggested: signed_constant weights, half of them kept (the paper's best), dynamic scale for ResNets; SGD with a
    cosine, lr 0.1, 100 epochs. The papers prune every layer and train nothing else: ``classifier=true,
    train_rest=false, norm_affine=false``.
    Cost: one training of scores as large as the weights. The ticket's values are the random weights.
    Random weights are Kaiming's, standard deviation sqrt(2 / fan_in), from core/draws.py: a ticket regenerates them.
    First scores are uniform, as in the released code (Kaiming's with a = sqrt 5): drawn wider than the learning rate
    can move them, the first mask stays.
    Departures: what is not pruned trains by default, so that any timm model works. On weight-standardised layers the
    scale has no effect: standardising cancels it. What such a channel keeps passes less its mean.
    """

    ends_trained: ClassVar[bool] = True
    trains_weights: ClassVar[bool] = False
    scope: Annotated[Scope, Field(description="compare scores within each layer (as published), or across all")] = (
        "layerwise"
    )
    weights: Annotated[
        Kind | Literal["given"], Field(description="random weights to draw; 'given' keeps the model's own")
    ] = "signed_constant"
    scale: Annotated[
        Literal["none", "static", "dynamic"],
        Field(description="factor for the weights lost: 1/sqrt(density), of the whole ticket or of each layer"),
    ] = "none"
    train_rest: Annotated[bool, Field(description="train what is not pruned: biases, norms, the classifier")] = True
    norm_affine: Annotated[bool, Field(description="false: normalisation without learned scale and shift")] = True
    weight_decay: Annotated[float, Field(ge=0, description="weight decay of the scores")] = 1e-4
    first_scores: Annotated[
        FirstScores, Field(description="first scores: uniform in +-1/sqrt(fan_in), or Kaiming normal, 2.45 times wider")
    ] = "uniform"

    def prepare_(self, subnet: Subnet) -> None:
        """Freeze what does not train and put gates before the weights; their values come when the search begins."""
        counts = self.frozen_counts(subnet)
        patterns = None if counts is None else frozen_patterns(subnet, counts, self.seed)

        subnet.freeze_(subnet.parameters().values())
        if not self.norm_affine:
            subnet.freeze_(p for norm in norms(subnet.model) for p in norm.parameters(recurse=False))
        if not self.train_rest:
            subnet.freeze_(subnet.model.parameters())
        subnet.gate_(lambda name, weight: ranked_gate(weight, None if patterns is None else patterns[name]))

    def search(self, subnet: Subnet) -> Generator[list[Run], list[End], None]:
        self.begin_(subnet)
        yield [Run(each_step=self.step_, weight_decay=self.weight_decay)]
        self.settle_(subnet)
        subnet.restart_()
        subnet.bake_()

    def begin_(self, subnet: Subnet) -> None:
        """Draw weights and scores, and say how, for the ticket."""
        drawn = None if self.weights == "given" else self.weights
        if drawn is not None:
            draw_weights_(subnet, drawn, self.seed)
        counts = self.frozen_counts(subnet)
        subnet.origin = {
            "start": "values" if drawn is None else "seed",
            "seed": self.seed,
            "weights": drawn,
            "scale": self.scale,
            "frozen": None if counts is None else [list(pair) for pair in counts.values()],
        }
        draw_scores_(subnet, self.first_scores, self.seed)
        reset_norms_(subnet, affine=self.norm_affine, trained=self.train_rest)
        self.settle_(subnet)

    def step_(self, run: Training) -> None:
        self.settle_(run.subnet)

    def settle_(self, subnet: Subnet) -> None:
        """Cut the mask from the scores as they are now, and scale what it keeps."""
        masks = self.mask_of_scores(subnet)
        subnet.set_mask_(masks)
        if self.scale == "none":
            return
        whole = 1 / math.sqrt(kept(masks) / total(masks)) if self.scale == "static" else None
        subnet.scale_gates_({name: whole or scale_of(mask) for name, mask in masks.items()})

    def mask_of_scores(self, subnet: Subnet) -> Masks:
        """Keep the largest |scores|: exactly the asked number, ties to the first."""
        scores = subnet.device_scores()
        return self.cut(all_kept(scores), magnitude(scores))

    def frozen_counts(self, subnet: Subnet) -> dict[str, tuple[int, int]] | None:
        """How many weights of each layer leave the search as pruned and as kept; nothing does where None."""
        return None

    def runs(self, subnet: Subnet) -> int:
        return 1
