"""Run: one requested training, as a method asks for it and a trainer carries it out."""

import re
import warnings
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.optim import Optimizer

from .end import End, not_finite, plain_metrics
from .masks import Scores
from .settings import TrainingError
from .sharded import reshard_
from .subnet import State, Subnet, sharing
from .subset import Selection, is_loader, slice_classes, subset_of
from .tweak import Tweaks
from .wrappers import mean_over_processes, plain_optimizer, reset_, separate_, share_buffers_

Rewind = Annotated[
    str,
    Field(
        pattern=r"^\d+(ep|it)$",
        description="step the weights return to: '0ep' is their initialisation, '2ep' after 2 epochs, '500it' steps",
    ),
]


@dataclass(eq=False)
class Run:
    """One requested training. A method sets the first group of fields, the pruner the second.

    Attributes:
        epochs: Epochs to train; the method's `epochs` unless it asked for another number.
        classes: Train on these classes only, as if the head had only these; all where None.
        data_part: ``(i, n)``: train on the i-th of n random parts of the images; all where None.
        limit: Train on so many batches only: a run that reads gradients and is no training. It is not scored.
        rewind: Where in this run the rewind point is taken; nowhere where None. That of a round's only run replaces
            `Subnet.start`; of several the method chooses.
        reads: What of its `End` the method reads. What it does not is written down and let go: each is a model's size.
        from_rewind: Whether it starts from the rewind point, so that its schedule goes on from there.
        setup: Called on the subnet before the run starts: the run's own starting state.
        on_loss: Given the run and its loss, before backward; returns the loss to go backward from (a penalty added).
        after_step: Called after each optimizer step.
        settle: Called before the model is scored and at the end: brings the mask up to date with learned scores.
        weight_decay: Of learned scores; the optimizer's own goes on for everything else.
        index: Number of the run in the whole search, from 0.
        round: Number of its round, from 0.
        part: Number of the run within its round, from 0.
        name: Name of its folder.
        single: Whether it is the only run of its round.
        processes: How many processes train it, by themselves (within `processes.apart`), while others may train the
            other runs of its round; None where all of them train it.
        start_epoch: How far into the schedule the starting weights are, in epochs: late rewinding goes on from there.
        step: Optimizer steps taken.
        batches: Batches whose loss was taken: more than `step` under gradient accumulation.
        batches_per_epoch: Set by the first `subset` of a loader; a trainer may set it itself.
        metrics: For the trainer to fill; kept with the run and in its ticket. JSON types.
        scores: For the method to fill while the run goes on: a tensor a weight, handed back in its `End`.
        optimizer: The optimizer that changes the weights, once attached.
        seed: The method's.
        tweaks: Retraining tweaks, taken back at its end; they change the loss and anneal with its steps.
    """

    epochs: int = 0
    classes: Sequence[int] | None = None
    data_part: tuple[int, int] | None = None
    limit: int | None = None
    rewind: str | None = None
    reads: Collection[Literal["state", "scores"]] = ("state", "scores")
    from_rewind: bool = False
    setup: Callable[[Subnet], None] | None = None
    on_loss: Callable[["Run", Tensor], Tensor] | None = None
    after_step: Callable[["Run"], None] | None = None
    settle: Callable[[Subnet], None] | None = None
    weight_decay: float = 0.0

    index: int = 0
    round: int = 0
    part: int = 0
    name: str = "round_00"
    single: bool = True
    processes: int | None = None
    start_epoch: float = 0.0
    step: int = 0
    batches: int = 0
    batches_per_epoch: int | None = None
    metrics: dict[str, Any] = field(default_factory=dict)
    scores: Scores = field(default_factory=dict, repr=False)
    optimizer: Optimizer | None = field(default=None, repr=False)
    seed: int = 0
    tweaks: Tweaks | None = field(default=None, repr=False)
    subnet: Subnet = field(default=None, repr=False)  # pyright: ignore[reportAssignmentType]

    _pending: int = field(default=0, repr=False)
    _taken: tuple[State, float] | None = field(default=None, repr=False)

    @property
    def sparsity(self) -> float:
        """Sparsity of the mask now being trained, in [0, 1)."""
        return self.subnet.sparsity

    @property
    def whole(self) -> bool:
        """Whether this is a training on all classes and images."""
        return self.classes is None and self.data_part is None and self.limit is None

    @property
    def position(self) -> float:
        """Epochs of the schedule that are done.

        Raises:
            RuntimeError: Nobody has said how long an epoch is.
        """
        if self.batches_per_epoch is None:
            raise RuntimeError(
                "the run's schedule needs the length of an epoch: train on `run.subset(loader)`, or set "
                "`run.batches_per_epoch` before the first step"
            )
        return self.start_epoch + self.batches / self.batches_per_epoch

    @property
    def progress(self) -> float:
        """Fraction of the run that is done, in [0, 1]: `position` over `epochs`."""
        return min(1.0, self.position / self.epochs)

    @property
    def complete(self) -> bool:
        """Whether every batch of the run was taken, one whose step a gradient scaler has left out included."""
        if self.batches_per_epoch is None:
            return False
        return self.position + self._pending / self.batches_per_epoch > self.epochs - 1e-6

    def attach(self, optimizer: Any, reset: bool = True) -> Any:
        """Start the run on an optimizer: its state cleared, earlier hooks gone, pruned weights held at exactly zero.

        Its hyper-parameters stay as they are, but for a learning rate that a schedule has moved: it returns to where
        that schedule began. Build the run's schedule afterwards.

        Args:
            optimizer: A torch optimizer over the model's parameters, or Accelerate's wrapper of one.
            reset: Whether to clear its state and put the learning rate back; False for one that is fresh, or holds
                the state of this very run from a checkpoint.

        Returns:
            The same optimizer.
        """
        self.optimizer = plain_optimizer(optimizer)
        if self.subnet.gates:
            reshard_(self.subnet.model)
            separate_(self.optimizer, [gate.score for gate in self.subnet.gates.values()], self.weight_decay)
        if reset:
            reset_(self.optimizer)
        self.subnet.hold_(optimizer, self._stepped)
        return optimizer

    def subset(self, data: Any) -> Any:
        """The part of a data set or loader that this run trains on, with its original labels.

        Args:
            data: A torch ``DataLoader``, Accelerate's or timm's prefetching one, or a data set with an item for each
                index. Give a loader that Accelerate has prepared, not the one before: its length is this process's.

        Returns:
            The same kind of thing; the very same object where the run trains on everything.
        """
        out = subset_of(data, Selection(self.classes, self.data_part, self.limit, self.seed))
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
        if torch.is_grad_enabled():
            self._pending += 1
        if self.classes is not None:
            output, target = slice_classes(output, target, self.classes)
        if self.tweaks is not None:
            criterion = self.tweaks.criterion(criterion)
        loss = criterion(output, target)
        # Scoring a validation batch must neither add a penalty nor be read as a gradient.
        return loss if self.on_loss is None or not torch.is_grad_enabled() else self.on_loss(self, loss)

    def _stepped(self) -> None:
        self.step += 1
        # A loop that takes its loss elsewhere still counts one batch a step.
        self.batches += max(1, self._pending)
        self._pending = 0
        if self.after_step is not None:
            self.after_step(self)
        self._anneal()
        if self._taken is None and self.rewind is not None and self._reached(self.rewind):
            reached = 0.0 if self.batches_per_epoch is None else self.position
            share_buffers_(self.subnet.model)
            self._take_(self.subnet.state(), reached)

    def _take_(self, state: State, reached: float) -> None:
        self._taken = state, reached
        if self.single:  # at once: together with the point before it would be two models
            self.subnet.start, self.subnet.start_epoch = state, reached

    def _anneal(self) -> None:
        if self.tweaks is not None:
            self.tweaks.at_(self.progress)

    def _reached(self, point: str) -> bool:
        number, unit = rewind_parts(point)
        if unit == "it":
            return self.step >= number
        return self.batches_per_epoch is not None and self.batches >= number * self.batches_per_epoch

    def begin_(self) -> None:
        """Bring the model to the run's starting state."""
        if self.setup is not None:
            self.setup(self.subnet)
        self.subnet.apply_()
        if self.rewind is not None and rewind_parts(self.rewind)[0] == 0:
            self._take_(sharing(self.subnet.present_state(), self.subnet.start or {}), 0.0)

    def settle_(self) -> None:
        """Bring the mask up to date with learned scores; before scoring a model in the middle of a run."""
        if self.settle is not None:
            self.settle(self.subnet)

    def finish_(self) -> End:
        """Let go of the optimizer and read off what the run ended with.

        Raises:
            TrainingError: A weight or buffer is not finite.
        """
        self.subnet.release_()
        if self.tweaks is not None:
            self.tweaks.remove_()
        share_buffers_(self.subnet.model)  # not in `end`: a checkpoint may be one process's alone
        end = self.end()
        # Whoever holds the run on need not hold a model's worth of momentum, scores and rewind point with it.
        self.optimizer, self._taken, self.scores = None, None, {}
        return end

    def end(self) -> End:
        """What the run would end with now; it may go on, so `End.keep_` what is wanted before it does.

        Raises:
            TrainingError: A weight or buffer is not finite.
        """
        self.settle_()
        self.subnet.apply_()
        state = self.subnet.present_state()
        if (name := not_finite(state, self.subnet.strange)) is not None:
            raise TrainingError(
                f"{self.name} ended with values in {name} that are not finite; it is not written down. Lower the "
                "learning rate or clip gradients, and train it again"
            )
        if self.step == 0:
            warnings.warn(
                f"{self.name} ended without an optimizer step; train it on the optimizer that `run.attach` returns",
                stacklevel=5,
            )
        # Read from each process's own batches, past DDP's reduction.
        gathered = mean_over_processes(self.scores)
        scores = {name: score.detach().cpu().contiguous() for name, score in gathered.items()}
        learned = self.subnet.present_scores()
        end = End(
            state,
            self.subnet.mask,
            {**scores, **learned} if scores else learned,
            metrics=plain_metrics(self.metrics),
        )
        if self.rewind is not None:
            if self._taken is None or self._taken[1] >= self.epochs:
                hint = " (use `run.subset(loader)` so that epochs can be counted)" * (self.batches_per_epoch is None)
                warnings.warn(
                    f"{self.name} ended after {self.step} steps without passing its rewind point {self.rewind!r}"
                    f"{hint}; its last state is used instead, and later runs train their whole schedule from it",
                    stacklevel=5,
                )
                self._taken = dict(state), 0.0
            end.rewind, end.rewind_epoch = self._taken
        return end

    def progress_state(self) -> dict[str, Any]:
        """What a checkpoint within the run must hold besides model and optimizer: tensors and primitives."""
        counters = {"step": self.step, "batches": self.batches, "pending": self._pending}
        gates = {name: dict(gate.named_buffers()) for name, gate in self.subnet.gates.items()}
        method = {"mask": self.subnet.mask, "gates": gates, "scores": dict(self.scores), "tap": self.subnet.tap}
        return counters | method | {"taken": self._taken}

    def load_progress_(self, saved: dict[str, Any]) -> None:
        self.step, self.batches = saved["step"], saved["batches"]
        if saved["taken"] is not None:
            self._take_(*saved["taken"])
        self._pending = saved.get("pending", 0)  # checkpoints of version 0.1 have none
        self.scores, self.subnet.tap = saved["scores"], saved["tap"]
        self.subnet.set_mask_(saved["mask"])
        for name, gate in self.subnet.gates.items():
            for key, value in gate.named_buffers():
                value.copy_(saved["gates"][name][key])
        self._anneal()


def rewind_parts(point: str) -> tuple[int, str]:
    """Number and unit of a rewind point: ``'500it'`` is ``(500, 'it')``."""
    found = re.fullmatch(r"(\d+)(ep|it)", point)
    if found is None:
        raise ValueError(f"rewind: {point!r} is not valid; write epochs as '2ep' or optimizer steps as '500it'")
    return int(found[1]), found[2]
