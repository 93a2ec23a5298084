"""The trainer: one Accelerate loop over timm's factories. It trains any `Training` it is given and knows no method.

Everything random in an epoch is seeded from (recipe seed, run, epoch), and a checkpoint within one holds the random
states, so a run that is continued goes on exactly as one that was never stopped.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import DistributedType, set_seed
from timm.layers import convert_sync_batchnorm
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler_factory import scheduler_kwargs
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from ..config.recipe import Recipe
from ..core.errors import SettingError, TrainingError, shown
from ..core.private import allow_precision, forget_loaders_
from ..core.seeds import seed_from
from ..data.datasets import Data, loader_of
from ..data.subset import Selection, subset_of
from ..distributed.collectives import share_buffers_
from ..pruning.training import Training
from ..sparse.subnet import Subnet
from ..storage.files import write_state
from .best import Best
from .build import building, channels_of, check_batch, criterion_of, mixup_of
from .checkpointing import Prepared, Progress, Saving, Silent
from .epoch_log import EpochLog, nothing_yet
from .finite_check import Watch
from .memory import keep_freed_memory
from .randomness import Epoch, own_generator
from .scoring import run_metrics, top1_and_loss
from .step import Step
from .supported import check_engine, deterministic, memory_format


class Trainer:
    """Trains one model again and again under one recipe; model, optimizer and loaders are prepared once.

    Args:
        recipe: The recipe.
        model: The model, prepared here; its parameters must be all there (create the pruner first).
        data: The recipe's data.
    """

    def __init__(self, recipe: Recipe, model: nn.Module, data: Data):
        t = self.settings = recipe.training
        self.seed = recipe.seed
        precision = {"float16": "fp16", "bfloat16": "bf16"}[t.amp_dtype] if t.amp else "no"
        allow_precision(precision)
        self.accelerator = Accelerator(
            gradient_accumulation_steps=t.grad_accum_steps,
            mixed_precision=precision,
            # What a loader has pinned is copied to a card while that computes; nothing waits for it.
            dataloader_config=DataLoaderConfiguration(split_batches=True, non_blocking=True),
            step_scheduler_with_optimizer=False,
        )
        if precision == "fp16" and self.accelerator.scaler is None:
            raise SettingError("training.amp_dtype: float16 needs a GPU; set bfloat16, or training.amp=false")
        check_engine(self.accelerator, recipe)
        if self.accelerator.device.type == "cpu":
            keep_freed_memory()
        self._layout = memory_format(t, self.accelerator.device)
        if self._layout == torch.channels_last:
            model = model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        if t.sync_bn and self.accelerator.num_processes > 1:
            if self.accelerator.device.type == "cpu":
                raise SettingError(
                    "training.sync_bn: torch's SyncBatchNorm refuses CPUs; set it to false, or parallel=runs and "
                    "processes_per_run=1 so that each process trains runs of its own"
                )
            model = convert_sync_batchnorm(model)
        with building("data"):
            train_set, val_set, test_set = data.sets(model, self.accelerator.device)
        prepare = self.accelerator.prepare_data_loader
        self.unreadable = data.unreadable
        self.input_size = (channels_of(recipe, model), *data.input_size(model))
        workers = recipe.data.workers
        self.train_loader = loader_of(train_set, t.batch_size, workers, shuffle=True)
        self._check_batch(self.train_loader, model)  # here too, where nothing is written yet
        self.val_loader = prepare(loader_of(val_set, t.batch_size, workers))
        self.test_loader = prepare(loader_of(test_set, t.batch_size, workers))
        with building("training"):
            optimizer = create_optimizer_v2(model, **optimizer_kwargs(t))
            if t.torchcompile and t.step != "compiled":
                model = torch.compile(model, backend=t.torchcompile)  # pyright: ignore[reportAssignmentType]
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        scaler = self.accelerator.scaler
        self._fresh_scaler = None if scaler is None else scaler.state_dict()
        self.mixup = mixup_of(t, data.num_classes)
        self.criterion = criterion_of(t)
        self.step = Step(t, self.accelerator, self.model, self.optimizer, data.num_classes)
        self._good: dict[str, Tensor] = {}  # the last good state, in the same memory over all runs

    @property
    def splits(self) -> bool:
        """Whether FSDP2 has split the model over the processes."""
        return self.accelerator.distributed_type == DistributedType.FSDP

    def fit(self, run: Training, folder: Path | None = None, progress: Progress | None = None) -> dict[str, Any]:
        """Train a run to its end, validate after every epoch, score the test set once.

        Behind soft masks the epochs' validation is the soft network's; what is scored at the end is the hard one.

        Args:
            run: The run; its `metrics` are filled.
            folder: Where checkpoints within the run go; a run found half done there is continued.
            progress: Told of every step and epoch.

        Returns:
            The metrics: best and last validation top-1, test top-1 (percent) and losses of the last weights, seconds.

        Raises:
            TrainingError: The loss or a weight was NaN or infinite; the message says at which step, and where the last
                good state is.
            SettingError: The schedule cannot be built, or leaves no step to train.
        """
        try:
            with deterministic(self.settings.deterministic, self.accelerator.device):
                return self._fit(run, folder, progress or Silent())
        except torch.OutOfMemoryError as error:
            raise TrainingError(
                f"training.batch_size: {self.settings.batch_size} images a step take more memory than the device has; "
                "set fewer, with training.grad_accum_steps for the same step. Finished runs are kept: "
                f"{shown(str(error), 300)}"
            ) from error

    def _fit(self, run: Training, folder: Path | None, progress: Progress) -> dict[str, Any]:
        going = self._begun(run, folder, progress)
        progress.begin(run, going.batches)
        for epoch in range(going.done["epoch"], run.schedule_epochs):
            self._train_epoch(going, epoch, progress)
            if run.reads_only:  # the weights are as they were
                return run.metrics
            self._end_epoch(going, epoch, progress)
        return self._scored(going, folder)

    def _begun(self, run: Training, folder: Path | None, progress: Progress) -> "_Going":
        """The run made ready to train: from its beginning, or from where its checkpoint is."""
        t, accelerator = self.settings, self.accelerator
        self.step.begin_(run, progress.say)
        if (draws := own_generator(self.optimizer)) is not None:
            draws.generator.manual_seed(draws.seed)  # or a run would depend on those that this process trained before
        base = run.subset(self.train_loader)
        self._check_batch(base, self.model if self.splits else run.subnet.model)
        loader = accelerator.prepare_data_loader(base)
        forget_loaders_(accelerator)
        updates = math.ceil(len(loader) / t.grad_accum_steps)
        schedule: Any = scheduler_kwargs(t) | {"num_epochs": run.schedule_epochs, "updates_per_epoch": updates}
        with building("training.sched"):
            scheduler: Any = create_scheduler_v2(self.optimizer, **schedule)[0]
            if scheduler is None and t.sched != "none":  # timm 1.0.27 says nothing, and would leave the rate as it is
                raise ValueError(f"timm {timm.__version__} has no schedule {t.sched!r}; use a later timm")
        if accelerator.scaler is not None and self._fresh_scaler is not None:
            accelerator.scaler.load_state_dict(self._fresh_scaler)
        done = self._starting_at(run, updates)
        epochs = Epoch(loader, base.sampler, base.batch_size, base.num_workers)
        prepared = Prepared(accelerator, self.optimizer, epochs, self._average(run))
        saving = Saving(run, prepared, folder, done, t.checkpoint_interval)
        continued = saving.load_(progress)
        if not continued and run.tweaks is not None:
            # Nothing here may depend on what this process did before: a continued search is another process.
            seed = base.sampler.seed = seed_from(self.seed, run.index)
            set_seed(seed)
            self._mix(0)
            run.tweaks.rescale_(run.subnet.mask, _Through(loader, self._mixed), self.criterion)
            prepared.ema = self._average(run)  # of the weights that training starts from
        if run.tweaks is not None:
            run.tweaks.at_(run.progress)
        if scheduler is not None:
            scheduler.step(done["epoch"])
            scheduler.step_update(done["update"])
        best = Best(run, folder if t.keep_best else None, done, continued)
        log, watch = EpochLog(run, folder, done, continued), Watch(run, accelerator.device, folder, self._good)
        return _Going(run, prepared, saving, scheduler, watch, log, best, len(loader))

    def _starting_at(self, run: Training, updates: int) -> dict[str, Any]:
        """How far a run is before its first step: late rewinding goes on from its point of the schedule.

        Raises:
            SettingError: Nothing is left to train.
        """
        update = round(run.start_epoch * updates)
        if update >= run.schedule_epochs * updates:
            raise SettingError(
                f"{run.name} starts at epoch {run.start_epoch:g} (its rewind point) of {run.schedule_epochs}: nothing "
                "is left to train; set training.epochs higher, or rewind to an earlier point"
            )
        batch = update % updates * self.settings.grad_accum_steps
        place = {"epoch": update // updates, "batch": batch, "update": update}
        return place | {"best": {"top1": -1.0}, "val": {}, "seconds": 0.0, **nothing_yet()}

    def _train_epoch(self, going: "_Going", epoch: int, progress: Progress) -> None:
        run, saving, done = going.run, going.saving, going.done
        self._mix(epoch)
        self.model.train()
        # Runs that only read see the same images, each augmented alike.
        seed = seed_from(self.seed, 0 if run.reads_only else run.index, epoch)
        for images, target in going.prepared.epochs.batches(seed, done["batch"], saving.states):
            stepped = self.step.take(*self._mixed(images, target), self.criterion, going.see)
            done["lr"] = self.step.lr
            done["batch"] += 1
            progress.step()
            if stepped:
                done["update"] += 1
                if going.scheduler is not None:
                    going.scheduler.step_update(done["update"])
                if going.prepared.ema is not None:
                    going.prepared.ema.update(run.subnet.model, step=run.step)
                saving.look(done["update"])
        if hasattr(self.optimizer.optimizer, "sync_lookahead"):
            self.optimizer.optimizer.sync_lookahead()
        run.subnet.apply_()
        run.tell_unreached()
        going.watch.keep()
        if self.unreadable is not None:
            self.unreadable.look(progress.say)

    def _end_epoch(self, going: "_Going", epoch: int, progress: Progress) -> None:
        """Validate, and save where it is time to."""
        run, done = going.run, going.done
        run.settle_()
        if run.tweaks is not None and epoch + 1 == run.schedule_epochs:
            run.tweaks.remove_()  # a last step that the scaler skipped would leave them
        val = self.evaluate(self.val_loader, run, going.prepared.ema)
        if going.scheduler is not None:
            going.scheduler.step(epoch + 1)
        # What is scored behind tweaks or soft masks is another model than the one that is left.
        plain = (run.tweaks is None or run.tweaks.gone) and not run.subnet.soft
        best = {**val, "epoch": epoch} if plain and val["top1"] > done["best"]["top1"] else done["best"]
        if plain:
            going.best.look(epoch, val, going.prepared.ema)
        row = going.log.end_epoch(epoch, val, going.saving.seconds())
        done |= {"epoch": epoch + 1, "batch": 0, "best": best, "val": val}
        going.saving.states = None
        progress.epoch(row)
        going.saving.look()

    def _scored(self, going: "_Going", folder: Path | None) -> dict[str, Any]:
        """The metrics of a run that has come to its end, of the model as it is written down."""
        run, ema, done = going.run, going.prepared.ema, going.done
        seconds, val, best, soft = going.saving.seconds(), done["val"], done["best"], run.subnet.soft
        with run.subnet.hard():
            if soft:
                run.metrics["val_top1_soft"] = val["top1"]
                val = best = self.evaluate(self.val_loader, run, ema)
            test = self.evaluate(self.test_loader, run, ema)
        run.metrics |= run_metrics(best, val, test, seconds)
        if ema is not None and folder is not None and self.accelerator.is_main_process:
            # The metrics are the averaged weights'; the search prunes by the raw ones, in model.safetensors.
            write_state(folder / "model_ema.safetensors", Subnet(ema.module, ()).state())
        return run.metrics

    def _check_batch(self, loader: Any, model: nn.Module) -> None:
        count, processes = loader.batch_size, self.accelerator.num_processes
        if not loader.drop_last and processes == 1:  # among several, Accelerate fills the last batch up
            count = len(loader.dataset) % count or count
        check_batch(self.settings, model, count // processes, self.input_size)

    def _average(self, run: Training) -> ModelEmaV3 | None:
        """The moving average of the run's weights, beginning with those it has now; None where there is to be none."""
        t = self.settings
        return ModelEmaV3(run.subnet.model, t.model_ema_decay, use_warmup=t.model_ema_warmup) if t.model_ema else None

    def _mix(self, epoch: int) -> None:
        if self.mixup is not None:
            self.mixup.mixup_enabled = not (0 < self.settings.mixup_off_epoch <= epoch)

    def score(self, run: Training) -> dict[str, Any]:
        """The metrics of the model as it is, without training: of a ticket that its search has trained."""
        began = time.monotonic()
        with deterministic(self.settings.deterministic, self.accelerator.device):
            val, test = (self.evaluate(loader, run) for loader in (self.val_loader, self.test_loader))
        run.metrics |= run_metrics(val, val, test, time.monotonic() - began)
        return run.metrics

    @torch.no_grad()
    def evaluate(self, loader: Any, run: Training, ema: ModelEmaV3 | None = None) -> dict[str, float]:
        """Top-1 accuracy (percent) and cross-entropy of the run's model, among the run's classes only."""
        model: nn.Module = self.model
        if ema is not None:
            model = ema.module
            # The average started dense; what is pruned now must not show in what is scored.
            run.subnet.mask_(model)
        if self.splits:  # DDP does it before each forward pass, FSDP2 never
            share_buffers_(run.subnet.model)
        model.eval()
        return top1_and_loss(
            model, subset_of(loader, Selection(run.classes)), run.classes, self.accelerator, self._laid_out
        )

    def _laid_out(self, images: Tensor) -> Tensor:
        return images.contiguous(memory_format=self._layout)

    def _mixed(self, images: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        images = self._laid_out(images)
        if self.mixup is None:
            return images, target
        if len(images) % 2:  # timm's mixup pairs images
            images, target = images[:-1], target[:-1]
        return self.mixup(images, target)


@dataclass
class _Going:
    """A run that is being trained, and what goes on with it."""

    run: Training
    prepared: Prepared
    saving: Saving
    scheduler: Any
    watch: Watch
    log: EpochLog
    best: Best
    batches: int  # of an epoch

    @property
    def done(self) -> dict[str, Any]:
        """How far it is."""
        return self.saving.done

    def see(self, loss: Tensor) -> None:
        """A batch's loss, when there is one; the device is not waited for."""
        self.watch.see(loss)
        self.log.see(loss)


class _Through:
    """A loader's batches, changed by a function; anew each time it is gone through."""

    def __init__(self, loader: Any, change: Callable[..., Any]):
        self.loader, self.change = loader, change

    def __iter__(self) -> Iterator[Any]:
        return (self.change(*batch) for batch in self.loader)
