"""Training: a run that goes on, as the user or a trainer carries it out."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..core.errors import TrainingError
from ..core.masks import Scores
from ..core.states import State, digest, not_finite, sharing
from ..core.warn import warn
from ..data.subset import Selection, is_loader, slice_classes, subset_of
from ..distributed.collectives import mean_over_processes, share_buffers_
from ..distributed.fsdp2 import reshard_
from ..distributed.processes import world_size
from ..sparse.blind import Reached
from ..sparse.holder import Holder
from ..sparse.optimizers import forget_, plain_optimizer, reset_, separate_
from ..sparse.subnet import Subnet
from ..tweaks.base import Tweaks
from .checks import tell_training
from .clock import Clock
from .loss_again import LossAgain, exact_derivatives
from .run import Place, Placed, Run, rewind_parts
from .run_end import End, fresh_view, plain_metrics


class Training(Placed, Clock):
    """A run that goes on: what iterating a pruner gives.

    Args:
        request: What is to be trained.
        subnet: The model with its mask.
        place: Where in the search it is.
        schedule_epochs: Length of the schedule; the request's where None.
        start_epoch: Epochs of the schedule that lie before this training.
        seed: The method's.

    Attributes:
        request: What the method asked for.
        subnet: The model with its mask.
        metrics: For the trainer to fill; kept with the run and in its ticket. JSON types.
        scores: What the method gathers while the run goes on (`add_scores_`): a tensor a weight; its end has them.
        optimizer: The optimizer that changes the weights, once attached.
        holder: What holds the masks since then; a trainer without hooks applies it.
        slice: Takes the run's classes of logits and targets, in place of its own way, where a trainer sets it.
        tweaks: Retraining tweaks, taken back at its end; they change the loss and anneal with its steps.
        reads_only: Whether it reads gradients and is no training; it is not scored.
    """

    def __init__(
        self,
        request: Run,
        subnet: Subnet,
        place: Place | None = None,
        schedule_epochs: int | None = None,
        start_epoch: float = 0.0,
        seed: int = 0,
    ):
        super().__init__(schedule_epochs or request.epochs or 0, start_epoch)
        self.request, self.subnet, self.place, self.seed = request, subnet, place or Place(), seed
        self.reads_only = request.read is not None
        self.metrics: dict[str, Any] = {}
        self.scores: Scores = {}
        self.optimizer: Optimizer | None = None
        self.holder: Holder | None = None
        self.slice: Callable[[Any, Tensor], tuple[Any, Tensor]] | None = None
        self.tweaks: Tweaks | None = None
        self._rewind: tuple[State, float] | None = None  # the rewind point that was taken, and its epoch
        self._again: LossAgain | None = None
        self._reached: Reached | None = None
        self._first_mask = ""

    def __repr__(self) -> str:
        return f"Training({self.name!r}, epochs={self.epochs}, step={self.step}, sparsity={self.sparsity:.4f})"

    @property
    def classes(self) -> Sequence[int] | None:
        """The classes that it trains on; all where None."""
        return self.request.classes

    @property
    def all_images(self) -> bool:
        """Whether this is a training on all classes and images."""
        return self.classes is None and self.request.data_part is None and not self.reads_only

    @property
    def sparsity(self) -> float:
        """Sparsity of the mask now being trained, in [0, 1)."""
        return self.subnet.sparsity

    def attach(self, optimizer: Any, reset: bool = True, hooks: bool = True, whole: bool = False) -> Any:
        """Start the run on an optimizer: its state cleared, earlier hooks gone, pruned weights held at exactly zero.

        Its hyper-parameters stay as they are, but for a learning rate that a schedule has moved: it returns to where
        that schedule began. Build the run's schedule afterwards.

        Args:
            optimizer: A torch optimizer over the model's parameters, or Accelerate's wrapper of one.
            reset: Whether to clear its state and put the learning rate back; False for one that is fresh, or holds
                the state of this very run from a checkpoint.
            hooks: False for a trainer that applies `holder` itself and calls `end_step_`; ``whole`` is the holder's.

        Returns:
            The same optimizer.
        """
        self.optimizer = plain_optimizer(optimizer)
        if self.subnet.gates:
            reshard_(self.subnet.model)
            separate_(self.optimizer, [gate.score for gate in self.subnet.gates.values()], self.request.weight_decay)
        if reset:
            reset_(self.optimizer)
        before = self.request.before_step and partial(self.request.before_step, self)
        self.holder = self.subnet.hold_(optimizer, self._stepped, before, hooks, whole)
        return optimizer

    def subset(self, data: Any) -> Any:
        """The part of a data set or loader that this run trains on, with its original labels.

        Args:
            data: A torch ``DataLoader``, Accelerate's or timm's prefetching one, or a data set with an item for each
                index. Give a loader that Accelerate has prepared, not the one before: its length is this process's.

        Returns:
            The same kind of thing; the very same object where the run trains on everything.
        """
        asked = self.request
        selection = Selection(asked.classes, asked.data_part, asked.limit, asked.images_per_class, self.seed)
        out = subset_of(data, selection)
        if self.batches_per_epoch is None and is_loader(out):
            with suppress(TypeError):  # a stream has no length
                self.batches_per_epoch = len(out)
        return out

    def loss(self, criterion: Callable[[Tensor, Tensor], Tensor], output: Any, target: Tensor) -> Tensor:
        """The criterion on this run's classes, plus what the method adds. Call it once a batch.

        Args:
            criterion: Takes logits and targets.
            output: Logits (batch, classes), or a tuple of such.
            target: Class indices (batch,), or soft targets (batch, classes); soft ones are scaled to sum to 1 again.

        Returns:
            The loss to go backward from.

        Raises:
            ValueError: A target outside the run's classes: train on `subset`.
        """
        criterion = criterion if self.tweaks is None else self.tweaks.criterion(criterion)
        loss = self.sliced(criterion, output, target)
        if not torch.is_grad_enabled():  # scoring a validation batch must neither add a penalty nor be read
            return loss
        asked, again = self.request, self._again
        if asked.read is not None and again is not None and (asked.limit is None or self.taken < asked.limit):
            with exact_derivatives(loss.device):
                asked.read(self, lambda temperature=1.0: self.sliced(criterion, again.output(temperature), target))
        self.count_batch_()
        return loss if asked.on_loss is None else asked.on_loss(self, loss)

    def sliced(self, criterion: Callable[[Tensor, Tensor], Tensor], output: Any, target: Tensor) -> Tensor:
        """The criterion on this run's classes, nothing counted and nothing added."""
        if self.classes is not None:
            cut = self.slice or partial(slice_classes, classes=self.classes)
            output, target = cut(output, target)
        return criterion(output, target)

    def add_scores_(self, readings: Mapping[str, Tensor]) -> None:
        """Add readings, a tensor a weight, to what this run has gathered; over several processes their mean is taken.

        They wait on the CPU, where scores are compared, unless processes have to average them.
        """
        for name, reading in readings.items():
            self.scores[name] = self.scores.get(name, 0) + (reading if world_size() > 1 else reading.cpu())

    def undo_step_(self) -> None:
        """Return to where the search began, as if there had been no step: weights, statistics, momentum."""
        assert self.subnet.start is not None  # there in every search that does not end trained
        self.subnet.load_(self.subnet.start)
        if self.optimizer is not None:
            reset_(self.optimizer)

    def forget_(self, weights: Mapping[str, Tensor]) -> None:
        """Zero what the optimizer remembers of these weights, such as momentum: a weight that begins anew has no past.

        Args:
            weights: Bool, True for those to forget, by parameter name.
        """
        if self.optimizer is not None:
            forget_(self.optimizer, self.subnet.parameters(), weights)

    def _stepped(self) -> None:
        self.end_step_()
        self.tell_unreached()

    def end_step_(self) -> None:
        """All that comes after an optimizer step whose weights are masked, in Python."""
        self.set_numbers_()
        if self.request.each_step is not None:
            self.request.each_step(self)
        self.follow_step_()

    def set_numbers_(self) -> None:
        """Put the numbers that move with the steps where `Run.each_step` finds them."""
        if self.request.schedule is not None:
            self.subnet.put_(self.request.schedule(self.ahead))

    def tell_unreached(self) -> None:
        """Name, once, layers whose scores got no gradient in the first steps; this waits for the device."""
        if self._reached is not None:
            self._reached.tell()

    def follow_step_(self) -> None:
        """Count a step that was taken, and do what comes after it in Python: what no compiled step has in it."""
        self.count_step_()
        if self._reached is not None:
            self._reached.look({name: gate.score.grad for name, gate in self.subnet.gates.items()})
        if self.request.after_step is not None:
            self.request.after_step(self)
        if self.tweaks is not None:
            self.tweaks.at_(self.progress)
        if self._rewind is None and self.request.rewind is not None and self.passed(self.request.rewind):
            reached = 0.0 if self.batches_per_epoch is None else self.position
            share_buffers_(self.subnet.model)
            self._take_rewind_point_(self.subnet.state(), reached)

    def _take_rewind_point_(self, state: State, epoch: float) -> None:
        self._rewind = state, epoch
        if self.place.single:  # at once, so that the point before is freed: each is a copy of the model
            self.subnet.set_start_(state, epoch)

    def begin_(self) -> None:
        """Bring the model to the run's starting state."""
        asked, subnet = self.request, self.subnet
        if asked.setup is not None:
            asked.setup(subnet)
        subnet.apply_()
        self._first_mask = digest(subnet.mask) if asked.moves and not self.reads_only else ""
        if subnet.gates:
            self._reached = Reached(self.name, subnet.gates)
        if self.reads_only:
            self._again = LossAgain(self.name, subnet.model)
        if asked.rewind is not None and rewind_parts(asked.rewind)[0] == 0:
            self._take_rewind_point_(sharing(subnet.live_state(), subnet.start or {}), 0.0)

    def settle_(self) -> None:
        """Bring the mask up to date with learned scores; before scoring a model in the middle of a run.

        Raises:
            TrainingError: A score is not finite: no step on a card asks, so that it is said here. It stays so.
        """
        if (name := not_finite(self.subnet.device_scores(free=True), {})) is not None:
            raise TrainingError(
                f"{self.name}: the learned scores of {name} are not finite, NaN or infinite, after step {self.step}; "
                "lower the learning rate or clip gradients, and train it again"
            )
        if self.request.settle is not None:
            self.request.settle(self.subnet)

    def finish_(self) -> End:
        """Let go of the optimizer and read off what the run ended with.

        Raises:
            TrainingError: A weight or buffer is not finite.
        """
        self.subnet.release_()
        if self._again is not None:
            self._again.remove_()
        if self.tweaks is not None:
            self.tweaks.remove_()
        share_buffers_(self.subnet.model)  # not in `end`: a checkpoint may be one process's alone
        end = self.end()
        # A caller may keep this object: it is not to keep what is as large as the model alive.
        self.optimizer = self._rewind = self.holder = None
        self.scores = {}
        self.request = replace(self.request, read=None)
        return end

    def end(self) -> End:
        """What the run would end with now: a live view of the model, to be read before it is changed.

        Raises:
            TrainingError: A weight or buffer is not finite.
        """
        self.settle_()
        self.subnet.apply_()
        state = self.subnet.live_state()
        if (name := not_finite(state, self.subnet.strange)) is not None:
            raise TrainingError(
                f"{self.name} ended with values in {name} that are not finite; it is not written down. Lower the "
                "learning rate or clip gradients, and train it again"
            )
        tell_training(self, self._first_mask)
        # Read from each process's own batches, past DDP's reduction.
        gathered = mean_over_processes(self.scores)
        scores = {name: score.detach().cpu().contiguous() for name, score in gathered.items()}
        learned = fresh_view(self.subnet.live_scores(), self.subnet, self.name)
        end = End(
            fresh_view(state, self.subnet, self.name),
            fresh_view(self.subnet.live_mask(), self.subnet, self.name),
            {**scores, **learned} if scores else learned,
            metrics=plain_metrics(self.metrics),
        )
        if self.request.rewind is not None:
            if self._rewind is None or self._rewind[1] >= self.schedule_epochs:
                hint = " (use `run.subset(loader)` so that epochs can be counted)" * (self.batches_per_epoch is None)
                warn(
                    f"{self.name} ended after {self.step} steps without passing its rewind point "
                    f"{self.request.rewind!r}{hint}; its last state is used instead, and later runs train their whole "
                    "schedule from it",
                )
                end.rewind, end.rewind_epoch = dict(state), 0.0
            else:
                end.rewind, end.rewind_epoch = self._rewind
        return end

    def progress_state(self) -> dict[str, Any]:
        """What a checkpoint within the run must hold besides model and optimizer: tensors and primitives."""
        gates = {name: dict(gate.named_buffers()) for name, gate in self.subnet.gates.items()}
        method = {"mask": self.subnet.mask, "gates": gates, "scores": dict(self.scores), "tap": self.subnet.tap.open}
        return self.counters() | method | {"taken": self._rewind}

    def load_progress_(self, saved: dict[str, Any]) -> None:
        self.load_counters_(saved)
        if saved["taken"] is not None:
            self._take_rewind_point_(*saved["taken"])
        self.scores = saved["scores"]
        self.subnet.tap_(saved["tap"])
        self.subnet.set_mask_(saved["mask"])
        for name, gate in self.subnet.gates.items():
            for key, value in gate.named_buffers():
                value.copy_(saved["gates"][name][key])
        if self.tweaks is not None:
            self.tweaks.at_(self.progress)
