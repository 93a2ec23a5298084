"""edge-popup: a strong lottery ticket, a subnetwork of random weights that are never trained.

Source: Ramanujan et al. 2020, 1911.13299.
"""

import math
from collections.abc import Generator
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..gates import Gate
from ..masks import Masks, Scope, Scores, full_masks, keep_count, kept, norms, total
from ..method import Method
from ..registry import register_pruner
from ..run import End, Run
from ..seeds import seed_from
from ..subnet import Subnet


@register_pruner("edge_popup")
class EdgePopup(Method):
    """Freeze random weights, learn a score for each, keep those of the largest |score|.

    Suggested: signed_constant weights, half of them kept (the paper's best), dynamic scale for ResNets; SGD with a
    cosine, lr 0.1, 100 epochs. The papers prune every layer and train nothing else: ``classifier=true,
    train_rest=false, norm_affine=false``.
    Cost: one training of scores as large as the weights. The ticket's values are the random weights.
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

    def prepare_(self, subnet: Subnet) -> None:
        """Freeze what does not train and put gates before the weights; their values come when the search begins."""
        pattern = self.pattern(subnet)

        def make(name: str, weight: Tensor) -> Gate:
            if pattern is None:
                return Gate(torch.zeros(weight.shape), torch.ones(weight.shape, dtype=torch.bool), by_magnitude=True)
            pruned, locked = pattern[name]
            free = ~(pruned | locked)
            return Gate(torch.zeros(int(free.sum())), ~pruned, by_magnitude=True, free=free)

        subnet.freeze_(subnet.parameters().values())
        if not self.norm_affine:
            subnet.freeze_(p for norm in norms(subnet.model) for p in norm.parameters(recurse=False))
        if not self.train_rest:
            subnet.freeze_(subnet.model.parameters())
        subnet.gate_(make)

    def search(self, subnet: Subnet) -> Generator[list[Run], list[End], None]:
        self.begin_(subnet)
        yield [Run(after_step=lambda run: self.settle_(run.subnet), weight_decay=self.weight_decay)]
        self.settle_(subnet)
        subnet.bake_()
        subnet.start = subnet.state()

    @torch.no_grad()
    def begin_(self, subnet: Subnet) -> None:
        """Draw weights and scores, each layer's from a seed of its own."""
        scores: Scores = {}
        for number, (name, weight) in enumerate(subnet.weights().items()):
            weight.copy_(self.draw(weight, torch.Generator().manual_seed(seed_from(self.seed, number, 0))))
            scores[name] = kaiming(weight, torch.Generator().manual_seed(seed_from(self.seed, number, 1)))
        subnet.load_scores_(scores)
        if not self.norm_affine:
            for norm in norms(subnet.model):
                if norm.weight is not None:
                    norm.weight.fill_(1)
                if norm.bias is not None:
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
        scores = {name: score.abs() for name, score in subnet.scores().items()}
        full = full_masks(scores)
        return self.pruned_masks(full, scores, total(full) - keep_count(total(full), self.sparsity), self.scope)

    def pattern(self, subnet: Subnet) -> dict[str, tuple[Tensor, Tensor]] | None:
        """For each layer what leaves the search as pruned and what as kept; nothing does where None."""
        return None

    def draw(self, weight: Tensor, generator: torch.Generator) -> Tensor:
        """Random weights of this shape: section 3.2 of the paper, by Kaiming's scale sqrt(2 / fan_in)."""
        if self.weights == "given":
            return weight
        if self.weights == "signed_constant":
            signs = torch.randint(0, 2, weight.shape, generator=generator) * 2 - 1
            return signs * math.sqrt(2 / fan_in(weight))
        return kaiming(weight, generator, uniform=self.weights == "kaiming_uniform")

    def runs(self, subnet: Subnet) -> int:
        return 1


def fan_in(weight: Tensor) -> int:
    """Inputs of one output: the product of all dimensions but the first."""
    return math.prod(weight.shape[1:])


def kaiming(weight: Tensor, generator: torch.Generator, uniform: bool = False) -> Tensor:
    """Kaiming's normal or uniform noise for ReLU, standard deviation sqrt(2 / fan_in), drawn on the CPU."""
    if uniform:
        bound = math.sqrt(6 / fan_in(weight))
        return (torch.rand(weight.shape, generator=generator) * 2 - 1) * bound
    return torch.randn(weight.shape, generator=generator) * math.sqrt(2 / fan_in(weight))
