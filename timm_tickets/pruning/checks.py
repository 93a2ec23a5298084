"""What a search is stopped or warned for before it begins, and between its rounds."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..core.errors import SettingError, TrainingError
from ..core.masks import collapsed
from ..core.states import digest
from ..core.warn import warn
from ..distributed.collectives import check_same_everywhere
from ..distributed.fsdp2 import local
from ..distributed.processes import world_size
from ..sparse.describe import model_name
from ..sparse.gates import Gate
from ..sparse.holder import is_held
from ..sparse.standardised import lone_weights, only_lone_weights
from ..sparse.subnet import Subnet
from ..sparse.wrappers import plain_model
from .method import Method
from .run import Run

if TYPE_CHECKING:
    from .training import Training


def refuse_gated(model: nn.Module) -> None:
    """Refuse a model on which another pruner still learns its masks.

    Raises:
        SettingError: It is one.
    """
    gates = sum(isinstance(module, Gate) for module in model.modules())
    if gates:
        raise SettingError(
            f"model: an earlier pruner has not ended its search, and its gates are still before {gates} weights of "
            f"this {model_name(plain_model(model))}; iterate that pruner to its end, or create the model again"
        )


def tell_used(subnet: Subnet) -> None:
    """Say where a model has been through a search before: another one begins with every weight kept, as it then is.

    A layer that is zero throughout is how some models begin, and trained ones have a few dead filters: ImageNet's
    efficientnet_lite0 has 0.2 % of zeros. So little is passed over.
    """
    weights = [local(weight) for weight in subnet.weights().values() if not weight.is_meta]
    zeros = [int((weight == 0).sum()) for weight in weights]
    found = []
    size, layers = sum(weight.numel() for weight in weights), sum(map(bool, zeros))
    if sum(count for count, weight in zip(zeros, weights, strict=True) if count < weight.numel()) > 0.05 * size:
        found.append(
            f"{sum(zeros):,} of its {size:,} prunable weights are exactly zero already, in {layers} of "
            f"{len(weights)} layers"
        )
    if is_held(subnet.model):
        found.append("the hooks that hold its masks are still on it")
    if found:
        warn(
            f"this {model_name(subnet.model)} has been through a pruner or ticket before: {', and '.join(found)}. The "
            "search begins with every weight kept, zeros as well, from the values as they are. For a new search create "
            "the model again; to prune these weights further go on"
            + ", `run.attach` takes the hooks off"
            * is_held(subnet.model)
        )


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


def warn_of_thin_layers(method: Method, subnet: Subnet) -> None:
    """Say, at the end of a search, through which layers next to nothing passes any more.

    Those of which scope=global has left the least of channels, and standardised ones whose output channels keep a
    single weight.
    """
    if getattr(method, "scope", "layerwise") == "global" and (thin := method.units.starved(subnet.mask)):
        warn(
            f"{method.name}: scope=global has left the fewest channels that it may in {_few(thin)}, and all images "
            "pass through those; set scope=layerwise, or min_channels higher"
        )
    masks = {layer: subnet.mask[layer] for layer in subnet.names if layer in subnet.standardised}
    if alone := lone_weights(masks):
        channels = sum(len(mask) for mask in masks.values())
        warn(
            f"{method.name}: {sum(alone.values())} of {channels} output channels of weight-standardised layers keep a "
            f"single weight ({_few([f'{layer} {count}' for layer, count in alone.items()])}), which standardising "
            "makes zero: nothing passes through them. Lower the sparsity, or leave these layers out with exclude"
        )


def _few(layers: Sequence[str]) -> str:
    return ", ".join(layers[:5]) + (f" and {len(layers) - 5} more layers" if len(layers) > 5 else "")


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
    if (not asked.moves and not run.start_epoch) or run.reads_only:
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
