"""What a search is stopped or warned for between its rounds."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..core.errors import SettingError, TrainingError
from ..core.masks import collapsed
from ..core.states import digest
from ..core.warn import warn
from ..distributed.collectives import check_same_everywhere
from ..distributed.processes import world_size
from ..sparse.subnet import Subnet
from .method import Method
from .run import Run

if TYPE_CHECKING:
    from .training import Training


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


def check_round(name: str, requests: Any) -> None:
    """Refuse what a method has yielded, where it is no round.

    Raises:
        SettingError: It is no list of runs.
    """
    if not isinstance(requests, Sequence) or not requests or not all(isinstance(one, Run) for one in requests):
        found = "an empty list" if requests == [] else f"a {type(requests).__name__}"
        raise SettingError(
            f"pruner: {name} yields {found}, and a round is a list of runs: write `yield [Run()]` in its `search`"
        )


def tell_training(run: "Training", first_mask: str) -> None:
    """Say of a training that has ended what has not happened in it: steps, its loss, what the method schedules.

    Args:
        run: The training.
        first_mask: Digest of the mask it began with, where that was to move.

    Raises:
        TrainingError: It was to read gradients, and has read none.
    """
    asked, loss = run.request, "take the loss from `run.loss(criterion, output, target)`"
    if run.reads_only and not run.heard and not run.scores:
        raise TrainingError(f"{run.name} is to read gradients, and does so in `run.loss`, which nobody called; {loss}")
    if run.step == 0:
        warn(f"{run.name} ended without an optimizer step; train it on the optimizer that `run.attach` returns")
        return
    own = "the method's penalty" if asked.on_loss is not None else None if run.classes is None else "its classes alone"
    if own is not None and not run.heard and run.stepped:
        warn(f"{run.name} was trained without {own}, as nobody called `run.loss`; {loss}")
    if (asked.after_step is None and not run.start_epoch) or run.reads_only:
        return
    if run.batches_per_epoch is not None:
        over = run.position - run.schedule_epochs
        if over < -0.5 or over >= 1:
            warn(
                f"{run.name} trained up to epoch {run.position:.3g} of a schedule of {run.schedule_epochs}: the "
                "method's own schedule counts on it. Create the pruner with the epochs that are trained, and loop "
                "over `run.epochs`"
            )
    if first_mask and first_mask == digest(run.subnet.mask) and run.subnet.sparsity:
        warn(
            f"{run.name} has not moved its mask in {run.step} steps: it ends with the one it began with. Train "
            "longer, or let the method move it more often (its `interval`, where it has one; its learning rate)"
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
