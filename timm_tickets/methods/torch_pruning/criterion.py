"""What torch-pruning's criteria share: groups, how often they train, where they return to."""

from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from typing_extensions import Self

from ...core.errors import SettingError
from ...core.masks import Scope, Scores, keep_count
from ...core.optional import torch_pruning
from ...core.seeds import seed_from
from ...core.settings import settings
from ...core.warn import warn
from ...pruning.method import Granularity, Method
from ...pruning.run import Rewind, Run
from ...pruning.run_end import End
from ...sparse.subnet import Subnet
from ...structure.dependencies import items_of
from ...structure.units import Channels

ANY = (nn.Module,)  # what an importance without types of its own reads
_NOISE = 0x7070  # the stream of random importances, told from others of the same seed


@settings
class Criterion(Method):
    """Cuts whole channels by an importance of torch-pruning's: that of each group, computed by the library itself."""

    follows_vectors: ClassVar[bool] = True
    granularity: Granularity = "channel"
    scope: Annotated[Scope, Field(description="compare channels across all layers, or within each")] = "layerwise"
    rounds: Annotated[
        int, Field(ge=0, description="trainings, each followed by a cut; 0 cuts the weights as they are given, once")
    ] = 0
    rewind: Annotated[
        Rewind | None,
        Field(description="step the weights return to after each cut; they stay as trained where not given"),
    ] = None

    @model_validator(mode="after")
    def _whole_channels(self) -> Any:
        if self.granularity not in ("channel", "head"):
            raise ValueError(
                f"granularity: {self.granularity!r} cannot be had with {self.name}, which compares whole channels; "
                "set channel or head, or leave it out"
            )
        return self

    @property
    def channels(self) -> Channels:
        """The units of the pruner's own copy."""
        assert isinstance(self.units, Channels)  # as `_whole_channels` has seen to
        return self.units

    def importance(self, tp: Any) -> Any:
        """The importance of torch-pruning's."""
        raise NotImplementedError

    def on(self, subnet: Subnet) -> Self:
        """As any method, of the families alone that have a layer which the importance reads."""
        types = getattr(self.importance(torch_pruning(f"pruner.name: {self.name}")), "target_types", ANY)
        bound = super().on(subnet)
        units = bound.channels
        read = {one.family for one in items_of(subnet.model, units.groups, types)}
        left = [one.name for number, one in enumerate(units.groups.families) if number not in read]
        if not read:
            told = " or ".join(sorted({one.__name__.strip("_") for one in types}))
            raise SettingError(
                f"pruner.name: {self.name} compares channels by their {told}, and none of this model has one; take "
                "another, such as tp_magnitude"
            )
        if left:
            warn(f"{self.name}: its criterion reads no layer of {len(left)} families of channels, which stay: {left}")
            keep = torch.tensor([number in read for number in range(len(units.groups.families))])
            units.groups = units.groups.only(keep)
            units.check(subnet.mask, self.sparsity)
        return bound

    def search(self, subnet: Subnet) -> Generator[list[Run], list[End], None]:
        whole, cuts = self.total(subnet.mask), max(1, self.rounds)
        for cut in range(cuts):
            if self.rounds:
                yield [self.training(first=cut == 0)]
            gradients = yield from self.read(subnet)
            keep = keep_count(whole, self.sparsity * (cut + 1) / cuts)  # torch-pruning's linear schedule
            scores = partial(self.scores, subnet, gradients)
            subnet.set_mask_(self.channels.cut_by(subnet.mask, scores, keep, self.scope))
            if self.rounds and self.rewind is None:
                subnet.restart_()
            elif self.rounds:
                subnet.rewind_()

    def training(self, first: bool) -> Run:
        """The training before a cut."""
        returns = self.rewind is not None
        return Run(rewind=self.rewind if first else None, from_rewind=returns and not first)

    def read(self, subnet: Subnet) -> Generator[list[Run], list[End], Scores]:
        """Runs for the gradients that the criterion reads, and these by parameter name; none where it reads none."""
        yield from ()
        return {}

    def scores(self, subnet: Subnet, gradients: Mapping[str, Tensor]) -> Tensor:
        """The importance of each group that is left, as torch-pruning computes it."""
        units = self.channels
        importance = self.importance(torch_pruning(self.name))
        out, types = torch.zeros(len(units.groups), dtype=torch.float64), getattr(importance, "target_types", ANY)
        with _readable(subnet.model, gradients), torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed_from(self.seed, _NOISE))
            for one in items_of(subnet.model, units.groups, types, units.gone(subnet.mask)):
                out[one.of] = one.means(importance(one.group), len(out))[one.of]
        return out

    def runs(self, subnet: Subnet) -> int:
        return self.rounds


@contextmanager
def _readable(model: nn.Module, gradients: Mapping[str, Tensor]) -> Iterator[None]:
    """Within the block parameters have these gradients, where torch-pruning looks for them."""
    named = {name: one for name, one in model.named_parameters() if name in gradients}
    before = {name: one.grad for name, one in named.items()}
    try:
        for name, one in named.items():
            one.grad = gradients[name].to(one)
        yield
    finally:
        for name, one in named.items():
            one.grad = before[name]
