"""Frozen strong lottery tickets: part of a random network leaves the search before it begins.

Source: Otsuka et al. 2024, 2402.14029 (TMLR 2025).
"""

from typing import Annotated, Any, Literal

from pydantic import Field

from ..core.errors import SettingError
from ..core.masks import Distribution, Masks, Scope, all_kept, budgets, fill, keep_count, total
from ..core.scores import magnitude
from ..pruning.registry import register_pruner
from ..sparse.random_start import FirstScores
from ..sparse.subnet import Subnet
from .edge_popup import EdgePopup


@register_pruner("frozen_slt")
class FrozenSLT(EdgePopup):
    """edge-popup over the weights left free by a random freezing: some pruned, some locked (kept), for good.

    Suggested: `frozen` 0.5 to 0.7, split as the paper's rule has it: sparsity of it pruned, the rest locked. Or give
    `pruned` and `locked`; sparsity must lie between pruned and 1 - locked. epl where to freeze.
    Cost: one training; a frozen weight has no score, no gradient and no place in the optimizer.
    Departures: ratios that cannot be met are refused; the released code accepts them.
    """

    scope: Annotated[Scope, Field(description="compare free scores across all layers, or within each")] = "global"
    frozen: Annotated[
        float | None, Field(ge=0, lt=1, description="fraction of the weights that leave the search; 0.5 if not given")
    ] = None
    pruned: Annotated[
        float | None, Field(ge=0, lt=1, description="fraction frozen as pruned; with locked instead of frozen")
    ] = None
    locked: Annotated[
        float | None, Field(ge=0, lt=1, description="fraction frozen as kept; with pruned instead of frozen")
    ] = None
    freezing: Annotated[Distribution, Field(description="density of the free weights in each layer")] = "epl"
    split: Annotated[
        Literal["shares", "released"],
        Field(
            description="what of a layer's frozen weights is pruned: the same share in each layer, or, as released, "
            "what `freezing` at the density 1 - pruned leaves out; the rest is locked"
        ),
    ] = "shares"
    first_scores: Annotated[FirstScores, Field(description="draw of the first scores, as edge_popup's")] = "normal"

    def of_weights(self) -> str:
        return "freezes single weights"

    def ratios(self) -> tuple[float, float]:
        """The fractions frozen as pruned and as kept.

        Raises:
            SettingError: The asked sparsity cannot be met with them.
        """
        if (self.pruned is None) != (self.locked is None):
            raise SettingError("pruner.pruned and pruner.locked: give both, or neither and `frozen` instead")
        if self.pruned is None or self.locked is None:
            frozen = 0.5 if self.frozen is None else self.frozen
            return frozen * self.sparsity, frozen * (1 - self.sparsity)
        if self.frozen is not None:
            raise SettingError("pruner.frozen: is the sum of pruned and locked, which are given; leave it out")
        if not self.pruned - 1e-9 <= self.sparsity <= 1 - self.locked + 1e-9:
            raise SettingError(
                f"pruner.sparsity: {self.sparsity} cannot be met with {self.pruned} frozen as pruned and {self.locked} "
                f"as kept; it must lie between {self.pruned} and {1 - self.locked:g}"
            )
        if self.pruned + self.locked >= 1:
            raise SettingError("pruner.pruned and pruner.locked: nothing is left free; their sum must be below 1")
        return self.pruned, self.locked

    def frozen_counts(self, subnet: Subnet) -> dict[str, tuple[int, int]]:
        """How many weights of each layer are frozen as pruned and as kept."""
        shapes = {name: weight.shape for name, weight in subnet.weights().items()}
        sizes = {name: shape.numel() for name, shape in shapes.items()}
        count = sum(sizes.values())
        pruned, locked = (round(count * ratio) for ratio in self.ratios())
        keep = keep_count(count, self.sparsity)
        pruned, locked = min(pruned, count - keep), min(locked, keep)  # each rounded by itself
        free = budgets(shapes, count - pruned - locked, self.freezing)
        frozen = {name: sizes[name] - free[name] for name in sizes}
        most = {n: min(frozen[n], sizes[n] - 1) for n in sizes} if self.collapse == "prevent" else frozen
        if pruned > (most_gone := sum(most.values())):
            raise SettingError(
                f"pruner.frozen: {pruned} weights are to leave as pruned, {most_gone} can where every layer keeps one; "
                "lower frozen or the sparsity, or set collapse=warn"
            )
        if self.split == "released":
            left = budgets(shapes, count - pruned, self.freezing)
            # Rounded by itself, a layer's budget may exceed what is frozen by a weight, which then goes to any other.
            shares = {name: (sizes[name] - left[name]) * count + most[name] for name in sizes}
        else:
            shares = frozen
        gone = fill(pruned, shares, most) if pruned else dict.fromkeys(sizes, 0)
        return {name: (gone[name], frozen[name] - gone[name]) for name in sizes}

    def mask_of_scores(self, subnet: Subnet) -> Masks:
        """Keep the locked and, of the free, the largest |scores|: exactly the asked number of weights is pruned."""
        masks, frozen = subnet.device_mask(), self.frozen_counts(subnet)
        keep = keep_count(total(masks), self.sparsity) - sum(locked for _, locked in frozen.values())
        bare = [name for name, (_, locked) in frozen.items() if self.collapse == "prevent" and not locked]
        # Flat, as the gates have them: in the weights' shapes half of them would be zeros of frozen weights.
        scores = subnet.device_scores(free=True)
        found = self.cut(all_kept(scores), magnitude(scores), keep, spare=bare)
        free: Any = {name: gate.free for name, gate in subnet.gates.items()}  # all of them have one, from `prepare_`
        return {n: mask.masked_scatter(free[n].to(mask.device), found[n]) for n, mask in masks.items()}
