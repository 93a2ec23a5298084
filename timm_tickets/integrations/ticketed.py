"""Ticketed: what a training task of timm becomes under a ticket or a run of a pruner; `wrap` makes it so."""

import json
import logging
import weakref
from collections import OrderedDict
from typing import Any

from timm.task import ClassificationTask
from timm.task.task import TrainingTask
from timm.utils import unwrap_model
from torch import Tensor, nn

from ..core.errors import SettingError, TrainingError, shown
from ..core.masks import Masks, keep_count, kept, total
from ..distributed.fsdp2 import reshard_
from ..distributed.processes import rank
from ..pruning.pruner import Pruner
from ..pruning.training import Training
from .best import rank_finished_only_
from .trained import Trained, final_ticket, place

_logger = logging.getLogger(__name__)


class Ticketed(TrainingTask):
    """What `wrap` makes of a task: the same, with exact zeros where its model is pruned.

    Attributes:
        subnet: The model with its mask.
        pruner: The pruner, if it was given one.
        run: The run that is trained; None where a ticket is.
        start_epoch: The epoch of the schedule that the weights are from; train.py's ``--start-epoch``.
    """

    def take_(self, trained: Trained) -> None:
        """Begin: train this from here on."""
        self.subnet, self.pruner, self.run = trained.subnet, trained.pruner, trained.run
        self.start_epoch = round(trained.start_epoch)
        self._identity = trained.identity
        self._attached = self._resumed = self._placed = self._was_finished = self._told_end = False
        self._averaged = -1  # the change of the mask that the EMA has seen
        self._ending: Any = None
        if self.run is not None and self.run.classes is not None and not _has_one_label(self):
            assert self.pruner is not None
            raise SettingError(
                f"split: {self.pruner.method.name} trains on a part of the classes, and the loss of a "
                f"{type(self).__name__} is of all of them; set split=samples, or search with a ClassificationTask"
            )
        rank_finished_only_()
        if self.verbose:
            _logger.info(f"{type(self).__name__}: {trained.told}")

    @property
    def sparsity(self) -> float:
        """Fraction of the prunable weights now pruned, in [0, 1)."""
        return self.subnet.sparsity

    @property
    def finished(self) -> bool:
        """Whether the model is as sparse as it is to become: a pruner that prunes while it trains may be on its way."""
        if self.run is None or self.pruner is None or not self.run.request.moves:
            return True
        mask = self.subnet.mask
        return kept(mask) <= keep_count(total(mask), self.pruner.method.sparsity)

    def attach(self, optimizer: Any, loader: Any) -> tuple[Any, Any]:
        """Hold pruned weights at exactly zero from here on; before or after a checkpoint is resumed.

        Args:
            optimizer: The model's optimizer, fresh or resumed.
            loader: The training loader.

        Returns:
            The same optimizer, and the loader to train on: the same where the run trains on everything.

        Raises:
            SettingError: A pruner's run on a loader without length, or on one that cannot be cut to its part.
        """
        if reshard_(self.subnet.model):
            raise SettingError("task: FSDP2 has split the model, and timm's checkpoints are one process's; use DDP")
        if self.run is None:
            self.subnet.hold_(optimizer)
            self._attached = True
            return optimizer, loader
        out = self.run.subset(loader)
        if self.run.batches_per_epoch is None:
            raise SettingError(
                "loader: it has no length, and a run's schedule needs that of an epoch; set "
                "`task.run.batches_per_epoch` before `task.attach`"
            )
        assert self.pruner is not None
        if not self._attached and rank() == 0:
            self._ending = weakref.finalize(self, _tell_end, self.run, self.pruner)
        self._attached = True
        return self.run.attach(optimizer, reset=False), out

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """What the task gives, its loss as the run takes it.

        Raises:
            RuntimeError: Nothing is attached, so pruned weights would grow back.
        """
        if self.training and not self._attached:
            raise RuntimeError(
                "task: nothing holds the masks; call `optimizer, loader_train = task.attach(optimizer, loader_train)` "
                "before the first epoch"
            )
        if self.run is not None and self.run.classes is not None:
            task: Any = self
            output = task.trainable_module(input)
            return {"loss": self.run.loss(task.criterion, output, target), "output": output}
        out = super().forward(input, target)
        if self.run is not None:
            out["loss"] = self.run.loss(lambda *_: out["loss"], out.get("output"), target)
        return out

    def setup_ema(self, *args: Any, **kwargs: Any) -> nn.Module:
        """As timm's; the average is masked whenever the mask changes."""
        self._averaged = -1
        return super().setup_ema(*args, **kwargs)

    def update_ema(self, step: int | None = None) -> None:
        """As timm's; what is pruned is zero in the average too.

        Raises:
            SettingError: The script trains other epochs of the schedule than those that are to be trained.
        """
        if not self._placed and step is not None:
            self._check_place(step)
        super().update_ema(step)
        self._mask_ema()

    def _check_place(self, step: int) -> None:
        """Compare the script's count of updates, at its first one here, with where the schedule is."""
        self._placed = True
        each = 1 if self.run is None else self.run.steps_per_epoch
        script = (step - 1) / each
        mine = float(self.start_epoch) if self.run is None else self.run.position - 1 / each
        behind = self.start_epoch > 0 and not self._resumed and script < (mine - 0.5 if self.run else 0.5)
        if behind or (self.run is not None and script > mine + 0.5):
            what = "the ticket starts" if self.run is None else f"{self.run.name} is"
            other = (
                f", or train {'its file' if self.pruner else 'it'} with start_epoch=0, the whole schedule from there"
            )
            other = other if self.run is None else ""
            raise SettingError(
                f"start_epoch: {what} at epoch {max(mine, 0):.3g} of its schedule, and the script trains epoch "
                f"{max(script, 0):.3g}; call it with --start-epoch {round(mine)}{other}"
            )

    def _mask_ema(self) -> None:
        # Once is enough: the average of zeros is zero, until the mask changes again.
        if self.has_ema() and self._averaged != self.subnet.changes:
            self.subnet.mask_(unwrap_model(self.get_eval_model(ema=True)))
            self._averaged = self.subnet.changes

    def create_evaluator(self, **kwargs: Any) -> Any:
        """As timm's (from 1.0.31 on), with ``sparsity`` among its metrics."""
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
            if self.run is not None and self.run.complete:
                self._record_(self.run)
        return super().get_checkpoint_state(ema=ema, unwrap_fn=unwrap_fn)

    def check_end(self) -> None:
        """Whether the training has come to its end; where it is not asked, a warning says so when Python ends.

        Raises:
            TrainingError: It has not.
        """
        if self._ending is not None:
            self._ending.detach()
        if self.run is not None and self.pruner is not None and (told := _unfinished(self.run, self.pruner)):
            raise TrainingError(told)

    def _record_(self, run: Training) -> None:
        pruner = self.pruner
        if pruner is None or pruner.folder is None:
            return
        pruner.record_()
        ticket = final_ticket(pruner)
        if not self._told_end:
            self._told_end = True
            then = "train again for the next run" if ticket is None else f"the search is done, its ticket is {ticket}"
            _logger.info(f"{place(run, pruner)} is written down in {pruner.folder / run.name}; {then}")

    def before_ranking_(self, saver: Any) -> None:
        """Once the model is as sparse as it is to become, let timm's saver forget what it holds for the best so far."""
        if self.finished and not self._was_finished and saver.checkpoint_files:
            worst = float("inf") if saver.decreasing else float("-inf")
            saver.checkpoint_files = [(file, worst) for file, _ in saver.checkpoint_files]
            saver.best_metric = saver.best_epoch = None
            _logger.info(
                f"sparsity {self.sparsity:.4f} is reached: timm's best checkpoints are those from here on, and "
                f"model_best{saver.extension} is replaced"
            )
        self._was_finished = self.finished

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        """The task's own, the masks, and how far the run has come: tensors and primitives."""
        own = super().get_task_state(module=module, ema=ema)
        if ema:
            return own
        progress = {"mask": self.subnet.mask} if self.run is None else self.run.progress_state()
        name = None if self.run is None else self.run.name
        return {
            **own,
            "run": name,
            "what": json.dumps(self._identity),
            "finished": self.finished,
            "progress": progress,
        }

    def load_task_state(
        self,
        state: dict[str, Any] | None,
        strict: bool = True,
        module: nn.Module | None = None,
        ema: bool = False,
    ) -> None:
        """Go on with what a checkpoint trained.

        Raises:
            SettingError: It trained something else: no ticket, another one, or another run or pruner.
        """
        super().load_task_state(state, strict=strict, module=module, ema=ema)
        if ema:
            self._averaged = -1
            return
        if not state or "progress" not in state:
            if strict:
                start = "" if self.pruner else " and start='model' (`timm-tickets run --start model`)"
                raise SettingError(
                    "resume: the checkpoint has no masks, it is of a training without a ticket or pruner; start from "
                    f"its weights with --initial-checkpoint{start} instead of --resume"
                )
            return
        self._check_same(json.loads(state["what"]))
        self._resumed, self._was_finished = True, state["finished"]
        if self.run is not None:
            self.run.load_progress_(state["progress"])
        else:
            mask = state["progress"]["mask"]
            # A pruner without folder has cut the model as it was created now, which may be another start.
            if not (kept(mask) == kept(self.subnet.mask) if self.pruner else _equal(mask, self.subnet.mask)):
                raise SettingError(
                    "resume: the checkpoint trained other masks; resume with the ticket or pruner it began with"
                )
            self.subnet.set_mask_(mask)
        self.subnet.apply_()

    def _check_same(self, found: dict[str, Any]) -> None:
        if found == self._identity:
            return

        def facts(what: dict[str, Any]) -> dict[str, Any]:
            return {
                "trained": "a ticket",
                **{key: what[key] for key in what if key != "search"},
                **what.get("search", {}),
            }

        then, now = facts(found), facts(self._identity)
        keys = [key for key in {**then, **now} if then.get(key) != now.get(key)]
        told = "; ".join(f"{key}: {shown(then.get(key))} there, {shown(now.get(key))} now" for key in keys[:8])
        raise SettingError(
            f"resume: the checkpoint is of another training ({told}); resume with the ticket, or the pruner and "
            "folder, that it began with, or start without --resume"
        )


def _has_one_label(task: TrainingTask) -> bool:
    return isinstance(task, ClassificationTask) and not getattr(task, "multi_label", False)


def _unfinished(run: Training, pruner: Pruner) -> str:
    """What a run that was begun and has not come to its end has reached; empty for any other."""
    if not run.step or run.complete:
        return ""
    told = f"{place(run, pruner)} of {pruner.method.name} ended at epoch {run.position:.3g} of {run.schedule_epochs}"
    if run.request.moves:
        told += f", at sparsity {run.sparsity:.4f} of the asked {pruner.method.sparsity:g}"
    if pruner.folder is not None:
        told += f", and is not written down in {pruner.folder}"
    return f"{told}. Go on with --resume; or, if these were all epochs, create the pruner with epochs=args.epochs"


def _tell_end(run: Training, pruner: Pruner) -> None:
    """Called when a task is gone, or Python ends: train.py tells its task nothing of its end."""
    if told := _unfinished(run, pruner):
        _logger.warning(told)


def _equal(one: Masks, other: Masks) -> bool:
    return one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)
