"""Any of timm's training tasks under a ticket or a pruner (`wrap`), for timm's train.py and loops like it."""

import functools
import inspect
from pathlib import Path
from typing import Any, TypeVar

from timm.task import ClassificationTask
from timm.task.task import TrainingTask
from timm.utils import unwrap_model
from torch import nn

from ..core.errors import SettingError
from ..pruning.pruner import Pruner
from ..tickets.ticket import Ticket
from .ticketed import Ticketed
from .trained import Start, given

# timm 1.0.27 has no criterion of its own.
_OWN = inspect.signature(ClassificationTask).parameters
_WANTS_CRITERION = _OWN["criterion"].default is inspect.Parameter.empty
T = TypeVar("T", bound=TrainingTask)


class TicketTask(Ticketed, ClassificationTask):
    """A `ClassificationTask` that trains a ticket, or one run of a pruner: what `wrap` makes of one, in one call.

    Args:
        model: The model to train, as timm created it; before ``torch.compile`` and DDP.
        ticket: As all that follow here, as for `wrap`.
        pruner: As there.
        start: As there.
        start_epoch: As there.
        folder: As there.
        epochs: As there.
        **kwargs: As for `ClassificationTask`; all others are settings of the pruner.

    Raises:
        SettingError: As `wrap`.
        TicketError: The ticket does not fit the model.
    """

    def __init__(
        self,
        model: nn.Module,
        *args: Any,
        ticket: Ticket | str | Path | None = None,
        pruner: Pruner | str | None = None,
        start: Start | None = None,
        start_epoch: float | None = None,
        folder: str | Path | None = None,
        epochs: int | None = None,
        **kwargs: Any,
    ):
        settings = {key: kwargs.pop(key) for key in [*kwargs] if key not in _OWN}
        if not args and _WANTS_CRITERION:
            kwargs.setdefault("criterion", nn.CrossEntropyLoss())
        super().__init__(model, *args, **kwargs)
        self.take_(given(unwrap_model(model), ticket, pruner, start, start_epoch, folder, epochs, settings))


def wrap(
    task: T,
    *,
    ticket: Ticket | str | Path | None = None,
    pruner: Pruner | str | None = None,
    start: Start | None = None,
    start_epoch: float | None = None,
    folder: str | Path | None = None,
    epochs: int | None = None,
    **settings: Any,
) -> T:
    """Have one of timm's tasks train a ticket, or one run of a pruner. In timm's train.py::

        from timm_tickets import wrap
        task = wrap(task, ticket="resnet18.ticket")                     # once the task is there, whichever it is
        optimizer, loader_train = task.attach(optimizer, loader_train)  # once both are there

    Pruned weights are exactly zero in the model and in its EMA; ``sparsity`` joins the metrics of the task's evaluator.
    Checkpoints have timm's own keys; the masks, and how far a run has come, are in their ``task_state``, and
    ``--resume`` checks that it goes on with the same ticket or run. While a pruner is still on its way to the asked
    sparsity, epochs do not count for timm's best checkpoint once it is reached.

    One training is one run. A pruner that cuts before training (``magnitude``, ``random``) asks for none: its ticket is
    what is trained. A pruner of one run (``gradual``, ``set``, ``rigl``) is done with the training. One of several
    (``imp``, ``colt``) is chained by its folder: each call of train.py with the same folder trains the next run. A run
    is written down with the first checkpoint after its last epoch, and after the last run ``final.ticket`` is in the
    folder; a call after that trains it. Validation stays train.py's, over all classes.

    Of weight-standardised layers (NFNet, BiT, hybrid ViT) what an output channel keeps is held at mean zero, so that a
    plain timm model, which standardises the checkpoint's weights, computes the sparse network too.

    Args:
        task: A task, before it is compiled or distributed; it is changed in place.
        ticket: A ticket, or the path of one.
        pruner: The name of a pruner, whose settings follow; or a pruner of the task's model.
        start: Whose weights a ticket's training starts from: the ``ticket``'s (where not given); the ``model``'s, as
            ``--initial-checkpoint`` has given them; or ``transfer``, the ticket's on a model with another head.
        start_epoch: Epochs of the schedule that lie before a ticket's weights; where not given, those of its rewind
            point.
        folder: Where a search by a pruner's name is written down.
        epochs: How many the script trains: train.py's ``args.epochs``, and its cooldown epochs.
        **settings: Of the pruner.

    Returns:
        The task.

    Raises:
        SettingError: Not one of ticket and pruner; a pruner whose runs are no plain trainings of one model, or were
            created for other epochs; or a task that is wrapped already.
        TicketError: The ticket does not fit the model.
    """
    if not isinstance(task, TrainingTask):
        raise SettingError(f"task: a {type(task).__name__} is none of timm's training tasks (timm.task)")
    if isinstance(task, Ticketed):
        raise SettingError("task: it trains a ticket or a run already; wrap it once")
    model = unwrap_model(task.get_eval_model())
    trained = given(model, ticket, pruner, start, start_epoch, folder, epochs, settings)
    wrapped: Any = task
    wrapped.__class__ = _ticketed(type(task))
    wrapped.take_(trained)
    return wrapped


@functools.cache
def _ticketed(kind: type[TrainingTask]) -> type[TrainingTask]:
    return type(kind.__name__, (Ticketed, kind), {"__module__": kind.__module__, "__doc__": kind.__doc__})
