"""Run: one requested training, as a method asks for it and a trainer carries it out."""

import math
import re
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from .blind import Reached
from .end import End, not_finite, plain_metrics
from .masks import Scores
from .settings import TrainingError
from .sharded import reshard_
from .starts import digest
from .subnet import State, Subnet, sharing
from .subset import Selection, is_loader, slice_classes, subset_of
from .tweak import Tweaks
from .warn import warn
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
        epochs: Epochs to train. A method asks for the length of the whole schedule, its own `epochs` where it says
            nothing; a run that starts late in it (`start_epoch`) has only the rest to train, and this is that rest,
            rounded up: `complete` says within the last epoch when it is over.
        classes: Train on these classes only, as if the head had only these; all where None.
        data_part: ``(i, n)``: train on the i-th of n random parts of the images; all where None.
        read: Makes this a run that reads gradients and is no training; it is not scored. Called for each batch with the
            run and a function that gives the batch's loss again, in the weights' own precision and from a forward pass
            of its own, so that neither autocast nor fused attention stands in the way of a second derivative. Its
            argument is a temperature that the logits are divided by.
        limit: With ``read``, read so many batches of the loader, drawn by the seed.
        images_per_class: With ``read``, read so many images of each class, drawn by the seed.
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
        follows: The search it is of and a digest of what the runs before it ended with; None where nobody knows.
        start_epoch: How far into the schedule the starting weights are, in epochs: late rewinding goes on from there.
        schedule_epochs: Length of the whole schedule, of which `start_epoch` lie before this run.
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
    read: Callable[["Run", Callable[..., Tensor]], None] | None = None
    limit: int | None = None
    images_per_class: int | None = None
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
    follows: str | None = None
    start_epoch: float = 0.0
    schedule_epochs: int = 0
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
    _inputs: Any = field(default=None, repr=False)
    _hook: Any = field(default=None, repr=False)
    _reached: Reached | None = field(default=None, repr=False)
    _began: str = field(default="", repr=False)

    def __post_init__(self) -> None:
        self.plan_(self.epochs, self.start_epoch)

    def plan_(self, schedule_epochs: int, start_epoch: float) -> None:
        """Set the length of the schedule and where in it the run starts; `epochs` is what is left to train."""
        self.schedule_epochs, self.start_epoch = schedule_epochs, start_epoch
        self.epochs = max(0, math.ceil(schedule_epochs - start_epoch - 1e-6))

    @property
    def sparsity(self) -> float:
        """Sparsity of the mask now being trained, in [0, 1)."""
        return self.subnet.sparsity

    @property
    def all_images(self) -> bool:
        """Whether this is a training on all classes and images."""
        return self.classes is None and self.data_part is None and self.read is None

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
        """Fraction of the schedule that is done, in [0, 1]: `position` over `schedule_epochs`."""
        return min(1.0, self.position / self.schedule_epochs)

    def every(self, asked: int | None, share: float) -> int:
        """Optimizer steps between two exchanges or prunings: 100 where not asked, and at most this share of all steps.

        So a short training has its exchanges or prunings too.
        """
        return asked or min(100, max(1, int(share * self.schedule_epochs * self.steps_per_epoch)))

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch, as far as the steps taken tell: each may take several batches."""
        if self.batches_per_epoch is None or not self.step:
            return self.batches_per_epoch or 1
        return max(1, round(self.batches_per_epoch / max(1, round(self.batches / self.step))))

    @property
    def complete(self) -> bool:
        """Whether every batch of the run was taken, one whose step a gradient scaler has left out included."""
        if self.batches_per_epoch is None:
            return False
        return self.position + self._pending / self.batches_per_epoch > self.schedule_epochs - 1e-6

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
        selection = Selection(self.classes, self.data_part, self.limit, self.images_per_class, self.seed)
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
        if self.tweaks is not None:
            criterion = self.tweaks.criterion(criterion)
        loss = self._sliced(criterion, output, target)
        if not torch.is_grad_enabled():  # scoring a validation batch must neither add a penalty nor be read
            return loss
        if self.read is not None and (self.limit is None or self.batches + self._pending < self.limit):
            # Around derivatives too: backward passes are cast as well.
            with torch.autocast(loss.device.type, enabled=False), sdpa_kernel(SDPBackend.MATH):
                self.read(self, lambda temperature=1.0: self._again(criterion, target, temperature))
        self._pending += 1
        return loss if self.on_loss is None else self.on_loss(self, loss)

    def _sliced(self, criterion: Callable[[Tensor, Tensor], Tensor], output: Any, target: Tensor) -> Tensor:
        if self.classes is not None:
            output, target = slice_classes(output, target, self.classes)
        return criterion(output, target)

    def _see_inputs(self, _: Any, args: Any, kwargs: Any) -> None:
        if torch.is_grad_enabled():
            self._inputs = args, kwargs

    def _again(self, criterion: Callable[[Tensor, Tensor], Tensor], target: Tensor, temperature: float) -> Tensor:
        """The present batch's loss from a forward pass of its own, as `read` describes it."""
        if self._inputs is None:
            raise RuntimeError(
                f"{self.name} reads gradients and has not seen the model's inputs: call the model that the pruner was "
                "created with, not compiled, before `run.loss`"
            )
        model: Any = self.subnet.model
        weight = next(model.parameters())

        def fitting(value: Any) -> Any:
            return value.to(weight.dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

        args, kwargs = tree_map(fitting, self._inputs)
        # Not the instance's own: Accelerate has put one there that casts.
        output = type(model).forward(model, *args, **kwargs)
        return self._sliced(criterion, tree_map(lambda logits: logits / temperature, output), target)

    def _stepped(self) -> None:
        self.step += 1
        # A loop that takes its loss elsewhere still counts one batch a step.
        self.batches += max(1, self._pending)
        self._pending = 0
        if self._reached is not None:
            self._reached.look({name: gate.score.grad for name, gate in self.subnet.gates.items()})
        if self.after_step is not None:
            self.after_step(self)
        self._anneal()
        if self._taken is None and self.rewind is not None and self._passed(self.rewind):
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

    def _passed(self, point: str) -> bool:
        number, unit = rewind_parts(point)
        if unit == "it":
            return self.step >= number
        return self.batches_per_epoch is not None and self.batches >= number * self.batches_per_epoch

    def begin_(self) -> None:
        """Bring the model to the run's starting state."""
        if self.setup is not None:
            self.setup(self.subnet)
        self.subnet.apply_()
        self._began = digest(self.subnet.mask) if self.after_step is not None and self.read is None else ""
        if self.subnet.gates:
            self._reached = Reached(self.name, self.subnet.gates)
        if self.read is not None:
            self._hook = self.subnet.model.register_forward_pre_hook(self._see_inputs, with_kwargs=True)
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
        if self._hook is not None:
            self._hook.remove()
            self._inputs = None
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
            warn(
                f"{self.name} ended without an optimizer step; train it on the optimizer that `run.attach` returns",
            )
        else:
            self._tell_schedule()
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
            if self._taken is None or self._taken[1] >= self.schedule_epochs:
                hint = " (use `run.subset(loader)` so that epochs can be counted)" * (self.batches_per_epoch is None)
                warn(
                    f"{self.name} ended after {self.step} steps without passing its rewind point {self.rewind!r}"
                    f"{hint}; its last state is used instead, and later runs train their whole schedule from it",
                )
                self._taken = dict(state), 0.0
            end.rewind, end.rewind_epoch = self._taken
        return end

    def _tell_schedule(self) -> None:
        """Say where what the method schedules has not happened: a training shorter than told, a mask that stood."""
        if (self.after_step is None and not self.start_epoch) or self.read is not None:
            return
        if self.batches_per_epoch is not None:
            over = self.position - self.schedule_epochs
            if over < -0.5 or over >= 1:
                warn(
                    f"{self.name} trained up to epoch {self.position:.3g} of a schedule of {self.schedule_epochs}: the "
                    "method's own schedule counts on it. Create the pruner with the epochs that are trained, and loop "
                    "over `run.epochs`"
                )
        if self._began and self._began == digest(self.subnet.mask) and self.subnet.sparsity:
            warn(
                f"{self.name} has not moved its mask in {self.step} steps: it ends with the one it began with. Train "
                "longer, or let the method move it more often (its `interval`, where it has one; its learning rate)"
            )

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
