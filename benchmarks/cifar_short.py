"""Short forms of the papers' CIFAR-10 recipes, end to end, each beside its control; one command, resumable.

    python benchmarks/cifar_short.py --data-dir DIR [--epochs 1] [--jobs 2] [--output output/cifar_short]

DIR holds CIFAR-10 as an image folder, ``train`` and ``test``. Everything but what is in `SHORTER` is the recipes' own.
Printed, and written to table.md in the output folder: sparsity, test top-1, optimizer steps of all its trainings.
These are demonstrations that the recipes work: networks trained for so short say nothing of the papers' claims.
"""

import argparse
import io
import multiprocessing
import platform
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from pathlib import Path
from typing import Any

import timm
import torch
from rich.console import Console

import timm_tickets as tt
from timm_tickets.data.datasets import Data
from timm_tickets.pruning.run import Run
from timm_tickets.pruning.training import Training
from timm_tickets.sparse.subnet import Subnet
from timm_tickets.training.build import build_model
from timm_tickets.training.trainer import Trainer

SHORTER = {
    "colt": (
        "colt_cifar10_resnet18",
        ["model.model=cifar_resnet20", "pruner.sparsity=0.45", "training.batch_size=128", "training.warmup_epochs=0"],
    ),
    "continuous_sparsification": (
        "continuous_sparsification_cifar10_resnet20",
        ["pruner.rounds=2", "pruner.rewind=100it", "pruner.meet=top", "pruner.sparsity=0.6"],
    ),
    "edge_popup": ("edge_popup_cifar10_conv6", []),
    "frozen_slt": ("frozen_slt_cifar10_conv6", []),
    "grasp": ("imp_cifar10_resnet20", ["pruner.name=grasp", "pruner.sparsity=0.9"]),
    "jackpot": ("jackpot_cifar10_resnet32x2", ["model.model=cifar_resnet20", "training.batch_size=128"]),
}
DENSE = "dense_cifar10_resnet32x2"
Row = tuple[str, float, float, int]


def one_method(name: str, data: Path, epochs: int, output: Path) -> list[Row]:
    """(what, sparsity, test top-1, steps) of a method and its controls."""
    torch.set_num_threads(1)
    console = Console(file=io.StringIO())
    recipe, shorter = SHORTER[name]
    common = ["data.dataset=folder", f"data.data_dir={data}", "data.workers=0", f"training.epochs={epochs}"]
    common += ["training.sched=cosine"]
    folder = output / name
    out: list[Row] = []

    def told(what: str, rows: list[dict[str, Any]]) -> None:
        row = rows[-1]
        out.append((what, row["sparsity"], row["metrics"]["test_top1"], sum(one["steps"] for one in rows)))
        print(name, out[-1], flush=True)

    more: list[str] = []
    if name == "jackpot":
        given = [*common, *shorter, f"output={folder / 'dense'}"]
        told("dense", tt.train(DENSE, None, given, console=console).rows)
        more = [f"model.initial_checkpoint={folder / 'dense' / 'round_00' / 'model.safetensors'}"]
    settings = [*common, *shorter, *more]
    found = tt.search(recipe, [*settings, "controls=[]", f"output={folder / 'search'}"], console=console)
    told(name, found.rows)
    if name == "jackpot":  # where its search begins, with its new statistics: scores that do not move
        given = ["training.lr=1.0e-12", f"output={folder / 'magnitude'}", "controls=[]"]
        told("magnitude's mask, nothing learned", tt.search(recipe, [*settings, *given], console=console).rows)
        return out
    if name == "colt":
        control = ["pruner.name=imp", "pruner.prune_rate=0.2775", f"output={folder / 'imp'}", "controls=[]"]
        told("imp at two partitions' rate", tt.search(recipe, [*settings, *control], console=console).rows)
    masks = tt.shuffled_masks(found.ticket.masks, 0)
    ticket = tt.Ticket(masks, found.ticket.values, found.ticket.metadata)
    if name in ("edge_popup", "frozen_slt"):
        # Never trained: the same random weights under another mask, given new statistics only.
        told("random mask, its layer counts", _scored(recipe, settings, ticket))
        return out
    (folder / "random").mkdir(parents=True, exist_ok=True)
    ticket.save(folder / "random" / "control.ticket")
    given = [*settings, f"output={folder / 'random' / 'training'}"]
    told(
        "random mask, its layer counts",
        tt.train(recipe, folder / "random" / "control.ticket", given, console=console).rows,
    )
    return out


def _scored(recipe: str, settings: list[str], ticket: tt.Ticket) -> list[dict[str, Any]]:
    """A row for a ticket that is not trained."""
    loaded = tt.load_recipe(recipe, settings)
    data = Data(loaded.data)
    model = ticket.apply_(build_model(loaded, data.num_classes))
    metrics = Trainer(loaded, model, data).score(Training(Run(), Subnet(model, tuple(ticket.masks))))
    return [{"sparsity": ticket.sparsity, "metrics": metrics, "steps": 0}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--methods", nargs="+", default=list(SHORTER), choices=list(SHORTER))
    parser.add_argument("--output", type=Path, default=Path("output/cifar_short"))
    args = parser.parse_args()
    # Spawned, not forked: a forked process inherits torch's threads in no usable state.
    with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as pool:
        waiting = {
            name: pool.submit(one_method, name, args.data_dir, args.epochs, args.output) for name in args.methods
        }
        found = {name: future.result() for name, future in waiting.items()}
    lines = [
        f"{date.today()}, torch {torch.__version__}, timm {timm.__version__}, Python {platform.python_version()}; "
        f"CIFAR-10, {args.epochs} epochs a run, seed {tt.load_recipe(DENSE).seed}",
        "",
        "| recipe | what | sparsity | test top-1 | steps |",
        "|---|---|---|---|---|",
    ]
    for name, rows in found.items():
        for what, sparsity, top1, steps in rows:
            lines.append(f"| {SHORTER[name][0]} | {what} | {sparsity:.4f} | {top1:.2f} | {steps} |")
    text = "\n".join(lines) + "\n"
    (args.output / "table.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
