"""Continuous sparsification: masks learned by gradient descent on a sigmoid that hardens.

Source: Savarese et al. 2019, 1912.04427 (NeurIPS 2020).
"""

import math
from collections.abc import Callable, Generator, Mapping
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..end import End
from ..gates import SigmoidGate, new_scores
from ..lazy import Lazy
from ..masks import full_masks, revived
from ..method import Method
from ..registry import register_pruner
from ..run import Rewind, Run
from ..subnet import Subnet
from ..warn import warn


@register_pruner("continuous_sparsification")
class ContinuousSparsification(Method):
    """Train weights and a soft mask c * sigmoid(beta * s) together, beta growing to 200; keep s > 0; rewind once.

    Suggested (the paper's): 3 rounds, penalty 1e-8, s0 0 (0.1 denser, below 0 sparser), 85 epochs, rewind to 2ep.
    Cost: one training a round. With `parallel` one run for each s0 instead, all in one round; the one whose s > 0 is
    nearest to the asked sparsity is taken.
    `meet`: ``top`` keeps the largest s, exactly as many as asked; ``penalty`` keeps s > 0, whatever sparsity that is.
    Both figures are in the ticket's notes, and where ``top`` has to keep what the search suppressed, that is said.
    A model that is evaluated in the middle of the search is the soft network, as in the released code.
    Departures: beta grows by the step. Between rounds s becomes min(beta s, s0), as the paper says: what was suppressed
    stays so; the released code resets beta first, and so revives it. Momentum starts anew with each round; the paper
    carries it on.
    """

    s0: Annotated[float, Field(ge=-1, le=1, description="first score of every weight")] = 0.0
    penalty: Annotated[float, Field(ge=0, description="weight of the sum of the soft mask in the loss")] = 1e-8
    final_beta: Annotated[float, Field(gt=1, description="beta at the end of a round; it begins at 1")] = 200.0
    rounds: Annotated[int, Field(ge=1, description="rounds of the iterative search; one with parallel")] = 3
    rewind: Rewind = "2ep"
    meet: Annotated[Literal["top", "penalty"], Field(description="what decides the ticket's sparsity")] = "top"
    parallel: Annotated[tuple[float, ...], Field(description="several s0 to search at once")] = ()
    bake_scale: Annotated[bool, Field(description="multiply the ticket's weights by c = 1 / sigmoid(s0)")] = True
    penalise_scale: Annotated[bool, Field(description="penalise c times the soft mask, as the released code does")] = (
        False
    )

    def prepare_(self, subnet: Subnet) -> None:
        full = full_masks(subnet.weights())
        subnet.gate_(lambda name, weight: SigmoidGate(new_scores(weight), full[name]))

    def search(self, subnet: Subnet) -> Generator[list[Run], list[End], None]:
        self.set_(subnet, self.s0)
        if self.parallel:
            ends = yield [
                self.run(setup=lambda subnet, s0=s0: self.set_(subnet, s0), first=True) for s0 in self.parallel
            ]
            chosen = min(range(len(ends)), key=lambda i: abs(density(ends[i].scores) - (1 - self.sparsity)))
            subnet.start = ends[chosen].rewind
            subnet.load_scores_(ends[chosen].scores)
            self.scale_(subnet, 1 / sigmoid(self.parallel[chosen]))
            ends.clear()
        else:
            for round in range(self.rounds):
                end = (yield [self.run(first=round == 0)]).pop()
                if round + 1 < self.rounds:
                    subnet.load_scores_(Lazy(end.scores, lambda name, scores=end.scores: self.reset(scores[name])))
                del end  # as large as a model
        subnet.rewind_()
        self.settle_(subnet)
        self.tell(subnet)
        if not self.bake_scale:
            self.scale_(subnet, 1.0)
        subnet.bake_()
        subnet.restart_()

    def tell(self, subnet: Subnet) -> None:
        """Note what the scores alone would keep, beside what the ticket keeps, and warn where it keeps more."""
        found = density(subnet.present_scores())
        subnet.notes.append({"density_of_scores_above_zero": found, "density": 1 - subnet.sparsity})
        if 1 - subnet.sparsity > found:
            warn(
                f"continuous_sparsification: {found:.4g} of the weights have a score above zero, and "
                f"{1 - self.sparsity:.4g} are to be kept, so the ticket keeps weights that the search suppressed, "
                "those of the highest scores. Raise s0 or lower the penalty for a denser search, ask for a higher "
                "sparsity, or set meet=penalty"
            )

    def run(self, first: bool, setup: Callable[[Subnet], None] | None = None) -> Run:
        return Run(
            rewind=self.rewind if first else None,
            reads=("scores",),
            setup=setup or self.soften_,
            on_loss=self.penalised,
            after_step=self.harden_,
            settle=self.settle_,
        )

    def set_(self, subnet: Subnet, s0: float) -> None:
        """Every score at s0, and c = 1 / sigmoid(s0), so that weights pass unchanged at the start."""
        scores = subnet.present_scores()
        subnet.load_scores_(Lazy(scores, lambda name: torch.full_like(scores[name], s0)))
        self.scale_(subnet, 1 / sigmoid(s0))
        self.soften_(subnet)

    def scale_(self, subnet: Subnet, scale: float) -> None:
        """Set c, what weights are multiplied with beside their mask."""
        for gate in subnet.gates.values():
            gate.scale.fill_(scale)

    def soften_(self, subnet: Subnet) -> None:
        """beta back to 1, for the next round."""
        for gate in subnet.gates.values():
            gate.harden_(1)  # pyright: ignore[reportCallIssue]

    def harden_(self, run: Run) -> None:
        """beta after this fraction of training: exponential from 1 to its final value."""
        for gate in run.subnet.gates.values():
            gate.harden_(self.final_beta**run.progress)  # pyright: ignore[reportCallIssue]

    def penalised(self, run: Run, loss: Tensor) -> Tensor:
        """Plus the penalty times the sum of the soft mask (equation 8, where there is no c)."""
        gates = run.subnet.gates.values()
        scale = next(iter(gates)).scale if self.penalise_scale else 1.0
        return loss + self.penalty * scale * sum(gate.sum() for gate in gates)  # pyright: ignore

    def reset(self, score: Tensor) -> Tensor:
        """min(beta s, s0) with the final beta: the suppressed stay suppressed, the others return to s0."""
        return (self.final_beta * score).clamp(max=self.s0)

    def settle_(self, subnet: Subnet) -> None:
        """The hard mask of the scores as they are now."""
        scores = subnet.present_scores()
        masks = self.best(subnet, scores) if self.meet == "top" else {n: s > 0 for n, s in scores.items()}
        subnet.set_mask_(revived(masks, full_masks(scores), scores) if self.collapse == "prevent" else masks)

    def runs(self, subnet: Subnet) -> int:
        return len(self.parallel) or self.rounds


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def density(scores: Mapping[str, Tensor]) -> float:
    """Fraction of scores above zero; the hard mask is counted, never zeros of the sigmoid."""
    return sum(int((s > 0).sum()) for s in scores.values()) / sum(s.numel() for s in scores.values())
