"""Step: all that a batch does to a model, and three ways to carry it out.

Forward, loss, backward, the gradients' masks, clipping, the optimizer, the weights' masks and what the method does at
each step (`Run.each_step`): by Python, operation by operation (eager); as one graph of torch.compile (compiled); or as
one CUDA graph, recorded once and played again for every batch of all runs (captured).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from timm.utils import dispatch_clip_grad
from torch import Tensor, nn

from ..config.parts import TrainingSettings
from ..core.errors import SettingError, TrainingError, shown
from ..core.private import traces_gradients
from ..pruning.training import Training
from ..sparse.optimizers import begins_at_zero, plain_optimizer
from .graphs import Captured, Compiled, Parts
from .in_place import Rates, Slice, States, identity

# Steps that Python takes before a graph is made; torch asks for so many before a capture.
_FIRST = {"compiled": 1, "captured": 3}


class Step:
    """Takes the steps of one run after the other.

    Args:
        settings: The training settings.
        accelerator: Accelerate's object.
        model: The model, as prepared.
        optimizer: The optimizer, as prepared.
        num_classes: Of the data.

    Attributes:
        way: How steps are taken: eager, compiled or captured.
        now: How those of the present run are.
        lr: The highest learning rate of the last step.
        made: The graphs, by what they were made for.

    Raises:
        SettingError: ``training.step`` cannot be had.
    """

    def __init__(
        self,
        settings: TrainingSettings,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: Any,
        num_classes: int,
    ):
        self.settings, self.accelerator, self.model = settings, accelerator, model
        self.optimizer, self.num_classes = optimizer, num_classes
        self._plain: Any = plain_optimizer(optimizer)
        self.second_order = getattr(optimizer.optimizer, "is_second_order", False)
        # These have to be asked: they leave a step out, go on after it, or hold parts of the gradients.
        wrapped = accelerator.scaler is not None or optimizer.optimizer is not self._plain
        self._hooked = wrapped or self.second_order or accelerator.distributed_type == DistributedType.FSDP
        self.now = self.way = "eager"
        self._told = ""
        self._choose()
        self._rates, self._states = Rates(self._plain), States(self._plain, fused=self.way == "captured")
        self._slices: dict[int, Slice] = {}
        self._taken: dict[Any, int] = {}
        self.made: dict[Any, Any] = {}
        self._stream: Any = None  # on a card, of what comes before a capture, and of the capture
        self.lr = 0.0

    def _choose(self) -> None:
        asked, on_card = self.settings.step, self.accelerator.device.type == "cuda"
        name = type(self._plain).__name__
        why = ""
        if self._hooked or self.accelerator.num_processes > 1:
            why = "several processes, float16's gradient scaler, Lookahead and second-order optimizers need Python"
        elif not begins_at_zero(self._plain):
            why = f"{name}'s state cannot be kept in place over runs; that of sgd without dampening, adam and adamw can"
        old = "" if traces_gradients() else f"torch {torch.__version__} compiles no gradients (2.15 does)"
        reasons = {
            "eager": "",
            "compiled": why or old,
            "captured": why or ("" if on_card else "it records a CUDA graph"),
        }
        if asked != "auto":
            if reasons[asked]:
                raise SettingError(
                    f"training.step: {asked} cannot be had here, as {reasons[asked]}; set auto or eager"
                    + ", or compiled" * (not reasons["compiled"])
                )
            self.way = asked
        elif on_card and not self.settings.torchcompile:  # whether compiling pays on CPUs was not measured
            self.way = "eager" if why else "captured"
            self._told = why and f"training.step: eager, as {why}"

    def begin_(self, run: Training, say: Callable[[str], None]) -> None:
        """Start a run, the optimizer as if it had never stepped; what a checkpoint holds is loaded after this.

        Args:
            run: The run.
            say: Told where steps are not taken as they were to be, and why.
        """
        self.run, self._say = run, say
        why = "retraining tweaks come and go with its steps" if run.tweaks is not None else ""
        why = why or ("its method adds to the gradients" if run.request.before_step is not None else "")
        self.now = "eager" if why or run.reads_only else self.way
        if why and self.way != "eager":
            say(f"training.step: eager in {run.name}, as {why}")
        if self._told:
            say(self._told)
            self._told = ""
        run.attach(self.optimizer, hooks=self._hooked, whole=self.now != "eager")
        if self.now != "eager" and not all(one.parts.stand(run) for one in self.made.values()):
            self.made, self._taken = {}, {}  # a search's masks were handed over with its ticket: others are held now
        self._forget_gradients_()  # a graph leaves its last ones
        for gate in run.subnet.gates.values():
            gate.early = self.now == "eager"  # pyright: ignore[reportArgumentType]
        if run.classes is not None:
            count = len(run.classes)
            if count not in self._slices:
                self._slices[count] = Slice(count, self.num_classes, self.accelerator.device)
            self._slices[count].take_(run.classes)
            run.slice = self._slices[count]
        self._first, self._loaded = True, True

    def take(self, images: Tensor, target: Tensor, criterion: Any, seen: Callable[[Tensor], None]) -> bool:
        """Take a batch.

        Args:
            images: Where the model is.
            target: Classes, or soft targets.
            criterion: The same for all batches.
            seen: Given the batch's loss, as soon as there is one; the next batch may overwrite it.

        Returns:
            Whether it was a step's last one.
        """
        if self.now != "eager":
            if self._loaded:  # now, as a checkpoint may have been
                self._states.keep_()
                self._loaded = False
            self._rates.take_()
        self.criterion = criterion
        self.lr = self._rates.highest()
        with self.accelerator.accumulate(self.model):
            last = self.accelerator.sync_gradients
            if self.now == "eager":
                self._by_python(images, target, seen, last)
            else:
                self._by_graph(images, target, seen, last)
            self._first = last
        return last

    def _by_python(self, images: Tensor, target: Tensor, seen: Callable[[Tensor], None], last: bool) -> None:
        run, t, asked = self.run, self.settings, self.run.request
        loss = run.loss(self.criterion, self.model(images), target)
        seen(loss)
        self.accelerator.backward(loss, create_graph=self.second_order)
        holder = None if self._hooked else run.holder
        if holder is not None:
            holder.mask_gradients_()
        if not last:
            return
        if t.clip_grad is not None:
            self.accelerator.unscale_gradients(self.optimizer)
            dispatch_clip_grad(self.model.parameters(), t.clip_grad, mode=t.clip_mode)
        if holder is None:
            self.optimizer.step()
            self.optimizer.zero_grad()
            return
        if asked.before_step is not None:
            asked.before_step(run)
        self._plain.step()
        holder.mask_weights_()
        run.end_step_()
        if self.now == "eager":
            self._forget_gradients_()

    def _forget_gradients_(self) -> None:
        self._plain.zero_grad(set_to_none=self.way == "eager")  # else they stay where a graph of later runs has them

    def _by_graph(self, images: Tensor, target: Tensor, seen: Callable[[Tensor], None], last: bool) -> None:
        run, batches = self.run, self.settings.grad_accum_steps
        key = self._key(images, target)
        taken = self._taken[key] = self._taken.get(key, -1) + 1
        early = key not in self.made and taken < _FIRST[self.now] * batches
        if self._first and (early or batches > 1 or run.subnet.tap.open):
            self._forget_gradients_()
        # A method that looks at gradients before they are masked does so through Python.
        if early or run.subnet.tap.open:
            with self._aside():
                self._by_python(images, target, seen, last)
                self._states.keep_()
            return
        if key not in self.made and not self._make(key, images, target):
            if self._first:
                self._forget_gradients_()
            self._by_python(images, target, seen, last)
            return
        run.count_batch_()
        run.set_numbers_()
        seen(self.made[key].learn(images, target))
        if last:
            if batches > 1:
                self.made[key].move()
            if run.request.each_step is not None:
                run.subnet.note_moved_()
            run.follow_step_()

    def _key(self, images: Tensor, target: Tensor) -> Any:
        """What one graph is made for: all runs of the same key share it."""
        asked, classes = self.run.request, self.run.classes
        method = identity(asked.on_loss), identity(asked.each_step), None if classes is None else len(classes)
        return images.shape, images.dtype, target.shape, target.dtype, method

    def _make(self, key: Any, images: Tensor, target: Tensor) -> bool:
        """Make a graph; False where a card cannot record it, and Python goes on.

        Raises:
            TrainingError: It cannot, and nothing else was asked for.
        """
        try:
            self.made[key] = self._graph(images, target)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # what may not be done while a graph is recorded: some model's own code
            first = error.__context__ or error  # at its end torch only says that something went wrong before
            why = shown(str(first).splitlines()[0], 300) if str(first) else type(first).__name__
            told = f"this model's step cannot be recorded as a CUDA graph: {why}"
            if self.settings.step != "auto":
                raise TrainingError(f"training.step: {told}; set auto or eager") from error
            self._say(f"training.step: eager from here on, as {told}")
            self.now = self.way = "eager"
            return False
        return True

    def _graph(self, images: Tensor, target: Tensor) -> Captured | Compiled:
        parts = Parts(self.settings, self.run, self.model, self.optimizer, self.criterion)
        if self.now == "compiled":
            return Compiled(parts, self.settings.torchcompile or "inductor", self._say)
        return Captured(parts, images, target, self._stream, next(iter(self.made.values()), None))

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """On a card, a stream of its own for what comes before a capture, as torch asks for."""
        device = self.accelerator.device
        if device.type != "cuda":
            yield
            return
        self._stream = self._stream or torch.cuda.Stream(device)
        self._stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self._stream):
            yield
        torch.cuda.current_stream(device).wait_stream(self._stream)
