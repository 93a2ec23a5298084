"""Units: what is cut as one, and what an asked sparsity is a fraction of."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..core.errors import SettingError
from ..core.masks import Distribution, Masks, Scope, cut, keep_count, kept, total
from ..core.patterns import Granularity, cut_blocks, cut_n_of_m, filled_up, fitting, parsed
from ..distributed.fsdp2 import reshard_
from ..sparse.subnet import Subnet
from ..sparse.wrappers import plain_model
from .find import PATIENCE, find_groups
from .groups import TRANSPOSED, Groups

Of = Literal["weights", "channels", "macs"]


class Weights:
    """Single weights: every cut is exact.

    Args:
        pairs: Names of the weights that the model standardises, of which a channel keeps two or none.
    """

    def __init__(self, pairs: Collection[str] = ()):
        self.pairs = pairs

    def total(self, masks: Mapping[str, Tensor]) -> int:
        """What the sparsity is a fraction of: so many units lie under the masks."""
        return total(masks)

    def kept(self, masks: Mapping[str, Tensor]) -> int:
        """Units kept."""
        return kept(masks)

    def check(self, masks: Mapping[str, Tensor], sparsity: float) -> None:
        """Refuse a sparsity that cannot be met.

        Raises:
            SettingError: It cannot.
        """
        keep_count(self.total(masks), sparsity)

    def cut(
        self,
        masks: Mapping[str, Tensor],
        scores: Mapping[str, Tensor],
        keep: int,
        scope: Scope,
        distribution: Distribution,
        spare: Collection[str],
    ) -> Masks:
        """Of what masks keep, the best: so many units, or as near below as they allow."""
        # Scores of another shape are a method's own rows of them.
        pairs = [name for name in masks if name in self.pairs and masks[name].ndim > 1]
        return cut(masks, scores, keep, scope, distribution, spare, pairs)

    def common(self, masks: Masks, before: Mapping[str, Tensor], scores: Mapping[str, Tensor]) -> Masks:
        """What several masks have in common, made such as a cut may leave it.

        Args:
            masks: What all of them keep.
            before: What was kept before they were cut.
            scores: Float; what comes back where a pattern has too few is the best.
        """
        return masks

    def told(self, masks: Mapping[str, Tensor]) -> dict[str, Any]:
        """What a ticket says of the units besides their number."""
        return {}

    def starved(self, masks: Mapping[str, Tensor]) -> list[str]:
        """Layers left with no more than the least that a cut leaves, each with how many that is; of channels alone."""
        return []


class Pattern(Weights):
    """n of every m entries of a row, or blocks, in the layers whose matrix they fit; the others stay whole.

    Of ``n:m`` the sparsity is a fraction of the weights of those layers, so 1 - n / m; of blocks, of all weights.

    Args:
        granularity: The pattern.
        model: The model.
        shapes: Of the prunable weights, by name.

    Attributes:
        names: The layers that it fits.

    Raises:
        SettingError: It fits none.
    """

    def __init__(self, granularity: Granularity, model: nn.Module, shapes: Mapping[str, tuple[int, ...]]):
        self.granularity = granularity
        modules = dict(plain_model(model).named_modules())
        plain = {
            name: shape
            for name, shape in shapes.items()
            if not isinstance(modules.get(name.rpartition(".")[0]), TRANSPOSED) and len(shape) > 1
        }
        self.names = fitting(plain, granularity)
        if not self.names:
            wanted = f"{granularity.second} columns"
            wanted = f"{granularity.first} rows and {wanted}" if granularity.kind == "block" else wanted
            raise SettingError(
                f"granularity: of the {len(shapes)} prunable layers none has a matrix (out, in * kernel) of a multiple "
                f"of {wanted}; choose a smaller pattern, or granularity=weight"
            )

    def total(self, masks: Mapping[str, Tensor]) -> int:
        return total(self._mine(masks) if self.granularity.kind == "n:m" else masks)

    def kept(self, masks: Mapping[str, Tensor]) -> int:
        return kept(self._mine(masks) if self.granularity.kind == "n:m" else masks)

    def check(self, masks: Mapping[str, Tensor], sparsity: float) -> None:
        _, n, m = self.granularity
        if self.granularity.kind == "n:m" and abs(sparsity - (1 - n / m)) > 1e-9:
            raise SettingError(
                f"sparsity: {sparsity} contradicts granularity={n}:{m}, which keeps {n} of {m} weights in each of the "
                f"{len(self.names)} layers that it fits; set sparsity={1 - n / m:g}, or another granularity"
            )
        keep, rest = keep_count(self.total(masks), sparsity), total(masks) - total(self._mine(masks))
        if self.granularity.kind == "block" and keep - rest < n * m:
            raise SettingError(
                f"sparsity: {sparsity} cannot be met with blocks of {n}x{m}: {rest} of {total(masks)} weights are in "
                f"layers that they do not fit, and stay; ask for at most {1 - (rest + n * m) / total(masks):.4g}, or "
                "leave these layers out with exclude"
            )

    def cut(
        self,
        masks: Mapping[str, Tensor],
        scores: Mapping[str, Tensor],
        keep: int,
        scope: Scope,
        distribution: Distribution,
        spare: Collection[str],
    ) -> Masks:
        kind, n, m = self.granularity
        mine = self._mine(masks)
        spare = [name for name in spare if name in mine]
        if kind == "n:m":
            found = cut_n_of_m(mine, scores, min(keep, kept(mine)), n, m, scope, spare)
        else:
            keep -= kept(masks) - kept(mine)
            found = cut_blocks(mine, scores, keep, n, m, scope, distribution, spare)
        return {name: found.get(name, masks[name]) for name in masks}

    def common(self, masks: Masks, before: Mapping[str, Tensor], scores: Mapping[str, Tensor]) -> Masks:
        kind, n, m = self.granularity
        return masks | filled_up(self._mine(masks), before, scores, n, m) if kind == "n:m" else masks

    def told(self, masks: Mapping[str, Tensor]) -> dict[str, Any]:
        return {"whole_layers": [name for name in masks if name not in self.names]}

    def _mine(self, masks: Mapping[str, Tensor]) -> Masks:
        return {name: masks[name] for name in self.names}


@dataclass
class Channels(Weights):
    """Groups of rows and columns: channels and heads.

    Attributes:
        groups: They.
        of: What the sparsity is a fraction of: the prunable weights, the groups, or the multiplications of a forward
            pass by prunable weights.
        round_to: Channels that a layer keeps are a multiple of it; heads are not rounded.
        least: Channels that every layer keeps; at least one head.
    """

    groups: Groups
    of: Of = "weights"
    round_to: int = 1
    least: int = 1

    def total(self, masks: Mapping[str, Tensor]) -> int:
        if self.of == "channels":
            return len(self.groups)
        return sum(mask.numel() * self._each(name) for name, mask in masks.items())

    def kept(self, masks: Mapping[str, Tensor]) -> int:
        if self.of == "channels":
            return len(self.groups) - int(self.gone(masks).sum())
        return sum(int(mask.sum()) * self._each(name) for name, mask in masks.items())

    def check(self, masks: Mapping[str, Tensor], sparsity: float) -> None:
        keep, chunks = keep_count(self.total(masks), sparsity), self._chunks(torch.arange(float(len(self.groups))))
        gone = torch.zeros(len(self.groups), dtype=torch.bool)
        for _, members in chunks:
            gone[members] = True
        if (left := self._left(masks, gone)) > keep:
            unit = {"weights": "weights", "channels": "groups", "macs": "multiplications"}[self.of]
            raise SettingError(
                f"sparsity: {sparsity} cannot be met: of {self.total(masks)} {unit} {left} stay where every layer "
                f"keeps {self.floor} channels and what is in no group stays; ask for at most "
                f"{1 - left / self.total(masks):.4g} (`timm-tickets inspect ARCH --granularity channel` shows groups)"
            )

    @property
    def floor(self) -> int:
        """Channels that a cut leaves in every layer that has as many."""
        return -(-self.least // self.round_to) * self.round_to

    def gone(self, masks: Mapping[str, Tensor]) -> Tensor:
        """The groups that masks prune whole: bool, a group each."""
        alive = torch.zeros(len(self.groups), dtype=torch.bool)
        for (name, dim), ids in self.groups.of.items():
            alive[ids[_any_along(masks[name], dim) & (ids >= 0)]] = True
        return ~alive

    def cut(
        self,
        masks: Mapping[str, Tensor],
        scores: Mapping[str, Tensor],
        keep: int,
        scope: Scope,
        distribution: Distribution,
        spare: Collection[str],
    ) -> Masks:
        return self.cut_by(masks, lambda: self.means(masks, scores), keep, scope)

    def cut_by(self, masks: Mapping[str, Tensor], score: Callable[[], Tensor], keep: int, scope: Scope) -> Masks:
        """As `cut`, by a score of each group; it is asked for only where a group has to go."""
        before = self.gone(masks)
        if self._left(masks, before) <= keep:
            return dict(masks)
        chunks = self._chunks(score(), before, scope)

        def after(count: int) -> Tensor:
            gone = before.clone()
            for _, members in chunks[:count]:
                gone[members] = True
            return gone

        low, high = 0, len(chunks)  # with `low` chunks gone there are too many left
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self._left(masks, after(middle)) <= keep else (middle, high)
        found = self.groups.mask(after(high))
        return {name: mask & found[name].to(mask.device) for name, mask in masks.items()}

    def means(self, masks: Mapping[str, Tensor], scores: Mapping[str, Tensor]) -> Tensor:
        """Mean score of the weights that each group still has; an entry in a row and a column of it counts twice."""
        sums, counts = (torch.zeros(len(self.groups), dtype=torch.float64) for _ in range(2))
        for name in dict.fromkeys(name for name, _ in self.groups.of):
            mask = masks[name]
            score = scores[name].detach().to(mask.device, torch.float64).masked_fill(~mask, 0)
            for (one, dim), ids in self.groups.of.items():
                if one == name:
                    others = [axis for axis in range(mask.ndim) if axis != dim]
                    sums.index_add_(0, ids[ids >= 0], score.sum(others).cpu()[ids >= 0])
                    counts.index_add_(0, ids[ids >= 0], mask.sum(others).cpu().double()[ids >= 0])
        if sums.isnan().any():
            raise ValueError("scores: NaN among them; the weights they come from are probably NaN too")
        return sums / counts.clamp(min=1)

    def told(self, masks: Mapping[str, Tensor]) -> dict[str, Any]:
        gone = int(self.gone(masks).sum())
        return {"groups": len(self.groups), "groups_removed": gone, "families": len(self.groups.families)}

    def starved(self, masks: Mapping[str, Tensor]) -> list[str]:
        alive = self.groups.family[~self.gone(masks)].bincount(minlength=len(self.groups.families)).tolist()
        pairs = zip(self.groups.families, alive, strict=True)
        return [f"{one.makes[0][0]} {n} of {one.count}" for one, n in pairs if n <= self.floor < one.count // 4]

    def _chunks(
        self, score: Tensor, gone: Tensor | None = None, scope: Scope = "layerwise"
    ) -> list[tuple[tuple[float, float], Tensor]]:
        """What may go, in the order in which it does: a key and the groups that go together."""
        found = []
        for number, family in enumerate(self.groups.families):
            mine = self.groups.family == number
            mine = (mine if gone is None else mine & ~gone).nonzero().flatten().flip(0)
            order = mine[score[mine].argsort(stable=True)]  # of equals the later goes first
            step = self.round_to if family.kind == "channel" else 1
            least, left, at = max(1, self.least if family.kind == "channel" else 1), len(order), 0
            while (after := (left - 1) // step * step) >= least:
                members = order[at : at + left - after]
                at, left = at + len(members), after
                worst, share = float(score[members[-1]]), 1 - left / family.count
                key = (share, worst) if scope == "layerwise" else (worst, share)
                found.append((key, members))
        return sorted(found, key=lambda one: one[0])

    def _left(self, masks: Mapping[str, Tensor], gone: Tensor) -> int:
        """Units left when these groups are gone, the masks' own among them."""
        if self.of == "channels":
            return len(gone) - int(gone.sum())
        dead = torch.cat([gone, gone.new_zeros(1)])  # -1, which is no group
        left: dict[str, int] = {}
        for (name, dim), ids in self.groups.of.items():
            size = self.groups.shapes[name][dim]
            left[name] = left.get(name, masks[name].numel()) // size * (size - int(dead[ids].sum()))
        return sum(left.get(name, mask.numel()) * self._each(name) for name, mask in masks.items())

    def _each(self, name: str) -> int:
        return 1 if self.of == "weights" else self.groups.positions[name]


def units_of(
    granularity: str,
    subnet: Subnet,
    wanted: tuple[Any, Any, bool],
    counted: tuple[Of, int, int] = ("weights", 1, 1),
) -> Weights:
    """The units of a model.

    Args:
        granularity: As it is written.
        subnet: The model with its mask.
        wanted: The pruner's include, exclude and classifier.
        counted: The ``of``, ``round_to`` and ``least`` of `Channels`.

    Raises:
        SettingError: The model has none.
    """
    found = parsed(granularity)
    if found.kind == "weight":
        return Weights(subnet.standardised)
    if reshard_(subnet.model):
        raise SettingError(
            f"granularity: {granularity} is found in the whole model, and FSDP2 has split this one; search with DDP, "
            "or in one process, and train the ticket with FSDP2"
        )
    shapes = {name: tuple(mask.shape) for name, mask in subnet.mask.items()}
    if found.kind in ("n:m", "block"):
        return Pattern(found, subnet.model, shapes)
    groups = find_groups(subnet.model, *wanted, seconds=PATIENCE, removable=True)
    if found.kind == "head":
        groups = groups.heads()
    if not len(groups):
        raise SettingError(
            f"granularity: {type(subnet.model).__name__} has no {found.kind}s that can be removed; `timm-tickets "
            f"inspect ARCH --granularity {found.kind}` says why, granularity=weight prunes single weights"
        )
    return Channels(groups, *counted)


def _any_along(mask: Tensor, dim: int) -> Tensor:
    return mask.movedim(dim, 0).flatten(1).any(1).cpu()
