"""edge-popup: a strong lottery ticket, a subnetwork of random weights that are never trained.

Source: Ramanujan et al. 2020, 1911.13299.
"""

import math
from collections.abc import Generator
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..draws import SCORES, draw, frozen
from ..end import End
from ..gates import Gate, new_scores
from ..lazy import Lazy
from ..masks import Masks, Scope, kept, total
from ..method import Method
from ..prunable import norms
from ..registry import register_pruner
from ..run import Run
from ..scores import magnitude
from ..sharded import local, part
from ..subnet import Subnet

FirstScores = Literal["uniform", "normal"]


@register_pruner("edge_popup")
class EdgePopup(Method):
    """Freeze random weights, learn a score for each, keep those of the largest |score|.

    Suggested: signed_constant weights, half of them kept (the paper's best), dynamic scale for ResNets; SGD with a
    cosine, lr 0.1, 100 epochs. The papers prune every layer and train nothing else: ``classifier=true,
    train_rest=false, norm_affine=false``.
    Cost: one training of scores as large as the weights. The ticket's values are the random weights.
    Random weights are Kaiming's, standard deviation sqrt(2 / fan_in), from draws.py: a ticket regenerates them.
    First scores are uniform, as in the released code (Kaiming's with a = sqrt 5): drawn wider than the learning rate
    can move them, the first mask stays.
    Departures: what is not pruned trains by default, so that any timm model works. On weight-standardised layers the
    scale has no effect: standardising cancels it.
    """

    ends_trained: ClassVar[bool] = True
    scope: Annotated[Scope, Field(description="compare scores within each layer (as published), or across all")] = (
        "layerwise"
    )
    weights: Annotated[
        Literal["signed_constant", "kaiming_uniform", "kaiming_normal", "given"],
        Field(description="random weights to draw; 'given' keeps the model's own"),
    ] = "signed_constant"
    scale: Annotated[
        Literal["none", "static", "dynamic"],
        Field(description="factor for the weights lost: 1/sqrt(density), of the whole ticket or of each layer"),
    ] = "none"
    train_rest: Annotated[bool, Field(description="train what is not pruned: biases, norms, the classifier")] = True
    norm_affine: Annotated[bool, Field(description="false: normalisation without learned scale and shift")] = True
    weight_decay: Annotated[float, Field(ge=0, description="weight decay of the scores")] = 1e-4
    first_scores: Annotated[
        FirstScores,
        Field(
            description="draw of the first scores: uniform in +-1/sqrt(fan_in), or Kaiming normal, 2.45 times as wide"
        ),
    ] = "uniform"

    def prepare_(self, subnet: Subnet) -> None:
        """Freeze what does not train and put gates before the weights; their values come when the search begins."""
        pattern = self.pattern(subnet)

        def make(name: str, weight: Tensor) -> Gate:
            if pattern is None:
                return Gate(new_scores(weight), torch.ones(weight.shape, dtype=torch.bool), by_magnitude=True)
            pruned, locked = pattern[name]
            free = ~(pruned | locked)
            return Gate(new_scores(weight, int(free.sum())), ~pruned, by_magnitude=True, free=free)

        subnet.freeze_(subnet.parameters().values())
        if not self.norm_affine:
            subnet.freeze_(p for norm in norms(subnet.model) for p in norm.parameters(recurse=False))
        if not self.train_rest:
            subnet.freeze_(subnet.model.parameters())
        subnet.gate_(make)

    def search(self, subnet: Subnet) -> Generator[list[Run], list[End], None]:
        self.begin_(subnet)
        run = Run(after_step=lambda run: self.settle_(run.subnet), weight_decay=self.weight_decay, reads=())
        (yield [run]).clear()  # its last mask need not wait for the ticket
        self.settle_(subnet)
        subnet.bake_()
        subnet.restart_()

    @torch.no_grad()
    def begin_(self, subnet: Subnet) -> None:
        """Draw weights and scores, each layer's from streams of its own, and say how, for the ticket."""
        weights = subnet.weights()
        numbers = {name: number for number, name in enumerate(weights)}
        if self.weights != "given":
            for name, weight in weights.items():
                drawn = torch.from_numpy(draw(self.weights, weight.shape, self.seed, numbers[name]))
                local(weight).copy_(part(drawn, weight))
        counts = self.frozen_counts(subnet)
        subnet.origin = {
            "start": "values" if self.weights == "given" else "seed",
            "seed": self.seed,
            "weights": None if self.weights == "given" else self.weights,
            "scale": self.scale,
            "frozen": None if counts is None else [list(pair) for pair in counts.values()],
        }
        subnet.load_scores_(
            Lazy(weights, lambda name: first_scores(self.first_scores, weights[name].shape, self.seed, numbers[name]))
        )
        for norm in norms(subnet.model):
            # Where it does not train, a last scale of zero would keep its branch shut, and all gradients out, for good.
            if norm.weight is not None and not (self.norm_affine and (self.train_rest or norm.weight.any())):
                norm.weight.fill_(1)
            if norm.bias is not None and not self.norm_affine:
                norm.bias.zero_()
        self.settle_(subnet)

    def settle_(self, subnet: Subnet) -> None:
        """Cut the mask from the scores as they are now, and scale what it keeps."""
        masks = self.cut(subnet)
        subnet.set_mask_(masks)
        whole = kept(masks) / total(masks)
        for name, gate in subnet.gates.items():
            layer = int(masks[name].sum()) / masks[name].numel()
            density = {"none": 1.0, "static": whole, "dynamic": layer}[self.scale]
            gate.scale.fill_(1 / math.sqrt(density) if density else 1.0)

    def cut(self, subnet: Subnet) -> Masks:
        """Keep the largest |scores|: exactly the asked number, ties to the first."""
        scores = subnet.present_scores()
        # All layers' are read several times: not from the device, after every step.
        scores = magnitude(dict(scores) if self.scope == "global" else scores)
        return self.best(subnet, scores, self.scope)

    def frozen_counts(self, subnet: Subnet) -> dict[str, tuple[int, int]] | None:
        """How many weights of each layer leave the search as pruned and as kept; nothing does where None."""
        return None

    def pattern(self, subnet: Subnet) -> dict[str, tuple[Tensor, Tensor]] | None:
        """For each layer, what leaves the search as pruned and what as kept: bool, drawn from the seed."""
        counts = self.frozen_counts(subnet)
        if counts is None:
            return None
        out: dict[str, tuple[Tensor, Tensor]] = {}
        for number, (name, weight) in enumerate(subnet.weights().items()):
            pruned, locked = frozen(weight.numel(), *counts[name], self.seed, number)
            out[name] = (torch.from_numpy(pruned).view(weight.shape), torch.from_numpy(locked).view(weight.shape))
        return out

    def runs(self, subnet: Subnet) -> int:
        return 1


def first_scores(kind: FirstScores, shape: torch.Size, seed: int, layer: int) -> Tensor:
    """Scores to begin with, float32, the same for a seed on every platform.

    Args:
        kind: ``uniform``: in (-1, 1) / sqrt(fan_in), torch's Kaiming uniform with a = sqrt 5, standard deviation
            0.577 / sqrt(fan_in); ``normal``: Kaiming normal, standard deviation 1.414 / sqrt(fan_in).
        shape: Of the weight.
        seed: The method's.
        layer: Position of the weight among the prunable ones.
    """
    if kind == "normal":
        return torch.from_numpy(draw("kaiming_normal", shape, seed, layer, SCORES))
    return torch.from_numpy(draw("kaiming_uniform", shape, seed, layer, SCORES)) * 6**-0.5
