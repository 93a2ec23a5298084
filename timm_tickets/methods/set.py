"""SET: sparse evolutionary training.

Source: Mocanu et al. 2018, 1707.04780.
"""

from collections.abc import Generator, Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from ..end import End
from ..masks import Distribution, exchange, keep_count, total
from ..method import OneShot
from ..registry import register_pruner
from ..run import Run
from ..scores import magnitude, random
from ..seeds import seed_from
from ..settings import SettingError
from ..sharded import local, part
from ..subnet import Subnet


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

    def search(self, subnet: Subnet) -> Generator[list[Run], list[End], None]:
        self.begin_(subnet)
        (yield [Run(after_step=self.step_, reads=())]).clear()
        subnet.restart_()

    def begin_(self, subnet: Subnet) -> None:
        """A random mask of the asked sparsity, each layer as the distribution says."""
        mask, noise = subnet.mask, random(subnet.weights(), self.seed)
        first = {name: mask[name] for name in subnet.names[: 1 if self.dense_first else 0]}
        others = {name: mask[name] for name in mask if name not in first}
        cut = total(mask) - keep_count(total(mask), self.sparsity)
        if cut > total(others):
            raise SettingError(
                f"pruner.dense_first: {cut} weights are to be pruned, and the other layers have {total(others)}; lower "
                "the sparsity, or set it to false"
            )
        subnet.set_mask_(first | self.pruned_masks(others, noise, cut, self.scope, self.distribution))

    def step_(self, run: Run) -> None:
        if run.step % self.every(run) == 0 and run.progress < self.until:
            self.exchange_(run, random(run.subnet.weights(), seed_from(self.seed, run.step)), self.drop_rate)

    def every(self, run: Run) -> int:
        """Optimizer steps between two exchanges."""
        return self.interval or run.steps_per_epoch

    def exchange_(self, run: Run, grow: Mapping[str, Tensor], rate: float) -> None:
        """In every layer drop this fraction of the kept weights, the smallest, and grow as many of the best."""
        subnet, old = run.subnet, run.subnet.mask
        drop = magnitude(subnet.weights_on_cpu())
        new = {n: exchange(mask, drop[n], grow[n].cpu(), round(rate * int(mask.sum()))) for n, mask in old.items()}
        subnet.set_mask_(new)
        # A weight that begins anew has no past: its momentum is from before it was pruned.
        assert run.optimizer is not None
        for name, parameter in subnet.parameters().items():
            grown = part(new[name] & ~old[name], parameter)
            for value in run.optimizer.state[parameter].values():
                if getattr(value, "shape", None) == parameter.shape:
                    local(value).masked_fill_(grown, 0)

    def runs(self, subnet: Subnet) -> int:
        return 1
