"""TicketTask: timm's classification task under a ticket or a pruner, for timm's train.py and loops like it."""

import inspect
import logging
from collections import OrderedDict
from pathlib import Path
from typing import Any

from timm.task import ClassificationTask
from timm.utils import unwrap_model
from torch import Tensor, nn

from ..core.errors import SettingError
from ..core.masks import Masks, kept
from ..distributed.fsdp2 import reshard_
from ..pruning.pruner import Pruner
from ..pruning.training import Training
from ..sparse.subnet import Subnet
from ..tickets.ticket import Ticket, load_ticket

_logger = logging.getLogger(__name__)
# timm 1.0.27 has no criterion of its own.
_WANTS_CRITERION = inspect.signature(ClassificationTask).parameters["criterion"].default is inspect.Parameter.empty


class TicketTask(ClassificationTask):
    """A `ClassificationTask` that trains a ticket, or one run of a pruner. Three lines of timm's train.py change::

        from timm_tickets import TicketTask
        task = TicketTask(model=model, ticket="resnet18.ticket", ...)   # ClassificationTask(model=model, ...) before
        optimizer, loader_train = task.attach(optimizer, loader_train)  # once both are there

    Pruned weights are exactly zero in the model and in its EMA; ``sparsity`` joins the metrics of the task's evaluator,
    and so train.py's ``summary.csv``. Checkpoints have timm's own keys; the masks, and how far a run has come, are in
    their ``task_state``, and ``--resume`` checks that it goes on with the same ticket or run.

    One training is one run. A pruner that cuts before training (``magnitude``, ``random``) asks for none: its ticket is
    what is trained. A pruner of one run (``gradual``, ``set``, ``rigl``) is done with the training. One of several
    (``imp``, ``colt``) is chained by its folder: each call of train.py with the same folder trains the next run, and
    the call after the last trains the ticket. A run is written down with the first checkpoint after its last epoch.
    Rewound to a later epoch, runs want ``--start-epoch``. Validation stays train.py's, over all classes.

    Of weight-standardised layers (NFNet, BiT, hybrid ViT) what an output channel keeps is held at mean zero, so that a
    plain timm model, which standardises the checkpoint's weights, computes the sparse network too.

    Args:
        model: The model to train, as timm created it; before ``torch.compile`` and DDP.
        ticket: A ticket, or the path of one: the model gets its starting weights.
        pruner: A pruner of this model. Create it with ``epochs`` as in train.py.
        **kwargs: As for `ClassificationTask`.

    Raises:
        SettingError: Not one of ticket and pruner; or a pruner whose runs are no plain trainings of one model.
    """

    def __init__(
        self,
        model: nn.Module,
        *args: Any,
        ticket: Ticket | str | Path | None = None,
        pruner: Pruner | None = None,
        **kwargs: Any,
    ):
        if not args and _WANTS_CRITERION:
            kwargs.setdefault("criterion", nn.CrossEntropyLoss())
        super().__init__(model, *args, **kwargs)
        if (ticket is None) == (pruner is None):
            raise SettingError("TicketTask: give either a ticket to train, or a pruner to search with")
        self.pruner, self.run = pruner, None if pruner is None else _next_run(pruner, model)
        if pruner is not None:
            self.subnet: Subnet = pruner.subnet
        else:
            ticket = ticket if isinstance(ticket, Ticket) else load_ticket(ticket)  # pyright: ignore[reportArgumentType]
            ticket.apply_(model)
            self.subnet = Subnet(model, tuple(ticket.masks))
            self.subnet.set_mask_(ticket.masks)
        self._attached = False
        self._averaged = -1  # the change of the mask that the EMA has seen
        if self.verbose:
            what = "a ticket" if self.run is None else f"{self.run.name} of a search"
            late = self.run is not None and self.run.start_epoch > 0
            start = (
                f", from epoch {self.run.start_epoch:g} of its schedule (--start-epoch)" if late and self.run else ""
            )
            _logger.info(f"{type(self).__name__}: trains {what}, sparsity {self.sparsity:.4f}{start}")

    @property
    def sparsity(self) -> float:
        """Fraction of the prunable weights now pruned, in [0, 1)."""
        return self.subnet.sparsity

    def attach(self, optimizer: Any, loader: Any) -> tuple[Any, Any]:
        """Hold pruned weights at exactly zero from here on; before or after a checkpoint is resumed.

        Args:
            optimizer: The model's optimizer, fresh or resumed.
            loader: The training loader.

        Returns:
            The same optimizer, and the loader to train on: the same where the run trains on everything.

        Raises:
            SettingError: A pruner's run on a loader without length.
        """
        if reshard_(self.subnet.model):
            raise SettingError(
                "TicketTask: FSDP2 has split the model, and timm's checkpoints are one process's; use DDP"
            )
        self._attached = True
        if self.run is None:
            self.subnet.hold_(optimizer)
            return optimizer, loader
        out = self.run.subset(loader)
        if self.run.batches_per_epoch is None:
            raise SettingError(
                "loader: it has no length, and a run's schedule needs that of an epoch; set "
                "`task.run.batches_per_epoch` before `task.attach`"
            )
        return self.run.attach(optimizer, reset=False), out

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Loss and logits, the loss as the run takes it.

        Raises:
            RuntimeError: Nothing is attached, so pruned weights would grow back.
        """
        if self.training and not self._attached:
            raise RuntimeError(
                "TicketTask: nothing holds the masks; call `optimizer, loader_train = task.attach(optimizer, "
                "loader_train)` before the first epoch"
            )
        if self.run is None:
            return super().forward(input, target)
        output = self.trainable_module(input)
        return {"loss": self.run.loss(self.criterion, output, target), "output": output}

    def setup_ema(self, *args: Any, **kwargs: Any) -> nn.Module:
        """As timm's; the average is masked whenever the mask changes."""
        self._averaged = -1
        return super().setup_ema(*args, **kwargs)

    def update_ema(self, step: int | None = None) -> None:
        """As timm's; what is pruned is zero in the average too."""
        super().update_ema(step)
        self._mask_ema()

    def _mask_ema(self) -> None:
        # Once is enough: the average of zeros is zero, until the mask changes again.
        if self.has_ema() and self._averaged != self.subnet.changes:
            self.subnet.mask_(unwrap_model(self.get_trainable_module(ema=True)))
            self._averaged = self.subnet.changes

    def create_evaluator(self, **kwargs: Any) -> Any:
        """As timm's, with ``sparsity`` among its metrics."""
        evaluator: Any = super().create_evaluator(**kwargs)
        compute = evaluator.compute

        def with_sparsity(*args: Any, **kwargs: Any) -> "OrderedDict[str, float]":
            return OrderedDict(compute(*args, **kwargs), sparsity=self.sparsity)

        evaluator.compute = with_sparsity
        return evaluator

    def get_checkpoint_state(self, ema: bool = False, unwrap_fn: Any = unwrap_model) -> dict[str, Any]:
        """As timm's. A run that has come to its end is also written down in the pruner's folder."""
        if ema:
            self._mask_ema()
        else:
            self.subnet.apply_()
            # train.py has no other hook after its last epoch; it may train on (cooldown), then it is written again.
            if self.run is not None and self.pruner is not None and self.run.complete:
                self.pruner.record_()
        return super().get_checkpoint_state(ema=ema, unwrap_fn=unwrap_fn)

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        """The masks, and how far the run has come: tensors and primitives."""
        if ema:
            return {}
        progress = {"mask": self.subnet.mask} if self.run is None else self.run.progress_state()
        return {"run": None if self.run is None else self.run.name, "progress": progress}

    def load_task_state(
        self,
        state: dict[str, Any] | None,
        strict: bool = True,
        module: nn.Module | None = None,
        ema: bool = False,
    ) -> None:
        """Go on with what a checkpoint trained.

        Raises:
            SettingError: It trained something else: no ticket, another one, or another run.
        """
        if ema:
            self._averaged = -1
            return
        if not state:
            if strict:
                raise SettingError(
                    "resume: the checkpoint has no masks, it is of a training without TicketTask; start from its "
                    "weights with --initial-checkpoint instead"
                )
            return
        name = None if self.run is None else self.run.name
        if state["run"] != name:
            raise SettingError(
                f"resume: the checkpoint trained {state['run'] or 'a ticket'}, this task trains {name or 'a ticket'}; "
                "resume with the ticket or pruner and the folder it began with, or start without --resume"
            )
        if self.run is not None:
            self.run.load_progress_(state["progress"])
        else:
            mask = state["progress"]["mask"]
            # A pruner without folder has cut the model as it was created now, which may be another start.
            known = kept(mask) == kept(self.subnet.mask) if self.pruner else _equal(mask, self.subnet.mask)
            if not known:
                raise SettingError(
                    "resume: the checkpoint trained another ticket; resume with the ticket or pruner it began with"
                )
            self.subnet.set_mask_(mask)
        self.subnet.apply_()


def _next_run(pruner: Pruner, model: nn.Module) -> Training | None:
    """The run that a training of this model is to be; None where the pruner's ticket is there to be trained."""
    name = pruner.method.name
    if pruner.subnet.model is not unwrap_model(model):
        raise SettingError("pruner: it prunes another model; create it with the model that the task is given")
    if pruner.subnet.gates:
        raise SettingError(
            f"pruner: {name} learns its masks, which timm's checkpoints cannot hold; search with it in a loop of your "
            "own or with `timm-tickets search`, then give TicketTask the ticket"
        )
    if pruner.folder is None and pruner.runs not in (0, 1):
        raise SettingError(
            f"folder: {name} needs {pruner.runs or 'several'} trainings, and TicketTask trains one; create the pruner "
            "with a folder and train again with the same one until the ticket is trained"
        )
    run = next(pruner, None)
    if run is not None and run.reads_only:
        raise SettingError(
            f"pruner: {name} reads the gradients of a few batches before any training; run it in a loop of your own or "
            "with `timm-tickets search`, then give TicketTask the ticket"
        )
    return run


def _equal(one: Masks, other: Masks) -> bool:
    return one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)
