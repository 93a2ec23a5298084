"""What a search costs: an epoch, a step over the dense one, and memory, for every method beside a plain PyTorch loop.

    python benchmarks/search_speed.py --size small medium large          # on a card
    python benchmarks/search_speed.py --size cpu                         # on CPUs
    python benchmarks/search_speed.py --size small --set training.step=captured --set data.cache=device

Everything goes the way that `timm-tickets search` goes: a recipe, its pruner, its trainer. In one process, epochs of a
method and epochs of the dense network by the same trainer and settings alternate, so that what else the machine does
hits both; the ratio is the median over these pairs. So do epochs of a plain PyTorch loop, without this package, with
the same network, optimizer, precision, images and torchvision's own augmentation, in eager mode: the control.

- `next to no network` is the same trainer with a network of two small layers: what loading and the trainer itself take.
  Its epoch over the dense one is their share of it, where nothing of it is hidden behind the network.
- A method's epochs are those of a run with its masks: of imp and colt the one after the first cut; of those that only
  read gradients or weights, the ticket's training. The dense network holds no masks, but for its smallest layer's: a
  step that is compiled or captured would hold all of them, whether or not they prune.
- `s / 50,000 images`: training an epoch, loading included, as if it had so many images.
- `ms a step`: median from one step's end to the next one's, so with whatever loading is not hidden.
- `s between`: from an epoch's last step to the next epoch: validation on an eighth as many images, and what is kept.
- `peak MB`: what torch has taken of a card at the peak, a graph's memory included and images kept there not, over what
  it had before the network was built; the dense network's is of an epoch with nothing beside it.

On a card times are its events' and, after synchronising, the clock's; on CPUs they are processor time of all threads,
so that other work disturbs them little, and images are loaded in the same process. Rows that are done are kept beside
the table, in a file that ends in .jsonl: the same command goes on from there.
"""

import argparse
import gc
import json
import platform
import shlex
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import timm
import torch
from PIL import Image
from rich.console import Console
from timm.models import register_model
from timm.optim import create_optimizer_v2, optimizer_kwargs
from torch import nn
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

import timm_tickets as tt
from timm_tickets.distributed.processes import join_processes
from timm_tickets.experiments.begin import built
from timm_tickets.experiments.search import create_search
from timm_tickets.sparse.prunable import prunable_names
from timm_tickets.training.build import build_model
from timm_tickets.training.checkpointing import Silent
from timm_tickets.training.supported import memory_format
from timm_tickets.training.trainer import Trainer

LEARNED = ["imp", "colt", "continuous_sparsification", "edge_popup", "frozen_slt", "jackpot"]
MOVING = ["gradual", "set", "rigl"]
ONCE = ["magnitude", "random", "snip", "grasp", "synflow"]
# Beside what a method is by default; the search has to get to its masks in a few steps.
SETTINGS = {"imp": ["rewind=0ep"], "synflow": ["iterations=2"]}


PLAIN, ALONE = "plain PyTorch loop", "next to no network"


@dataclass(frozen=True)
class Case:
    """A network, its images and the methods that are tried on it.

    Attributes:
        images: To train on, made up, so that an epoch has enough steps to take a median of.
    """

    model: str
    batch: int
    images: int
    pixels: int = 32
    methods: tuple[str, ...] = (*LEARNED, *MOVING)

    @property
    def name(self) -> str:
        return f"{self.model}, {self.pixels} px, batch {self.batch}"


EVERY = (*LEARNED, *MOVING, *ONCE)
SIZES = {
    "tiny": [Case("test_resnet", 16, 64, methods=EVERY)],
    "cpu": [
        Case("cifar_resnet20", 128, 640, methods=EVERY),
        Case("cifar_resnet18", 64, 256, methods=tuple(LEARNED)),
    ],
    "small": [Case("cifar_resnet20", 128, 12_800, methods=EVERY)],
    "medium": [Case("cifar_resnet18", 128, 12_800), Case("cifar_resnet18", 512, 25_600)],
    "large": [
        Case("resnet50", 256, 4_096, 224, tuple(LEARNED)),
        Case("vit_small_patch16_224", 256, 4_096, 224, tuple(LEARNED)),
    ],
}


@dataclass
class Epoch:
    """What an epoch took: seconds of training, of all else up to the next one, and of each step; bytes at the peak."""

    training: float
    between: float
    steps: list[float]
    images: int
    peak: int


class Enough(Exception):
    """So many epochs are timed."""


@dataclass
class Clock(Silent):
    """Progress that times epochs, and calls a function after each; `before` is what was taken of the card before."""

    card: bool
    batch: int
    before: int
    after: Callable[[list[Epoch]], None]
    epochs: list[Epoch] = field(default_factory=list)

    def begin(self, run: Any, steps: int) -> None:
        self.count = steps
        self._start()

    def _start(self) -> None:
        if self.card:
            torch.cuda.reset_peak_memory_stats()
        self.marks, self.trained = [self._mark()], 0.0
        self.began = self._now()

    def step(self) -> None:
        self.marks.append(self._mark())
        if len(self.marks) > self.count:
            self.trained = self._now()

    def epoch(self, row: Any) -> None:
        now = self._now()
        trained = self.trained or now
        # What a graph was recorded with is not allocated when it is played, but taken all the same.
        peak = torch.cuda.max_memory_reserved() - self.before if self.card else 0
        steps = [self._passed(a, b) for a, b in zip(self.marks, self.marks[1:], strict=False)]
        images = self.batch * len(steps)
        self.epochs.append(Epoch(trained - self.began, now - trained, steps, images, peak))
        self.after(self.epochs)
        self._start()

    def _now(self) -> float:
        if not self.card:
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    def _mark(self) -> Any:
        if not self.card:
            return time.process_time()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _passed(self, a: Any, b: Any) -> float:
        return a.elapsed_time(b) / 1000 if self.card else b - a


class Few(Silent):
    """Progress that ends a run after a few steps: as much as its method needs to cut."""

    def step(self) -> None:
        self.steps = getattr(self, "steps", 0) + 1
        if self.steps == 2:
            raise Enough


class Nothing(nn.Module):
    """Next to no network: two layers on the mean pixel."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.body, self.fc = nn.Linear(3, 8), nn.Linear(8, num_classes)
        self.num_classes = num_classes
        self.pretrained_cfg = {"architecture": "bench_nothing", "input_size": (3, 32, 32), "classifier": "fc"}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.body(x.mean((2, 3))))

    def get_classifier(self) -> nn.Module:
        return self.fc


@register_model
def bench_nothing(pretrained: bool = False, num_classes: int = 10, **kwargs: Any) -> nn.Module:
    return Nothing(num_classes)


class Bench:
    """One case: its images, the dense network that all are compared with, and what is measured beside it."""

    def __init__(self, case: Case, folder: Path, repeats: int, given: list[str]):
        self.case, self.repeats, self.folder = case, repeats, folder / f"{case.pixels}_{case.images}"
        make_images(self.folder, case)
        large = case.pixels > 32
        self.base = "imp_imagenet_resnet50" if large else "imp_cifar10_resnet20"
        self.overrides = [
            *(f"model.model={case.model}", "model.num_classes=1000" if large else "model.num_classes=10"),
            *("data.dataset=folder", f"data.data_dir={self.folder}", "data.dataset_download=false"),
            *("data.num_classes=10", "data.val_split=val", "data.test_split=test", f"data.img_size={case.pixels}"),
            *("data.mean=[0.5]", "data.std=[0.25]", f"training.batch_size={case.batch}", "training.lr=0.01"),
            *("pruner.rewind=0ep", f"training.epochs={repeats + 1}"),
        ]
        if torch.cuda.is_available():
            self.overrides += ["training.amp=true", "training.amp_dtype=bfloat16"]
        else:
            self.overrides += ["data.workers=0"]
        self.overrides += given
        self.recipe = recipe = tt.load_recipe(self.base, self.overrides)
        self.data, model = built(recipe, Console(quiet=True))
        self.device: Any = join_processes().device  # Accelerate decides about it
        self.data.sets(model, self.device)
        self.data.caches.fill()  # once, for all methods
        self.before, self.peak = taken(), None
        self.trainer = Trainer(recipe, model, self.data)
        least = min(prunable_names(model), key=lambda name: model.get_parameter(name).numel())
        self.subnet = tt.Subnet(model, (least,))

    def clock(self, after: Callable[[list[Epoch]], None]) -> Clock:
        return Clock(self.device.type == "cuda", self.case.batch, self.before, after)

    def dense(self) -> Epoch:
        """An epoch of the dense network."""

        def enough(_: list[Epoch]) -> None:
            raise Enough

        clock = self.clock(enough)
        with suppress(Enough):
            self.trainer.fit(tt.Training(tt.Run(self.repeats + 1), self.subnet), None, clock)
        self.subnet.release_()
        if self.peak is None:
            self.peak = clock.epochs[0].peak
        return replace(clock.epochs[0], peak=self.peak)

    def beside(self, train: Callable[[Clock], Any]) -> list[tuple[Epoch, Epoch]]:
        """Pairs of an epoch of something and of the dense network; the first, which warms up, is left out."""
        pairs: list[tuple[Epoch, Epoch]] = []

        def paired(epochs: list[Epoch]) -> None:
            pairs.append((epochs[-1], self.dense()))
            if len(pairs) > self.repeats:
                raise Enough

        with suppress(Enough):
            train(self.clock(paired))
        return pairs[1:]

    def method(self, name: str) -> list[tuple[Epoch, Epoch]]:
        """Of a method, in a run with its masks."""
        settings = [f"pruner.{one}" for one in ("sparsity=0.9", *SETTINGS.get(name, []))]
        overrides = [one for one in self.overrides if not one.startswith("pruner.")]
        recipe = tt.load_recipe(self.base, [f"pruner.name={name}", *settings, *overrides])
        model = build_model(recipe, self.data.num_classes)
        pruner, trainer = create_search(recipe, self.data, model, None), Trainer(recipe, model, self.data)

        def train(clock: Clock) -> None:
            for run in pruner:
                if run.sparsity or run.request.moves or pruner.subnet.gates:
                    trainer.fit(run, None, clock)
                with suppress(Enough):
                    trainer.fit(run, None, Few())
            trainer.fit(tt.Training(tt.Run(self.repeats + 1), pruner.subnet), None, clock)

        return self.beside(train)

    def alone(self) -> list[tuple[Epoch, Epoch]]:
        """Of loading and the trainer, with next to no network."""
        recipe = tt.load_recipe(self.base, [*self.overrides, "model.model=bench_nothing"])
        model = build_model(recipe, self.data.num_classes)
        trainer, subnet = Trainer(recipe, model, self.data), tt.Subnet(model, ("body.weight",))
        return self.beside(lambda clock: trainer.fit(tt.Training(tt.Run(self.repeats + 1), subnet), None, clock))

    def plain(self) -> list[tuple[Epoch, Epoch]]:
        """Of a plain PyTorch loop."""
        t, case, device = self.recipe.training, self.case, self.device
        torch.manual_seed(0)
        model = timm.create_model(case.model, num_classes=self.recipe.model.num_classes or 10).to(device)
        layout = memory_format(t, device)
        model = model.to(memory_format=layout)  # pyright: ignore[reportCallIssue]
        optimizer = create_optimizer_v2(model, **optimizer_kwargs(t))
        train_set, val_set = plain_images(self.folder, case)
        workers = self.recipe.data.workers
        more: Any = {"num_workers": workers, "pin_memory": device.type == "cuda", "persistent_workers": workers > 0}
        loader = DataLoader(train_set, case.batch, shuffle=True, drop_last=True, **more)
        val_loader = DataLoader(val_set, case.batch, **more)
        dtype = {"float16": torch.float16, "bfloat16": torch.bfloat16}[t.amp_dtype]
        cast = partial(torch.autocast, device.type, dtype, enabled=t.amp)

        def ready(images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            moved = images.to(device, non_blocking=True, memory_format=layout)
            return moved, labels.to(device, non_blocking=True)

        def train(clock: Clock) -> None:
            clock.begin(None, len(loader))
            while True:
                model.train()
                for batch in loader:
                    images, labels = ready(*batch)
                    with cast():
                        loss = nn.functional.cross_entropy(model(images), labels)
                    loss.backward()
                    optimizer.step()
                    optimizer.zero_grad()
                    clock.step()
                model.eval()
                right = torch.zeros((), device=device)
                with torch.no_grad(), cast():
                    for batch in val_loader:
                        images, labels = ready(*batch)
                        right += (model(images).argmax(1) == labels).sum()
                clock.epoch({"top1": right.item() / len(val_set)})

        return self.beside(train)


def taken() -> int:
    """Bytes of the card that torch has taken, none of them to spare."""
    gc.collect()
    if not torch.cuda.is_available():
        return 0
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved()


def make_images(folder: Path, case: Case) -> None:
    """Smooth noise in ten classes: what is in an image takes no time, only its size does."""
    if (folder / "done").exists():
        return
    noise = np.random.default_rng(0)
    large = case.pixels > 32
    side = case.pixels * 8 // 7 if large else case.pixels
    for split, count in (("train", case.images), ("val", case.images // 8), ("test", 20)):
        for number in range(max(count, 20)):
            place = folder / split / f"class{number % 10}"
            place.mkdir(parents=True, exist_ok=True)
            small = Image.fromarray(noise.integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8))
            small.resize((side, side), Image.Resampling.BILINEAR).save(place / f"{number}.{'jpg' if large else 'png'}")
    (folder / "done").touch()


def plain_images(folder: Path, case: Case) -> tuple[ImageFolder, ImageFolder]:
    """The same images by torchvision, augmented as the recipe says."""
    end = [transforms.ToTensor(), transforms.Normalize([0.5] * 3, [0.25] * 3)]
    flip = transforms.RandomHorizontalFlip()
    if case.pixels > 32:
        crop = transforms.RandomResizedCrop(case.pixels)
        whole = [transforms.Resize(case.pixels * 8 // 7), transforms.CenterCrop(case.pixels)]
    else:
        crop, whole = transforms.RandomCrop(case.pixels, 4), []
    train = ImageFolder(str(folder / "train"), transforms.Compose([crop, flip, *end]))
    return train, ImageFolder(str(folder / "val"), transforms.Compose([*whole, *end]))


def summed(pairs: list[tuple[Epoch, Epoch]]) -> dict[str, Any]:
    """A row: of pairs of epochs of something and of the dense network."""

    def of(which: int, value: Callable[[Epoch], float]) -> float:
        return statistics.median(value(pair[which]) for pair in pairs)

    def step(epoch: Epoch) -> float:
        return statistics.median(epoch.steps[min(2, len(epoch.steps) // 3) :])  # the first waits for its images

    def scaled(epoch: Epoch) -> float:
        return epoch.training / epoch.images * 50_000

    ratios = [step(one) / step(dense) for one, dense in pairs]
    epochs = [scaled(one) / scaled(dense) for one, dense in pairs]
    return {
        "epoch": of(0, scaled),
        "epoch_ratio": statistics.median(epochs),
        "step": of(0, step),
        "ratio": statistics.median(ratios),
        "low": min(ratios),
        "high": max(ratios),
        "between": of(0, lambda epoch: epoch.between),
        "peak": max(one.peak for one, _ in pairs),
        "dense_epoch": of(1, scaled),
        "dense_step": of(1, step),
        "dense_between": of(1, lambda epoch: epoch.between),
        "dense_peak": max(dense.peak for _, dense in pairs),
    }


def conditions(args: argparse.Namespace) -> str:
    """What a number depends on beside the code."""
    where = f"cpu, {torch.get_num_threads()} threads"
    if torch.cuda.is_available():
        where = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    settings = " ".join(args.set) or "settings as they come"
    return (
        f"torch {torch.__version__}, timm {timm.__version__}, accelerate {accelerate.__version__}, Python "
        f"{platform.python_version()}, {where}, {settings}, {args.repeats} pairs"
    )


def table(rows: list[dict[str, Any]], where: str) -> str:
    """All rows, a table for each case."""
    lines = ["# What a search costs: epochs, steps and memory, over the dense network's", ""]
    lines += [f"`python {shlex.join(sys.argv)}`", "", f"{date.today()}, {where}", ""]
    lines += ["Made by `benchmarks/search_speed.py`, which says what the columns are.", ""]
    for case in dict.fromkeys(row["case"] for row in rows):
        mine = [row for row in rows if row["case"] == case]
        lines += [f"## {case}", ""]
        titles = ["", "s / 50,000 images", "over dense", "ms a step", "over dense", "range", "s between", "peak MB"]
        lines += [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
        good = [row for row in mine if "error" not in row]
        if good:

            def middle(key: str, good: list[dict[str, Any]] = good) -> float:
                return statistics.median(row[key] for row in good)

            lines.append(
                f"| dense | {middle('dense_epoch'):.2f} | 1 | {1000 * middle('dense_step'):.2f} | 1 | | "
                f"{middle('dense_between'):.2f} | {_megabytes(middle('dense_peak'))} |"
            )
        for row in mine:
            if "error" in row:
                lines.append(f"| {row['what']} | {row['error']} | | | | | | |")
                continue
            lines.append(
                f"| {row['what']} | {row['epoch']:.2f} | {row['epoch_ratio']:.3f} | {1000 * row['step']:.2f} | "
                f"{row['ratio']:.3f} | {row['low']:.3f}..{row['high']:.3f} | {row['between']:.2f} | "
                f"{_megabytes(row['peak'])} |"
            )
        lines.append("")
    return "\n".join(lines)


def _megabytes(count: float) -> str:
    return f"{count / 1e6:.0f}" if count else ""


def done_rows(path: Path, where: str) -> list[dict[str, Any]]:
    """Rows that an earlier call has left, under the same conditions; those with an error are tried again."""
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    other = sorted({row["where"] for row in rows} - {where})
    if other:
        sys.exit(f"error: {path} has rows of other conditions ({other[0]}); delete it, or give another --out")
    return [row for row in rows if "error" not in row]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", nargs="+", choices=list(SIZES), default=["cpu"])
    parser.add_argument("--methods", nargs="+", choices=EVERY, help="only these, and what is no method")
    parser.add_argument("--repeats", type=int, default=3, help="pairs of epochs that count")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the recipe")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "search_speed.md")
    args = parser.parse_args()
    warnings.simplefilter("ignore")  # of short searches of networks that nobody has trained
    where = conditions(args)
    kept = args.out.with_suffix(".jsonl")
    rows = done_rows(kept, where)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for case in (case for size in args.size for case in SIZES[size]):
            missing = [name for name in (PLAIN, ALONE, *case.methods) if wanted(args, name)]
            missing = [name for name in missing if (case.name, name) not in {(r["case"], r["what"]) for r in rows}]
            bench = Bench(case, Path(folder), args.repeats, args.set) if missing else None
            for name in missing:
                row = measured(bench, name) | {"case": case.name, "what": name, "where": where}
                rows.append(row)
                with kept.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                args.out.write_text(table(rows, where))
                print(f"{case.name}: {name}: {row.get('error') or '{:.3f} of the dense step'.format(row['ratio'])}")
    args.out.write_text(table(rows, where))
    print(args.out.read_text())
    if any("error" in row for row in rows):
        sys.exit("error: not all rows could be measured; the same command tries those again")


def wanted(args: argparse.Namespace, name: str) -> bool:
    return args.methods is None or name in (*args.methods, PLAIN, ALONE)


def measured(bench: Bench | None, name: str) -> dict[str, Any]:
    """The row of a method or of the plain loop; an error is a row too, so that it takes no other with it."""
    assert bench is not None
    try:
        if bench.peak is None:
            bench.dense()  # for once with nothing beside it
        bench.before = taken()
        ours = {PLAIN: bench.plain, ALONE: bench.alone}
        return summed(ours[name]() if name in ours else bench.method(name))
    except Exception as error:
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}


if __name__ == "__main__":
    main()
