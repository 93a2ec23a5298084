"""Tickets found on one task and trained on another, both ways, with their controls; one command, resumable.

    python benchmarks/transfer_table.py [--tasks digits|cifar10] [--seeds 3] [--sparsity 0.95] [--jobs 2]
                                        [--prune-rate 0.5] [--data-dir DIR] [--output output/transfer_table]

``digits``: scikit-learn's digits 0 to 4 and 5 to 9, recipe `digits_imp`. ``cifar10``: the classes 0 to 4 and 5 to 9 of
an image folder of CIFAR-10 (``--data-dir`` holds ``train`` and ``test``), recipe `digits_imp` with its data exchanged.
Printed, and written to table.md in the output folder: mean and standard deviation of test top-1 on the target.
"""

import argparse
import io
import multiprocessing
import platform
import statistics
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from pathlib import Path

import timm
import torch
from rich.console import Console

import timm_tickets as tt

RECIPE = "digits_imp"
HALVES = {"0-4": "data.classes=[0,1,2,3,4]", "5-9": "data.classes=[5,6,7,8,9]"}
ROWS = ("dense", "native", "ticket", "random")
WORDS = {
    "dense": "dense on the target",
    "native": "ticket found on the target",
    "ticket": "ticket found on the other",
    "random": "random mask, its layer counts",
}


def one_cell(source: str, target: str, seed: int, common: list[str], output: Path) -> dict[str, float]:
    """Test top-1 on the target by row of the table."""
    torch.set_num_threads(1)
    console = Console(file=io.StringIO())
    folder = output / f"{source}_to_{target}_{seed}"
    common = [*common, f"seed={seed}"]
    found = tt.search(RECIPE, [*common, HALVES[source], f"output={folder / 'source'}"], console=console)
    settings = [*common, HALVES[target], f"output={folder / 'target'}"]
    result = tt.transfer(RECIPE, found.folder / f"{RECIPE}.ticket", settings, console=console)
    out = {row["name"]: row["metrics"]["test_top1"] for row in result.rows}
    print(f"{source} to {target}, seed {seed}: { ({row: round(value, 2) for row, value in out.items()}) }", flush=True)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", choices=("digits", "cifar10"), default="digits")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sparsity", type=float, default=0.95)
    parser.add_argument("--prune-rate", type=float, default=0.5)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("output/transfer_table"))
    args = parser.parse_args()
    common = [f"training.epochs={args.epochs}", f"pruner.sparsity={args.sparsity}"]
    common += [f"pruner.prune_rate={args.prune_rate}"]
    if args.tasks == "cifar10":
        data = ["dataset=folder", f"data_dir={args.data_dir}", "mean=[0.4914,0.4822,0.4465]", "std=[0.247,0.243,0.262]"]
        common += [*(f"data.{one}" for one in (*data, "hflip=0.5")), "training.batch_size=256", "training.lr=0.1"]
    output = args.output / args.tasks
    # Spawned, not forked: a forked process inherits torch's threads in no usable state.
    with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as pool:
        waiting = {
            (source, seed): pool.submit(one_cell, source, target, seed, common, output)
            for seed in range(args.seeds)
            for source, target in (tuple(HALVES), tuple(HALVES)[::-1])
        }
        cells = {key: future.result() for key, future in waiting.items()}
    versions = f"torch {torch.__version__}, timm {timm.__version__}, Python {platform.python_version()}"
    lines = [
        f"{date.today()}, {versions}; {args.tasks}, test_resnet, sparsity {args.sparsity} by IMP, {args.prune_rate} a "
        f"round, {args.epochs} epochs a run, {args.seeds} seeds, test top-1 on the target",
        "",
        "| | " + " | ".join(f"{a} to {b}" for a, b in (tuple(HALVES), tuple(HALVES)[::-1])) + " |",
        "|---|---|---|",
    ]
    for row in ROWS:
        line = f"| {WORDS[row]} |"
        for source in HALVES:
            values = [cells[source, seed][row] for seed in range(args.seeds)]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            line += f" {statistics.mean(values):.2f} ± {spread:.2f} |"
        lines.append(line)
    text = "\n".join(lines) + "\n"
    (output / "table.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
