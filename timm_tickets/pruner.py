"""Pruner: an iterator over the training runs a method wants, ending with a ticket.

A method is one file under methods/: a frozen dataclass of settings and one generator, `Method.search`, that yields
rounds (lists of independent `Run`s) and receives what each run ended with. It never trains and never sees a device or
a process rank. Whoever iterates the pruner trains.

Resuming is replay: a pruner with a folder writes down what each run ended with; another one with the same settings and
folder feeds these ends to the generator and yields only the runs that are missing.
"""

import re
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field, TypeAdapter
from pydantic.dataclasses import dataclass as settings
from torch import Tensor, nn
from torch.optim import Optimizer

from .data import Selection, is_loader, subset_of
from .files import is_writer, read_json, read_state, write_json, write_state
from .masks import (
    Distribution,
    Masks,
    Scope,
    Scores,
    keep_count,
    kept,
    layer_sparsities,
    prunable_names,
    prune,
    sparsity,
    total,
)
from .settings import SettingError, TrainingError
from .subnet import State, Subnet
from .ticket import Ticket, describe_model, load_ticket
from .wrappers import plain_optimizer, reset_, separate_

# A trainer's checkpoint within a run; it stays until the run is written down.
CHECKPOINT = "checkpoint.pt"

Rewind = Annotated[
    str,
    Field(
        pattern=r"^\d+(ep|it)$",
        description="step the weights return to: '0ep' is their initialisation, '2ep' after 2 epochs, '500it' steps",
    ),
]


@dataclass(eq=False)
class End:
    """What a run ended with: plain data on the CPU.

    Attributes:
        state: The state dict at the end, pruned weights zero; behind gates, weights as before them.
        mask: The mask at the end.
        scores: What the method gathered in the run, or learned.
        baked: The state dict of the plain sparse model: `state` where there are no gates.
        rewind: The state at the run's rewind point, where it was asked to take one.
        rewind_epoch: How far into training that point lies, in epochs; 0 where it was never reached.
        metrics: Whatever the trainer measured.
    """

    state: State = field(repr=False)
    mask: Masks = field(repr=False)
    scores: Scores = field(default_factory=dict, repr=False)
    baked: State = field(default_factory=dict, repr=False)
    rewind: State | None = field(default=None, repr=False)
    rewind_epoch: float = 0.0
    metrics: dict[str, Any] = field(default_factory=dict)

    @property
    def weights(self) -> State:
        """The prunable weights at the end of the run."""
        return {name: self.state[name] for name in self.mask}


@dataclass(eq=False)
class Run:
    """One requested training. A method sets the first group of fields, the pruner the second.

    Attributes:
        epochs: Epochs to train; the method's `epochs` unless it asked for another number.
        classes: Train on these classes only, as if the head had only these; all where None.
        data_part: ``(i, n)``: train on the i-th of n random parts of the images; all where None.
        limit: Train on so many batches only: a run that reads gradients and is no training. It is not scored.
        rewind: Where in this run the rewind point is taken; nowhere where None.
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
        start_epoch: How far into the schedule the starting weights are, in epochs: late rewinding goes on from there.
        step: Optimizer steps taken.
        batches: Batches whose loss was taken: more than `step` under gradient accumulation.
        batches_per_epoch: Set by the first `subset` of a loader; a trainer may set it itself.
        metrics: For the trainer to fill; kept with the run and in its ticket. JSON types.
        scores: For the method to fill while the run goes on: a tensor a weight, handed back in its `End`.
        optimizer: The optimizer that changes the weights, once attached.
        seed: The method's.
    """

    epochs: int = 0
    classes: Sequence[int] | None = None
    data_part: tuple[int, int] | None = None
    limit: int | None = None
    rewind: str | None = None
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
    start_epoch: float = 0.0
    step: int = 0
    batches: int = 0
    batches_per_epoch: int | None = None
    metrics: dict[str, Any] = field(default_factory=dict)
    scores: Scores = field(default_factory=dict, repr=False)
    optimizer: Optimizer | None = field(default=None, repr=False)
    seed: int = 0
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

    def attach(self, optimizer: Any) -> Any:
        """Start the run on an optimizer: its state cleared, earlier hooks gone, pruned weights held at exactly zero.

        Its hyper-parameters stay as they are, but for a learning rate that a schedule has moved: it returns to where
        that schedule began. Build the run's schedule afterwards.

        Args:
            optimizer: A torch optimizer over the model's parameters, or Accelerate's wrapper of one.

        Returns:
            The same optimizer.
        """
        self.optimizer = plain_optimizer(optimizer)
        if self.subnet.gates:
            separate_(self.optimizer, [gate.score for gate in self.subnet.gates.values()], self.weight_decay)
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
            output, target = _slice_classes(output, target, self.classes)
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
        if self._taken is None and self.rewind is not None and self._reached(self.rewind):
            reached = 0.0 if self.batches_per_epoch is None else self.position
            self._taken = self.subnet.state(), reached

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
            self._taken = self.subnet.state(), 0.0

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
        self.settle_()
        self.subnet.apply_()
        state = self.subnet.state()
        if (name := not_finite(state)) is not None:
            raise TrainingError(
                f"{self.name} ended with values in {name} that are not finite; it is not written down. Lower the "
                "learning rate or clip gradients, and train it again"
            )
        if self.step == 0:
            warnings.warn(
                f"{self.name} ended without an optimizer step; train it on the optimizer that `run.attach` returns",
                stacklevel=4,
            )
        scores = {name: score.detach().cpu().contiguous() for name, score in self.scores.items()}
        end = End(state, self.subnet.mask, scores | self.subnet.scores(), metrics=plain_metrics(self.metrics))
        end.baked = self.subnet.baked_state() if self.subnet.gates else state
        if self.rewind is not None:
            if self._taken is None or self._taken[1] >= self.epochs:
                hint = " (use `run.subset(loader)` so that epochs can be counted)" * (self.batches_per_epoch is None)
                warnings.warn(
                    f"{self.name} ended after {self.step} steps without passing its rewind point {self.rewind!r}"
                    f"{hint}; its last state is used instead, and later runs train their whole schedule from it",
                    stacklevel=4,
                )
                self._taken = state, 0.0
            end.rewind, end.rewind_epoch = self._taken
        return end

    def progress_state(self) -> dict[str, Any]:
        """What a checkpoint within the run must hold besides model and optimizer: tensors and primitives."""
        counters = {"step": self.step, "batches": self.batches}
        gates = {name: dict(gate.named_buffers()) for name, gate in self.subnet.gates.items()}
        method = {"mask": self.subnet.mask, "gates": gates, "scores": dict(self.scores), "tap": self.subnet.tap}
        return counters | method | {"taken": self._taken}

    def load_progress_(self, saved: dict[str, Any]) -> None:
        self.step, self.batches, self._taken = saved["step"], saved["batches"], saved["taken"]
        self.scores, self.subnet.tap = saved["scores"], saved["tap"]
        self.subnet.set_mask_(saved["mask"])
        for name, gate in self.subnet.gates.items():
            for key, value in gate.named_buffers():
                value.copy_(saved["gates"][name][key])


def rewind_parts(point: str) -> tuple[int, str]:
    """Number and unit of a rewind point: ``'500it'`` is ``(500, 'it')``."""
    found = re.fullmatch(r"(\d+)(ep|it)", point)
    if found is None:
        raise ValueError(f"rewind: {point!r} is not valid; write epochs as '2ep' or optimizer steps as '500it'")
    return int(found[1]), found[2]


def _slice_classes(output: Any, target: Tensor, classes: Sequence[int]) -> tuple[Any, Tensor]:
    index = torch.as_tensor(classes, device=target.device)
    if isinstance(output, tuple | list):
        output = tuple(one[:, index] for one in output)
    else:
        output = output[:, index]
    if target.ndim > 1:
        part = target[:, index]
        return output, part / part.sum(dim=1, keepdim=True)
    order = index.argsort()
    place = order[torch.searchsorted(index[order], target).clamp(max=len(classes) - 1)]
    # On a GPU the check would wait for the device at every batch.
    if target.device.type == "cpu" and not torch.equal(index[place], target):
        raise ValueError(f"target: holds classes outside this run's {list(classes)}; train on `run.subset(loader)`")
    return output, place


def not_finite(state: State) -> str | None:
    """Name of the first tensor with a NaN or an infinity in it."""
    return next((name for name, value in state.items() if not value.isfinite().all()), None)


def plain_metrics(metrics: dict[str, Any]) -> dict[str, Any]:
    """Metrics as JSON types: scalar tensors and numpy numbers become Python's."""
    return {str(key): value.item() if hasattr(value, "item") else value for key, value in metrics.items()}


@settings(frozen=True, kw_only=True, config={"extra": "forbid"})
class Method:
    """What every pruner can be told; a method adds its own settings and its `search`.

    Subclasses are made dataclasses, and their settings checked, by `register_pruner`.

    Attributes:
        name: The registered name.
        ends_trained: Whether the ticket's values are final, found in the search itself: nobody trains it again.
    """

    name: ClassVar[str] = ""
    ends_trained: ClassVar[bool] = False

    sparsity: Annotated[float, Field(ge=0, lt=1, description="fraction of the prunable weights to prune")]
    epochs: Annotated[int, Field(ge=1, description="epochs of one training run")] = 20
    seed: Annotated[int, Field(ge=0, description="seed of everything random in the method")] = 0
    include: Annotated[tuple[str, ...], Field(description="wildcards of the weights that may be pruned")] = ("*",)
    exclude: Annotated[tuple[str, ...], Field(description="wildcards of the weights that are left alone")] = ()
    classifier: Annotated[bool, Field(description="prune the classifier too")] = False

    def prepare_(self, subnet: Subnet) -> None:
        """Called once, when the pruner is created: refuse a model that does not suit, attach gates, freeze.

        Raises:
            SettingError: The model does not suit.
        """

    def search(self, subnet: Subnet) -> Generator[list[Run], list[End], None]:
        """Yield rounds, receive their ends; leave the subnet rewound and masked.

        On entry the subnet's mask keeps everything and its rewind point is the model as it was given.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say how it searches")

    def described(self) -> dict[str, Any]:
        """The registered name and every setting, as JSON types."""
        return {"name": self.name, **TypeAdapter(type(self)).dump_python(self, mode="json")}

    def runs(self, subnet: Subnet) -> int | None:
        """How many runs the search will ask for, where that is known beforehand."""
        return None


@settings(frozen=True, kw_only=True, config={"extra": "forbid"})
class OneShot(Method):
    """A method that cuts its mask once, from one set of scores."""

    scope: Annotated[Scope, Field(description="compare scores across all layers, or within each")] = "global"
    distribution: Annotated[Distribution, Field(description="layerwise, the density of each layer")] = "uniform"

    def prune_(self, subnet: Subnet, scores: Scores) -> None:
        """Prune the lowest scores among what is kept, to the asked sparsity exactly."""
        cut = kept(subnet.mask) - keep_count(total(subnet.mask), self.sparsity)
        subnet.set_mask_(prune(subnet.mask, scores, cut, self.scope, self.distribution))

    def runs(self, subnet: Subnet) -> int:
        return 0


class Pruner(Iterator[Run]):
    """A method bound to a model: iterate it for the runs to train, read `ticket` at the end.

    Args:
        method: The method and its settings.
        model: The model to prune, in place; plain, or wrapped by DDP or ``torch.compile``.
        folder: Where to write down what each run ended with; runs found there are replayed, not asked for again.

    Attributes:
        subnet: The model with its mask and rewind point.
        first_state: The state dict the search began with, once it has begun.
        replayed: Names of the runs that were read from the folder instead of trained.
        runs_done: Runs that have ended, replayed ones included.
        rounds_done: Rounds that have ended.
        trained_dense: Whether a run trained the whole network on everything.
    """

    def __init__(self, method: Method, model: nn.Module, folder: str | Path | None = None):
        self.method = method
        self.subnet = Subnet(model, prunable_names(model, method.include, method.exclude, method.classifier))
        keep_count(total(self.subnet.mask), method.sparsity)  # refused now, not after the first training
        method.prepare_(self.subnet)
        self.folder = None if folder is None else Path(folder)
        self.replayed: list[str] = []
        self.runs_done = self.rounds_done = 0
        self.trained_dense = False
        self.metadata: dict[str, Any] = {
            "model": describe_model(self.subnet.model),
            "pruner": method.described(),
        }
        self.first_state: State = {}
        self._start_epoch = 0.0
        self._failure: BaseException | None = None
        self._waiting: Run | None = None
        self._runs = self._generate()

    @property
    def runs(self) -> int | None:
        """How many runs the whole search has, where the method knows."""
        return self.method.runs(self.subnet)

    @property
    def sparsity(self) -> float:
        """Sparsity of the present mask: at the end, the ticket's."""
        self._start()
        return self.subnet.sparsity

    @property
    def ticket(self) -> Ticket:
        """The ticket: at the end of the search the one that was asked for, before it the one the mask now gives."""
        self._start()
        assert self.subnet.start is not None
        return self._ticket(self.subnet.mask, self.subnet.start, self._start_epoch)

    def __next__(self) -> Run:
        if self._waiting is not None:
            run, self._waiting = self._waiting, None
            return run
        self._fail_again()
        try:
            return next(self._runs)
        except StopIteration:
            raise
        except BaseException as error:
            self._failure = error
            raise

    def _start(self) -> None:
        # A pruner without runs has its ticket without being iterated.
        self._fail_again()
        if self.subnet.start is None:
            self._waiting = next(self, None)

    def _fail_again(self) -> None:
        # A generator that has raised is exhausted: without this the next call would look like the end of the search.
        if self._failure is not None:
            raise RuntimeError("the search stopped at an error; create the pruner again to go on") from self._failure

    def _generate(self) -> Iterator[Run]:
        subnet = self.subnet
        subnet.start = self.first_state = self._first_state()
        subnet.load_(subnet.start)
        search = self.method.search(subnet)
        ends: list[End] | None = None
        while True:
            try:
                requests = search.send(ends)  # pyright: ignore[reportArgumentType]
            except StopIteration:
                return
            base = subnet.state() if len(requests) > 1 else None
            scores = subnet.scores()
            mask = subnet.mask
            ends = []
            for part, run in enumerate(requests):
                run.subnet, run.index, run.round, run.part = subnet, self.runs_done, self.rounds_done, part
                run.name = f"round_{run.round:02d}" + (f"_part_{part}" if base else "")
                run.epochs = run.epochs or self.method.epochs
                run.seed = self.method.seed
                run.start_epoch = self._start_epoch if run.from_rewind else 0.0
                end = self._read(run)
                if end is None:
                    if base is not None:
                        subnet.set_mask_(mask)
                        subnet.load_(base)
                        subnet.load_scores_(scores)
                    run.begin_()
                    yield run
                    end = run.finish_()
                    self._write(run, end)
                else:
                    subnet.set_mask_(end.mask)
                    subnet.load_(end.state)
                    subnet.load_scores_(end.scores)
                    self.replayed.append(run.name)
                ends.append(end)
                self.trained_dense |= run.whole and sparsity(end.mask) == 0
                self.runs_done += 1
            if ends[0].rewind is not None:
                self._start_epoch = ends[0].rewind_epoch
            self.rounds_done += 1

    def _first_state(self) -> State:
        """The model as given; with a folder, as it was given the first time.

        Raises:
            SettingError: The folder belongs to a search with other settings, or of another model.
        """
        state = self.subnet.state()
        if self.folder is None:
            return state
        shapes = {name: list(value.shape) for name, value in state.items()}
        identity = {**self.method.described(), "model": self.metadata["model"]["architecture"], "tensors": shapes}
        found = read_json(self.folder / "pruner.json")
        if found is not None:
            changed = [key for key in identity if found.get(key) != identity[key]]
            if changed:
                told = "; ".join(f"{k}: {found.get(k)} there, {identity[k]} now" for k in changed if k != "tensors")
                raise SettingError(
                    f"{self.folder} holds another search ({told or 'its tensors differ'}); "
                    "create the pruner with the settings it began with, or give it another folder"
                )
            return read_state(self.folder / "start.safetensors")
        if is_writer():
            write_state(self.folder / "start.safetensors", state)
            write_json(self.folder / "pruner.json", identity)
        return state

    def _read(self, run: Run) -> End | None:
        if self.folder is None:
            return None
        folder = self.folder / run.name
        record = read_json(folder / "run.json")
        if record is None:
            return None
        rewind = folder / "rewind.safetensors"
        baked = read_state(folder / "model.safetensors")
        return End(
            state=baked | (read_state(folder / "ungated.safetensors") if record["gated"] else {}),
            baked=baked,
            mask=load_ticket(folder / f"{run.name}.ticket").masks,
            scores=read_state(folder / "scores.safetensors") if record["scores"] else {},
            rewind=read_state(rewind) if record["rewind"] else None,
            rewind_epoch=record["rewind_epoch"],
            metrics=record["metrics"],
        )

    def _write(self, run: Run, end: End) -> None:
        if self.folder is None:
            return
        start = self.subnet.start if end.rewind is None else end.rewind
        assert start is not None
        ticket = self._ticket(end.mask, start, end.rewind_epoch or self._start_epoch)
        write_run(self.folder / run.name, run, end, ticket)

    def _ticket(self, mask: Masks, start: State, start_epoch: float) -> Ticket:
        counts = {name: int(layer.sum()) for name, layer in mask.items()}
        facts = {"sparsity": sparsity(mask), "kept": counts, "start_epoch": start_epoch, "notes": self.subnet.notes}
        return Ticket.from_state(start, mask, {**self.metadata, **facts})


def write_run(folder: Path, run: Run, end: End, ticket: Ticket) -> None:
    """Write down a finished run; ``run.json`` last, as the sign that its folder is whole."""
    if not is_writer():
        return
    ticket.metadata["metrics"] = end.metrics
    ticket.save(folder / f"{run.name}.ticket")
    write_state(folder / "model.safetensors", end.baked)
    gated = {name: end.state[name] for name in end.mask} if end.baked is not end.state else {}
    if gated:
        write_state(folder / "ungated.safetensors", gated)
    if end.scores:
        write_state(folder / "scores.safetensors", end.scores)
    if end.rewind is not None:
        write_state(folder / "rewind.safetensors", end.rewind)
    layers = layer_sparsities(end.mask)
    record = {
        "name": run.name,
        "index": run.index,
        "round": run.round,
        "part": run.part,
        "classes": None if run.classes is None else list(run.classes),
        "sparsity": sparsity(end.mask),
        "layer_min": min(layers.values()),
        "layer_max": max(layers.values()),
        "steps": run.step,
        "scored": run.limit is None,
        "scores": bool(end.scores),
        "gated": bool(gated),
        "rewind": end.rewind is not None,
        "rewind_epoch": end.rewind_epoch,
        "metrics": end.metrics,
    }
    write_json(folder / "run.json", record)
    (folder / CHECKPOINT).unlink(missing_ok=True)
