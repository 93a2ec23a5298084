"""Whole channels pruned by this package and by torch-pruning, on scikit-learn's digits, the same training for all.

    OMP_NUM_THREADS=1 python benchmarks/structured.py [--records output/structured.jsonl] [--rows "imp*" ...]
                                                      [--sparsity 0.5 0.7 0.9] [--seeds 3] [--epochs 20]

Model, data, augmentation, optimizer and schedule are those of the recipe `digits_imp_channels`. Every row trains for as
many epochs in total, shared out evenly over its trainings: a training is one schedule, from the warmup to zero. What a
row is left with is counted by torch's FlopCounterMode. torch-pruning is used through its public interface alone. A line
a cell goes to the records, and a second call goes on where the first stopped. Printed: Markdown, as kept in
results/structured.md.
"""

import argparse
import copy
import json
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date
from fnmatch import fnmatchcase
from importlib.metadata import version
from pathlib import Path
from typing import Any

import scipy
import timm
import torch
import torch_pruning as tp
from accelerate.utils import set_seed
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler_factory import scheduler_kwargs
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

import timm_tickets as tt
from timm_tickets.core.seeds import seed_from
from timm_tickets.data.datasets import Data
from timm_tickets.training.build import build_model

RECIPE, IMAGES = "digits_imp_channels", torch.zeros(1, 3, 32, 32)
UNITS = ("macs", "weights")
STEPS = 3  # cuts of the iterative rows
MACS = {"granularity": "channel", "sparsity_of": "macs"}


@dataclass
class Cell:
    """One network that is trained and pruned, and what it has had so far.

    Attributes:
        seed: Of its start, and of the order and augmentation of its images.
        sparsity: Fraction of the multiplications that is to go.
        total: Epochs that it may be trained.
        spent: Epochs that it has been, each of all images.
        trainings: So many.
        masks: What is pruned by mask, where that is how.
    """

    seed: int
    sparsity: float
    total: int
    spent: float = 0.0
    trainings: int = 0
    masks: dict[str, Tensor] = field(default_factory=dict)
    told: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.recipe = tt.load_recipe(RECIPE, [f"seed={self.seed}"])
        data = Data(self.recipe.data)
        self.model = build_model(self.recipe, data.num_classes)
        self.images = data.count
        batch = self.recipe.training.batch_size
        self.train_loader = DataLoader(data.train_set(self.model), batch, shuffle=True, drop_last=True)
        self.test_loader = DataLoader(data.test_set(self.model), 360)

    def train(self, epochs: int, run: tt.Training | None = None, ticket: tt.Ticket | None = None) -> None:
        """Train for so many epochs, as one schedule: of a run its images, of a ticket under its masks."""
        settings, criterion = self.recipe.training, nn.CrossEntropyLoss()
        set_seed(seed_from(self.seed, self.trainings))
        layout: Any = {"memory_format": torch.channels_last}  # a third faster
        self.model.to(**layout)
        optimizer = create_optimizer_v2(self.model, **optimizer_kwargs(settings))
        if run is not None:
            run.attach(optimizer)
        if ticket is not None:
            ticket.attach(self.model, optimizer)
        loader: Any = self.train_loader if run is None else run.subset(self.train_loader)
        schedule: Any = scheduler_kwargs(settings) | {"num_epochs": epochs, "updates_per_epoch": len(loader)}
        scheduler: Any = create_scheduler_v2(optimizer, **schedule)[0]
        scheduler.step_update(0)
        self.model.train()
        for epoch in range(epochs):
            for step, (images, target) in enumerate(loader):
                output = self.model(images.contiguous(**layout))
                loss = criterion(output, target) if run is None else run.loss(criterion, output, target)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                scheduler.step_update(epoch * len(loader) + step + 1)
            scheduler.step(epoch + 1)
        self.spent += epochs * len(loader.dataset) / self.images
        self.trainings += 1

    def dense(self, epochs: int, folder: Path) -> None:
        """The dense network trained for so many epochs, once for all the rows that begin with it."""
        file = folder / f"dense_{self.seed}_{epochs}.pt"
        if not file.is_file():
            self.train(epochs)
            torch.save(self.model.state_dict(), half := file.with_suffix(".half"))
            half.replace(file)
        else:
            self.spent, self.trainings = self.spent + epochs, self.trainings + 1
        self.model.load_state_dict(torch.load(file))

    @torch.no_grad()
    def top1(self) -> float:
        self.model.eval()
        right = [(self.model(images).argmax(1) == target).float() for images, target in self.test_loader]
        return 100 * float(torch.cat(right).mean())

    def left(self) -> dict[str, Any]:
        """Multiplications of an image and weights that are left, and the layer with the smallest share of channels."""
        weights, layers = {name: p for name, p in self.model.named_parameters() if p.ndim > 1}, []
        share = {name: float(self.masks[name].float().mean()) if name in self.masks else 1.0 for name in weights}
        for name, module in self.model.named_modules():
            if isinstance(module, nn.Conv2d):
                mask = self.masks.get(f"{name}.weight", torch.ones(module.weight.shape, dtype=torch.bool))
                layers.append((int(mask.flatten(1).any(1).sum()), name))
        macs = layer_macs(self.model)
        return {
            "macs": round(sum(macs[name] * share[name] for name in weights)),
            "weights": round(sum(weights[name].numel() * share[name] for name in weights)),
            "channels": {name: count for count, name in layers},
        }


def layer_macs(model: nn.Module) -> dict[str, int]:
    """Multiplications of one image by each weight, by its name: half of the operations that torch counts."""
    model.eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(IMAGES)
    root, found = type(model).__name__, counter.get_flop_counts()
    named = {name: found.get(f"{root}.{name.rpartition('.')[0]}", {}) for name, _ in model.named_parameters()}
    macs = {name: sum(counts.values()) // 2 for name, counts in named.items() if name.endswith("weight")}
    if (total := counter.get_total_flops() // 2) != sum(macs.values()):
        raise RuntimeError(f"{total} multiplications, of which {sum(macs.values())} are by weights of layers")
    return macs


def ours(name: str, trainings: int, **settings: Any) -> Callable[[Cell, Path], None]:
    """A pruner of this package. What its search leaves of the epochs goes to the ticket's own training."""

    def row(cell: Cell, folder: Path) -> None:
        epochs, given = cell.total // trainings, MACS | settings
        if name in ("imp", "colt"):
            cuts = trainings - 1
            # A thousandth more, or a rest of one multiplication would be a round of its own.
            given["prune_rate"] = 1 - (1 - cell.sparsity) ** (1 / cuts) + 1e-3
        pruner = tt.create_pruner(name, cell.model, sparsity=cell.sparsity, epochs=epochs, **given)
        for run in pruner:
            cell.train(run.epochs, run)
        ticket = pruner.ticket
        if (rest := round(cell.total - cell.spent)) > 0 and not pruner.method.ends_trained:
            cell.train(rest, ticket=ticket)
        cell.masks = ticket.masks
        cell.told["settings"] = settings

    return row


def tuned(steps: int, **settings: Any) -> Callable[[Cell, Path], None]:
    """The pruner `magnitude` of this package as torch-pruning's is used: train, then prune and fine-tune."""

    def row(cell: Cell, folder: Path) -> None:
        epochs = cell.total // (steps + 1)
        cell.dense(epochs, folder)
        for step in range(1, steps + 1):
            goal = 1 - (1 - cell.sparsity) ** (step / steps)
            ticket = tt.create_pruner("magnitude", cell.model, sparsity=goal, **MACS, **settings).ticket
            cell.train(epochs, ticket=ticket)
            cell.masks = ticket.masks
        cell.told["settings"] = settings

    return row


def theirs(steps: int, across: bool) -> Callable[[Cell, Path], None]:
    """torch-pruning's magnitude pruner: train, then prune and fine-tune, so many times.

    Each step has a pruner of its own, with the ratio that comes nearest to the step's multiplications: the steps keep
    equal shares of what the one before has left, as `imp` does.
    """

    def row(cell: Cell, folder: Path) -> None:
        epochs = cell.total // (steps + 1)
        cell.dense(epochs, folder)
        dense = sum(layer_macs(cell.model).values())
        cell.told["ratios"] = []
        for step in range(1, steps + 1):
            target = dense * (1 - cell.sparsity) ** (step / steps)
            ratio = nearest(cell.model, target, across)
            pruned(cell.model, ratio, across)
            cell.told["ratios"].append(ratio)
            cell.train(epochs)

    return row


def pruned(model: nn.Module, ratio: float, across: bool) -> nn.Module:
    """The model with this share of its channels removed by torch-pruning, in place."""
    model.eval()
    groups: dict[str, Any] = {"in_channel_groups": {}, "out_channel_groups": {}, "num_heads": {}}
    pruner = tp.pruner.MagnitudePruner(
        model,
        IMAGES,
        importance=tp.importance.MagnitudeImportance(),
        global_pruning=across,
        pruning_ratio=ratio,
        ignored_layers=[model.get_classifier()],  # pyright: ignore[reportCallIssue]
        **groups,  # its defaults are shared between pruners
    )
    pruner.step()
    for parameter in model.parameters():
        parameter.grad = None
    return model


def nearest(model: nn.Module, target: float, across: bool) -> float:
    """The ratio, in steps of a 512th, that leaves the number of multiplications nearest to this one."""

    def left(ratio: int) -> int:
        return sum(layer_macs(pruned(copy.deepcopy(model), ratio / 512, across)).values())

    # Of a layer of which nothing would stay torch-pruning takes nothing: up to there fewer are left the larger it is.
    least = min(module.out_channels for module in model.modules() if isinstance(module, nn.Conv2d))
    low, high = 0, 512 - 512 // least
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if left(middle) <= target else (middle, high)
    return min((low, high), key=lambda ratio: abs(left(ratio) - target)) / 512


def dense(trainings: int) -> Callable[[Cell, Path], None]:
    return lambda cell, folder: cell.dense(cell.total // trainings, folder)


GLOBAL, LAST, FLOOR = {"scope": "global"}, {"classifier": True}, {"scope": "global", "min_channels": 4}
ROWS: dict[str, Callable[[Cell, Path], None]] = {
    "dense": dense(1),
    "imp": ours("imp", STEPS + 1),
    "imp, one shot": ours("imp", 2),
    "colt": ours("colt", STEPS + 1),
    "gradual": ours("gradual", 1),
    "magnitude of the start": ours("magnitude", 1),
    "torch-pruning, one shot": theirs(1, False),
    "torch-pruning, iterative": theirs(STEPS, False),
    "magnitude, tuned, one shot": tuned(1),
    "magnitude, tuned, iterative": tuned(STEPS),
    "torch-pruning, one shot, global": theirs(1, True),
    "torch-pruning, iterative, global": theirs(STEPS, True),
    "colt, one round": ours("colt", 2),
    "imp, classifier": ours("imp", STEPS + 1, **LAST),
    "imp, global": ours("imp", STEPS + 1, **GLOBAL),
    "imp, global, 4 channels": ours("imp", STEPS + 1, **FLOOR),
    "gradual, classifier": ours("gradual", 1, **LAST),
    "gradual, global": ours("gradual", 1, **GLOBAL),
    "gradual, global, 4 channels": ours("gradual", 1, **FLOOR),
    "magnitude, tuned, iterative, classifier": tuned(STEPS, **LAST),
    "magnitude, tuned, iterative, global": tuned(STEPS, **GLOBAL),
}


def record(row: str, sparsity: float, seed: int, total: int, folder: Path) -> dict[str, Any]:
    """What a row comes to, in JSON types."""
    began, cell = time.process_time(), Cell(seed, sparsity, total)
    ROWS[row](cell, folder)
    facts = {"row": row, "sparsity": sparsity, "seed": seed, "total": total, "top1": cell.top1(), **cell.left()}
    facts |= {"spent": cell.spent, "trainings": cell.trainings, "seconds": time.process_time() - began}
    return facts | cell.told


def interval(values: list[float]) -> str:
    """Mean and half the 95 % interval of Student's t."""
    if len(values) < 2:
        return f"{values[0]:.2f}"
    half = scipy.stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.mean(values):.2f} ± {half:.2f}"


def narrowest(cells: list[dict[str, Any]], whole: dict[str, int]) -> str:
    """The layer with the fewest channels over all seeds: how many it has, of how many."""
    count, of = min((count, whole[name]) for cell in cells for name, count in cell["channels"].items())
    return f"{count} of {of}"


def table(cells: dict[tuple[str, float, int], dict[str, Any]], rows: list[str], seeds: int) -> None:
    """Print accuracies, then what is left; a place is empty until all its seeds are there."""
    whole = cells["dense", 0.0, 0]
    sparsities = sorted({sparsity for row, sparsity, _ in cells if row != "dense"})

    def found(row: str, sparsity: float) -> list[dict[str, Any]]:
        keys = [(row, 0.0 if row == "dense" else sparsity, seed) for seed in range(seeds)]
        return [cells[key] for key in keys] if all(key in cells for key in keys) else []

    print("| | trainings |" + "".join(f" {one} |" for one in sparsities) + " mean of these |")
    print("|---|---|" + "---|" * (len(sparsities) + 1))
    for row in rows:
        by = [found(row, s) for s in sparsities]
        if any(by):
            seen = sorted({cell["trainings"] for one in by for cell in one})
            top1 = [[cell["top1"] for cell in one] for one in by]
            shown = [interval(one) if one else "" for one in top1]
            shown.append(interval([statistics.mean(one) for one in zip(*top1, strict=True)]) if all(by) else "")
            print(f"| {row} | {' to '.join(map(str, dict.fromkeys((seen[0], seen[-1]))))} | {' | '.join(shown)} |")
    print("\n| |" + "".join(f" MACs left at {s} | weights | narrowest |" for s in sparsities))
    print("|---|" + "---|---|---|" * len(sparsities))
    for row in rows[1:]:
        by = [found(row, s) for s in sparsities]
        if any(by):
            line = ""
            for one in by:
                left = [statistics.mean(cell[key] / whole[key] for cell in one) if one else 0 for key in UNITS]
                line += f" {left[0]:.3f} | {left[1]:.3f} | {narrowest(one, whole['channels'])} |" if one else " | | |"
            print(f"| {row} |{line}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=Path, default=Path("output/structured.jsonl"))
    parser.add_argument("--rows", nargs="+", default=["*"], help="wildcards")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.5, 0.7, 0.9])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=20, help="of all the trainings of a row together")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # torch-pruning's own, of parameters that it does not prune
    folder = args.records.parent / "structured"
    folder.mkdir(parents=True, exist_ok=True)
    lines = args.records.read_text().splitlines() if args.records.is_file() else []
    done = [one for one in map(json.loads, lines) if one["total"] == args.epochs]
    cells = {(one["row"], one["sparsity"], one["seed"]): one for one in done}
    rows = [row for row in ROWS if row == "dense" or any(fnmatchcase(row, pattern) for pattern in args.rows)]
    with args.records.open("a") as file:
        for row in rows:
            for sparsity in [0.0] if row == "dense" else args.sparsity:
                for seed in range(args.seeds):
                    if (row, sparsity, seed) in cells:
                        continue
                    cells[row, sparsity, seed] = one = record(row, sparsity, seed, args.epochs, folder)
                    file.write(json.dumps(one) + "\n")
                    file.flush()
                    print(f"{row}, {sparsity}, seed {seed}: {one['top1']:.2f}, {one['seconds']:.0f} s", file=sys.stderr)
    versions = f"torch {torch.__version__}, timm {timm.__version__}, torch-pruning {version('torch-pruning')}"
    print(f"{date.today()}, {versions}, Python {platform.python_version()}; {args.epochs} epochs a row, ", end="")
    print(f"{args.seeds} seeds, test top-1 (360 images), mean and 95 % t-interval\n")
    table(cells, rows, args.seeds)


if __name__ == "__main__":
    main()
