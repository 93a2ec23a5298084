"""Continuous sparsification: masks learned by gradient descent on a sigmoid that hardens.

Source: Savarese et al. 2019, 1912.04427 (NeurIPS 2020).
"""

import math
from collections.abc import Callable, Generator, Mapping
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..core.lazy import Lazy
from ..core.masks import all_kept, revived
from ..core.scores import above_zero
from ..core.warn import warn
from ..pruning.method import Method
from ..pruning.registry import register_pruner
from ..pruning.run import Rewind, Run
from ..pruning.run_end import End
from ..pruning.training import Training
from ..sparse.gates import SigmoidGate, harden_, new_scores, soft_sum
from ..sparse.subnet import Subnet


@register_pruner("continuous_sparsification")
class ContinuousSparsification(Method):
    """Train weights and a soft mask c * sigmoid(beta * s) together, beta growing to 200; keep s > 0; rewind once.

    Suggested (the paper's): 3 rounds, penalty 1e-8, s0 0 (0.1 denser, below 0 sparser), 85 epochs, rewind to 2ep.
    Cost: one training a round. With `parallel` one run for each s0 instead, all in one round; the one whose s > 0 is
    nearest to the asked sparsity is taken. Evaluated within the search, the model is the soft network, as released.
    `meet`: ``top`` keeps the largest s, exactly as many as asked; ``penalty`` keeps s > 0, whatever sparsity that is.
    `bake_scale`: with c in their values tickets had 99.07 % on digits at .95 (98.80 without it, 3 seeds).
    Departures: beta grows by the step; s becomes min(beta s, s0) between rounds, as in the paper (the released code
    resets beta first, and revives what was suppressed); momentum starts anew each round, in the paper not.
    """

    s0: Annotated[float, Field(ge=-1, le=1, description="first score of every weight")] = 0.0
    penalty: Annotated[float, Field(ge=0, description="weight of the sum of the soft mask in the loss")] = 1e-8
    final_beta: Annotated[float, Field(gt=1, description="beta at the end of a round; it begins at 1")] = 200.0
    rounds: Annotated[int, Field(ge=1, description="rounds of the iterative search; one with parallel")] = 3
    rewind: Rewind = "2ep"
    meet: Annotated[Literal["top", "penalty"], Field(description="what decides the ticket's sparsity")] = "top"
    parallel: Annotated[tuple[float, ...], Field(description="several s0 to search at once")] = ()
    bake_scale: Annotated[bool, Field(description="multiply the ticket's weights by c = 1 / sigmoid(s0)")] = True
    penalise_scale: Annotated[bool, Field(description="penalise c times the soft mask, as released")] = False

    def of_weights(self) -> str:
        return "keeps every weight of a score above zero with meet=penalty" if self.meet == "penalty" else ""

    def prepare_(self, subnet: Subnet) -> None:
        subnet.gate_(lambda _, weight: SigmoidGate(new_scores(weight), torch.ones(weight.shape, dtype=torch.bool)))

    def search(self, subnet: Subnet) -> Generator[list[Run], list[End], None]:
        self.set_(subnet, self.s0)
        if self.parallel:
            ends = yield [self.run(True, lambda subnet, s0=s0: self.set_(subnet, s0)) for s0 in self.parallel]
            nearest = min(ends, key=lambda end: abs(above_zero(end.scores) - (1 - self.sparsity)))
            assert nearest.rewind is not None  # each of these runs takes one
            subnet.set_start_(nearest.rewind, nearest.rewind_epoch)
            self.set_(subnet, self.parallel[ends.index(nearest)])
            subnet.load_scores_(nearest.scores)
        else:
            for round in range(self.rounds):
                (end,) = yield [self.run(first=round == 0)]
                if round + 1 < self.rounds:
                    subnet.load_scores_(self.restarted(end.scores))
        subnet.rewind_()
        self.settle_(subnet)
        self.tell(subnet)
        if not self.bake_scale:
            subnet.scale_gates_(dict.fromkeys(subnet.names, 1.0))
        subnet.restart_()
        subnet.bake_()

    def tell(self, subnet: Subnet) -> None:
        """Note what the scores alone would keep, beside what the ticket keeps, and warn where it keeps more."""
        found = above_zero(subnet.device_scores())
        subnet.notes.append({"density_of_scores_above_zero": found, "density": 1 - subnet.sparsity})
        if 1 - subnet.sparsity > found:
            warn(
                f"{self.name}: {found:.4g} of the weights have a score above zero, {1 - self.sparsity:.4g} stay, so it "
                "keeps some that were suppressed. Raise s0, lower the penalty, ask for more sparsity, or meet=penalty"
            )

    def restarted(self, scores: Mapping[str, Tensor]) -> Lazy:
        """min(beta s, s0) with the final beta: the suppressed stay suppressed, the others return to s0."""
        return Lazy(scores, lambda name: (self.final_beta * scores[name]).clamp(max=self.s0))

    def run(self, first: bool, setup: Callable[[Subnet], None] | None = None) -> Run:
        return Run(
            rewind=self.rewind if first else None,
            setup=setup or (lambda subnet: harden_(subnet.gates, 1)),
            on_loss=self.penalised,
            schedule=lambda progress: {"beta": self.final_beta**progress},  # exponential, from 1
            each_step=lambda run: harden_(run.subnet.gates, run.subnet.now["beta"]),
            settle=self.settle_,
        )

    def set_(self, subnet: Subnet, s0: float) -> None:
        """Every score at s0, and c = 1 / sigmoid(s0), so that weights pass unchanged at the start, where beta is 1."""
        subnet.load_scores_(Lazy(subnet.names, lambda name: torch.full(subnet.gates[name].mask.shape, s0)))
        subnet.scale_gates_(dict.fromkeys(subnet.names, 1 + math.exp(-s0)))
        harden_(subnet.gates, 1)

    def penalised(self, run: Training, loss: Tensor) -> Tensor:
        """Plus the penalty times the sum of the soft mask (equation 8, where there is no c)."""
        scale = next(iter(run.subnet.gates.values())).scale if self.penalise_scale else 1.0
        return loss + self.penalty * scale * soft_sum(run.subnet.gates)

    def settle_(self, subnet: Subnet) -> None:
        """The hard mask of the scores as they are now."""
        scores = subnet.device_scores()
        masks = self.cut(all_kept(scores), scores) if self.meet == "top" else {n: s > 0 for n, s in scores.items()}
        subnet.set_mask_(revived(masks, all_kept(scores), scores) if self.collapse == "prevent" else masks)

    def runs(self, subnet: Subnet) -> int:
        return len(self.parallel) or self.rounds
