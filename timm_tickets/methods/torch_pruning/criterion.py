"""What torch-pruning's criteria share: groups, how often they train, where they return to."""

from collections.abc import Generator, Mapping
from functools import partial
from typing import Annotated, Any

import torch
from pydantic import Field, model_validator
from torch import Tensor
from typing_extensions import Self

from ...core.errors import SettingError
from ...core.masks import Scope, Scores, keep_count
from ...core.optional import torch_pruning
from ...core.settings import settings
from ...core.warn import warn
from ...pruning.method import Granularity, Method
from ...pruning.run import Rewind, Run
from ...pruning.run_end import End
from ...sparse.subnet import Subnet
from ...structure.dependencies import importances, items_of, read_by, with_gradients
from ...structure.units import Channels


@settings
class Criterion(Method):
    """Cuts whole channels by an importance of torch-pruning's: that of each group, computed by the library itself."""

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
        if self.rewind is not None and not self.rounds:
            raise ValueError("rewind: with rounds=0 nothing is trained; set rounds to 1 or more, or leave rewind out")
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
        types = read_by(self.importance(torch_pruning(f"pruner.name: {self.name}")))
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
            told = ", ".join(left[:3]) + (f" and {len(left) - 3} more" if len(left) > 3 else "")
            warn(f"{self.name}: its criterion reads no layer of {len(left)} families of channels, which stay: {told}")
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
        units, importance = self.channels, self.importance(torch_pruning(self.name))
        items = items_of(subnet.model, units.groups, read_by(importance), units.gone(subnet.mask))
        return importances(items, importance, len(units.groups), with_gradients(subnet.model, gradients), self.seed)

    def runs(self, subnet: Subnet) -> int:
        return self.rounds
