"""Steps as graphs: compiled by torch.compile as one, or captured as a CUDA graph and played again.

A graph is made of one run and used for all that follow. So it reads nothing of the run but tensors, and all that it
reads or writes stays where it is (see in_place.py).
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from timm.utils import dispatch_clip_grad
from torch import Tensor, nn

from ..config.parts import TrainingSettings
from ..core.private import compiled, forget_capture_, untraceable
from ..pruning.training import Training
from ..sparse.optimizers import plain_optimizer


class Parts:
    """A step's two parts as functions of tensors, with nothing in them that Python has to do each time.

    Args:
        settings: The training settings.
        run: The run that they are made of; its step has been taken once, so that gradients and states are there.
        model: The model, as prepared.
        optimizer: The optimizer.
        criterion: The criterion.
    """

    def __init__(
        self, settings: TrainingSettings, run: Training, model: nn.Module, optimizer: Any, criterion: nn.Module
    ):
        self.run, self.model, self.criterion = run, model, criterion
        self.optimizer = plain_optimizer(optimizer)
        self.batches, self.clip = settings.grad_accum_steps, (settings.clip_grad, settings.clip_mode)
        assert run.holder is not None  # attached
        self.holder, self.each_step, self.on_loss = run.holder, run.request.each_step, run.request.on_loss
        groups = self.optimizer.param_groups
        self.trained = [p for group in groups for p in group["params"] if p.grad is not None]
        self.gradients = [p.grad for p in self.trained]
        self._step = inspect.unwrap(type(self.optimizer).step)  # without hooks and profiling

    def stand(self, run: Training) -> bool:
        """Whether all that they read and write is where it was, of this run too: a graph knows nothing but memory."""
        gradients = zip(self.trained, self.gradients, strict=True)
        return all(p.grad is one for p, one in gradients) and self.holder.shares(run.holder)

    def _loss(self, images: Tensor, target: Tensor) -> Tensor:
        loss = self.run.sliced(self.criterion, self.model(images), target)
        return loss if self.on_loss is None else self.on_loss(self.run, loss)

    def learn(self, images: Tensor, target: Tensor) -> Tensor:
        """Forward and backward, into gradients that stay where they are; the loss."""
        loss = self._loss(images, target)
        found = torch.autograd.grad(loss / self.batches, self.trained)
        with torch.no_grad():
            for gradient, more in zip(self.gradients, found, strict=True):
                gradient.copy_(more) if self.batches == 1 else gradient.add_(more)
        self.holder.mask_gradients_()
        return loss.detach()

    def learn_by_engine(self, images: Tensor, target: Tensor) -> Tensor:
        """As `learn`; autograd adds to the gradients itself, which takes less memory where nothing is fused."""
        if self.batches == 1:
            self.forget_()
        loss = self._loss(images, target)
        (loss / self.batches).backward()
        self.holder.mask_gradients_()
        return loss.detach()

    def forget_(self) -> None:
        """Begin to add up gradients anew."""
        self.optimizer.zero_grad(set_to_none=False)

    def move(self) -> None:
        """From masked gradients to masked weights, and what the method does at each step."""
        bound, mode = self.clip
        with torch.no_grad():
            if bound is not None:
                dispatch_clip_grad(self.trained, bound, mode=mode)
            self._step(self.optimizer)
            self.holder.mask_weights_()
            if self.each_step is not None:
                self.each_step(self.run)

    def whole(self, images: Tensor, target: Tensor) -> Tensor:
        """Both parts."""
        loss = self.learn(images, target)
        self.move()
        return loss


class Compiled:
    """A step compiled as one graph; as two where it takes several batches: one for each batch, one at the end.

    Args:
        parts: What it is made of.
        backend: Of torch.compile.
        say: Told where torch cannot make one graph of it; it makes several then.
    """

    def __init__(self, parts: Parts, backend: Any, say: Callable[[str], None]):
        self.parts, self._say, self._backend = parts, say, backend
        self._compile(one_graph=True)

    def _compile(self, one_graph: bool) -> None:
        parts = self.parts
        self._learn = compiled(parts.whole if parts.batches == 1 else parts.learn, self._backend, one_graph)
        self._move = compiled(parts.move, self._backend, one_graph)

    def learn(self, images: Tensor, target: Tensor) -> Tensor:
        """A batch; with the whole step where it takes one batch."""
        try:
            return self._learn(images, target)
        except untraceable() as error:  # nothing was carried out yet
            found = str(error).strip().splitlines()
            self._say(f"training.step: compiled in several graphs, as torch says: {found[0] if found else error!r}")
            self._compile(one_graph=False)
            return self._learn(images, target)

    def move(self) -> None:
        """The end of a step over several batches."""
        self._move()


class Captured:
    """A step recorded as one CUDA graph; as two where it takes several batches.

    It is to be made when the step was taken a few times by Python on the same stream: then algorithms are chosen, and
    states, gradients and libraries' own memory are there.

    Args:
        parts: What it is made of.
        images: A batch; others have to be of its shape, type and memory format.
        target: Its targets.
        stream: To record on.
        before: An earlier one, whose memory for what is passing it takes: the two are never played at once.
    """

    def __init__(self, parts: Parts, images: Tensor, target: Tensor, stream: Any, before: "Captured | None" = None):
        self.parts, self.images, self.target = parts, images.clone(), target.clone()
        self._learn, self._move = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        self.pool = before.pool if before is not None else torch.cuda.graph_pool_handle()
        with self._recorded(self._learn, stream):
            self.loss = parts.learn_by_engine(self.images, self.target)
            if parts.batches == 1:
                parts.move()
        if parts.batches > 1:
            with self._recorded(self._move, stream):
                parts.move()

    @contextmanager
    def _recorded(self, graph: Any, stream: Any) -> Iterator[None]:
        """What is done within the block is recorded, and not carried out."""
        here = torch.cuda.current_stream()
        groups = [group for group in self.parts.optimizer.param_groups if "capturable" in group]
        for group in groups:  # or Adam refuses, though fused it does the same
            group["capturable"] = True
        try:
            # Only this thread's calls are looked at: others may go on, such as the one that pins a loader's memory.
            with torch.cuda.graph(graph, self.pool, stream, capture_error_mode="thread_local"):
                yield
        except BaseException:
            torch.cuda.set_stream(here)  # torch 2.6 stays on its own where it cannot end what it has begun
            forget_capture_(self.images.device, self.pool)
            raise
        finally:
            for group in groups:
                group["capturable"] = False

    def learn(self, images: Tensor, target: Tensor) -> Tensor:
        """A batch; with the whole step where it takes one batch. The loss is overwritten by the next one."""
        self.images.copy_(images, non_blocking=True)
        self.target.copy_(target, non_blocking=True)
        self._learn.replay()
        return self.loss

    def move(self) -> None:
        """The end of a step over several batches."""
        self._move.replay()
