"""What a search is stopped or warned for between its rounds."""

from collections.abc import Mapping

from torch import Tensor

from ..core.errors import SettingError
from ..core.masks import collapsed
from ..core.states import digest
from ..core.warn import warn
from ..distributed.collectives import check_same_everywhere
from ..distributed.processes import world_size
from ..sparse.standardised import lone_weights, only_lone_weights
from ..sparse.subnet import Subnet
from .method import Method


def refuse_split(method: Method) -> None:
    """Refuse a search on a model that FSDP2 has split, where the method cannot do with it.

    Raises:
        SettingError: It cannot.
    """
    if method.reads_gradients:
        raise SettingError(
            f"pruner: {method.name} reads gradients before `backward`, which FSDP2 does not give; search with DDP, or "
            "in one process, and train the ticket with FSDP2"
        )


def check_same_masks(name: str, masks: Mapping[str, Tensor]) -> None:
    """Stop where the processes hold different masks; one process has nothing to hash them for.

    Raises:
        RuntimeError: They do.
    """
    if world_size() > 1:
        check_same_everywhere(f"the mask of {name}", digest(masks))


def warn_of_lone_weights(name: str, subnet: Subnet) -> None:
    """Say, at the end of a search, which standardised layers have output channels that keep a single weight."""
    masks = {layer: subnet.mask[layer] for layer in subnet.names if layer in subnet.standardised}
    if alone := lone_weights(masks):
        channels = sum(len(mask) for mask in masks.values())
        told = ", ".join(f"{layer} {count}" for layer, count in [*alone.items()][:5])
        told += f" and {len(alone) - 5} more layers" if len(alone) > 5 else ""
        warn(
            f"{name}: {sum(alone.values())} of {channels} output channels of weight-standardised layers keep a single "
            f"weight ({told}), which standardising makes zero: nothing passes through them. Lower the sparsity, or "
            "leave these layers out with exclude"
        )


class EmptyLayers:
    """Reports layers that a search has pruned to nothing, each once; refuses them where `collapse` says so.

    Args:
        method: The search's.
    """

    def __init__(self, method: Method):
        self.method = method
        self._told: list[str] = []

    def check(self, subnet: Subnet) -> None:
        """Look between the rounds and at the end, where every method passes by.

        A mask that is still being learned is not judged: it may empty a layer at one step and fill it at the next.

        Raises:
            SettingError: A layer is empty, and ``collapse`` is not ``warn``.
        """
        if subnet.gates and not subnet.sealed:
            return
        empty = collapsed(subnet.mask)
        if self.method.collapse != "prevent":  # that keeps a layer's best weight, which standardising makes zero
            empty += [n for n in subnet.names if n in subnet.standardised and only_lone_weights(subnet.mask[n])]
            empty = list(dict.fromkeys(empty))
        new = [name for name in empty if name not in self._told]
        self._told += new
        if not new:
            return
        told = f"{len(empty)} of {len(subnet.names)} layers are pruned to nothing: {', '.join(empty[:8])}"
        told += f" and {len(empty) - 8} more" if len(empty) > 8 else ""
        if self.method.collapse == "warn":
            hint = "nothing passes through them. collapse=prevent keeps the best weight of each, collapse=error stops"
            warn(f"{self.method.name}: {told}; {hint}")
            return
        raise SettingError(
            f"collapse: {told}; lower the sparsity, choose scope=layerwise, leave these layers out with exclude, or "
            "set collapse=prevent or warn"
        )
