"""SET: sparse evolutionary training.

Source: Mocanu et al. 2018, 1707.04780.
"""

from collections.abc import Generator, Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from ..core.errors import SettingError
from ..core.lazy import Lazy
from ..core.masks import Counted, Distribution, exchange, keep_count, total
from ..core.scores import magnitude, random
from ..core.seeds import seed_from
from ..pruning.method import OneShot
from ..pruning.registry import register_pruner
from ..pruning.run import Run
from ..pruning.run_end import End
from ..pruning.training import Training
from ..sparse.subnet import Subnet


@register_pruner("set")
class SET(OneShot):
    """Train sparse from the start; now and then drop each layer's smallest weights and grow as many at random.

    Suggested (the paper's): erk, drop_rate 0.3, an exchange an epoch, which is what it does where `interval` is not
    set.
    Cost: one training, at the asked sparsity throughout. The ticket's values are the final weights.
    Departures: the smallest absolute values are dropped; the paper drops the smallest positive and largest negative.
    """

    ends_trained: ClassVar[bool] = True
    scope: Annotated[Literal["layerwise"], Field(description="an exchange stays within its layer")] = "layerwise"
    distribution: Annotated[Distribution, Field(description="density of each layer, throughout")] = "erk"
    drop_rate: Annotated[float, Field(gt=0, lt=1, description="fraction of a layer's kept weights to exchange")] = 0.3
    interval: Annotated[
        int | None, Field(ge=1, description="optimizer steps between two exchanges; an epoch's where not given")
    ] = None
    until: Annotated[float, Field(gt=0, le=1, description="fraction of training after which the masks stay")] = 1.0
    dense_first: Annotated[
        bool, Field(description="keep the first prunable layer whole, as RigL's release; the others make up for it")
    ] = False

    def of_weights(self) -> str:
        return "exchanges single weights"

    def search(self, subnet: Subnet) -> Generator[list[Run], list[End], None]:
        self.begin_(subnet)
        yield [Run(after_step=self.step_)]
        subnet.restart_()

    def begin_(self, subnet: Subnet) -> None:
        """A random mask of the asked sparsity, each layer as the distribution says."""
        mask, noise = subnet.mask, random(subnet.weights(), self.seed)
        first = {name: mask[name] for name in subnet.names[: 1 if self.dense_first else 0]}
        others = {name: mask[name] for name in mask if name not in first}
        keep = keep_count(total(mask), self.sparsity) - total(first)
        if keep < 0:
            raise SettingError(
                f"pruner.dense_first: {total(others) - keep} weights are to be pruned, and the other layers have "
                f"{total(others)}; lower the sparsity, or set it to false"
            )
        subnet.set_mask_(first | self.cut(others, noise, keep))
        subnet.counts()  # asked for now, and not at the first exchange

    def step_(self, run: Training) -> None:
        if run.step % self.every(run) == 0 and run.progress < self.until:
            self.exchange_(run, random(run.subnet.weights(), seed_from(self.seed, run.step)), self.drop_rate)

    def every(self, run: Training) -> int:
        """Optimizer steps between two exchanges."""
        return self.interval or run.steps_per_epoch

    def exchange_(self, run: Training, grow: Mapping[str, Tensor], rate: float) -> None:
        """In every layer drop this fraction of the kept weights, the smallest, and grow as many of the best."""
        subnet, old, counts = run.subnet, run.subnet.device_mask(), run.subnet.counts()
        drop = magnitude(subnet.device_weights())
        found = {
            n: exchange(mask, drop[n], grow[n].to(mask.device), round(rate * counts[n]), counts[n])
            for n, mask in old.items()
        }
        run.forget_(Lazy(found, lambda name: found[name] & ~old[name]))  # what has grown: it begins anew
        subnet.set_mask_(Counted(found, counts))

    def runs(self, subnet: Subnet) -> int:
        return 1
