"""Gradual magnitude pruning: one training in which the sparsity grows along a cubic.

Source: Zhu & Gupta 2017, 1710.01878.
"""

from collections.abc import Generator
from typing import Annotated, ClassVar

from pydantic import Field

from ..core.errors import SettingError
from ..core.masks import keep_count
from ..core.scores import magnitude
from ..core.warn import warn
from ..pruning.method import OneShot
from ..pruning.registry import register_pruner
from ..pruning.run import Run
from ..pruning.run_end import End
from ..pruning.training import Training
from ..sparse.subnet import Subnet


@register_pruner("gradual")
class Gradual(OneShot):
    """Prune the smallest weights while training, for good; the ticket's values are the final weights.

    Suggested: begin 0.0 to 0.2, end 0.75, so that the sparse network trains on; interval 100 steps. Where it is not set
    it is 100 too, but at most a twentieth of the steps between begin and end.
    Cost: one training.
    Departures: the sparsity goes by the fraction of training done, not by a count of steps.
    """

    ends_trained: ClassVar[bool] = True
    begin: Annotated[float, Field(ge=0, lt=1, description="fraction of training at which pruning begins")] = 0.0
    end: Annotated[float, Field(gt=0, le=1, description="fraction of training at which it is complete")] = 0.75
    interval: Annotated[
        int | None, Field(ge=1, description="optimizer steps between two prunings; 100 or less where not given")
    ] = None

    def prepare_(self, subnet: Subnet) -> None:
        super().prepare_(subnet)
        if self.begin >= self.end:
            raise SettingError(f"pruner.begin: {self.begin} is not before end {self.end}; begin earlier")

    def search(self, subnet: Subnet) -> Generator[list[Run], list[End], None]:
        yield [Run(after_step=self.step_)]
        mask = subnet.device_mask()
        if self.kept(mask) > keep_count(self.total(mask), self.sparsity):
            warn(
                f"gradual: its run ended at sparsity {subnet.sparsity:.4f}, not at the asked {self.sparsity}; the rest "
                "is pruned now, and what is left has not trained since. Create the pruner with the epochs that are "
                "trained"
            )
        # However long the run was, the asked sparsity is met.
        subnet.set_mask_(self.cut(mask, magnitude(subnet.device_weights())))
        subnet.restart_()

    def step_(self, run: Training) -> None:
        if run.step % run.every(self.interval, (self.end - self.begin) / 20) and run.progress < 1:
            return
        subnet, mask = run.subnet, run.subnet.device_mask()
        keep = keep_count(self.total(mask), self.scheduled(run.progress))
        if keep < self.kept(mask):
            subnet.set_mask_(self.cut(mask, magnitude(subnet.device_weights()), keep))

    def scheduled(self, progress: float) -> float:
        """Sparsity after this fraction of training (equation 1, from 0)."""
        done = min(1.0, max(0.0, (progress - self.begin) / (self.end - self.begin)))
        return self.sparsity * (1 - (1 - done) ** 3)

    def runs(self, subnet: Subnet) -> int:
        return 1
