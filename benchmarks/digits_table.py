"""Every pruner against its controls on scikit-learn's digits, several seeds, from recipes: one command, resumable.

    python benchmarks/digits_table.py [--seeds 3] [--sparsity 0.9 0.95 0.98] [--jobs 2] [--output output/digits_table]
                                      [--rows "edge*" ...] [--model test_resnet]

Every search is the recipe `digits_imp` with another pruner and fewer epochs; `--rows` takes those that match. The
controls stand on IMP's own ticket: the same start under a random mask with the same number of weights in every layer,
and the same masks over another random start. Printed, and written to table.md in the output folder: mean and sample
standard deviation of test top-1, and what was spent, in steps of one dense training. Cells are independent, one thread
each.
"""

import argparse
import io
import multiprocessing
import platform
import statistics
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from fnmatch import fnmatchcase
from pathlib import Path

import sklearn
import timm
import torch
from rich.console import Console

import timm_tickets as tt
from timm_tickets.training.build import build_model

RECIPE = "digits_imp"
COLT_RATE = 1 - 0.85**2
PRUNERS = {
    "imp": ["pruner.name=imp"],
    "imp at COLT's rate": ["pruner.name=imp", f"pruner.prune_rate={COLT_RATE}"],
    "imp, one shot": ["pruner.name=imp", "pruner.prune_rate={s}"],
    "colt, 2 partitions": ["pruner.name=colt"],
    "continuous_sparsification": ["pruner.name=continuous_sparsification"],
    "continuous_sparsification, c left out": ["pruner.name=continuous_sparsification", "pruner.bake_scale=false"],
    "jackpot": ["pruner.name=jackpot", "model.initial_checkpoint={dense}"],
    "edge_popup": ["pruner.name=edge_popup", "pruner.scale=dynamic"],
    "edge_popup, normal scores": ["pruner.name=edge_popup", "pruner.scale=dynamic", "pruner.first_scores=normal"],
    "frozen_slt": ["pruner.name=frozen_slt", "pruner.scale=dynamic"],
    "frozen_slt, uniform scores": ["pruner.name=frozen_slt", "pruner.scale=dynamic", "pruner.first_scores=uniform"],
    "gradual": ["pruner.name=gradual"],
    "rigl": ["pruner.name=rigl"],
    "set": ["pruner.name=set"],
    "snip": ["pruner.name=snip", "pruner.batches=4"],
    "grasp": ["pruner.name=grasp"],
    "synflow": ["pruner.name=synflow", "pruner.input_size=[3,32,32]"],
    "magnitude": ["pruner.name=magnitude"],
    "random": ["pruner.name=random"],
}
CONTROLS = ("imp's layer counts, random mask", "imp's mask, other start")
Cell = dict[str, tuple[float, float]]


def one_cell(seed: int, sparsity: float, epochs: int, model: str, rows: tuple[str, ...], output: Path) -> Cell:
    """(test top-1, trainings spent) by row of the table."""
    torch.set_num_threads(1)
    console = Console(file=io.StringIO())
    out: Cell = {}
    common = [f"seed={seed}", f"training.epochs={epochs}", f"pruner.sparsity={sparsity}", "controls=[]"]
    common.append(f"model.model={model}")

    def folder(name: str) -> Path:
        return output / f"{sparsity}_{seed}" / name.replace(" ", "_").replace(",", "").replace("'", "")

    imp, dense = None, folder("imp") / "round_00" / "model.safetensors"
    for row in rows:
        if row in CONTROLS:
            continue
        pruner = PRUNERS[row]
        settings = [setting.format(s=sparsity, dense=dense) for setting in pruner]
        result = tt.search(RECIPE, [*common, *settings, f"output={folder(row)}"], console=console)
        if row == "imp":
            imp = result.ticket
            out["dense"] = result.rows[0]["metrics"]["test_top1"], 1.0
        dense_steps = max(one["steps"] for one in result.rows)
        steps = sum(one["steps"] for one in result.rows) + (dense_steps if row == "jackpot" else 0)
        out[row] = result.rows[-1]["metrics"]["test_top1"], steps / dense_steps
    if imp is None:
        return out
    same, other = (build_model(tt.load_recipe(RECIPE, [f"seed={s}"]), 10) for s in (seed, seed + 1000))
    tickets = (tt.Ticket.of(same, tt.shuffled_masks(imp.masks, seed)), tt.Ticket.of(other, imp.masks))
    for row, ticket in zip(CONTROLS, tickets, strict=True):
        folder(row).mkdir(parents=True, exist_ok=True)
        ticket.save(folder(row) / "control.ticket")
        settings = [*common, f"output={folder(row)}"]
        result = tt.train(RECIPE, folder(row) / "control.ticket", settings, console=console)
        out[row] = result.rows[-1]["metrics"]["test_top1"], out["imp"][1] + 1
    print(
        f"sparsity {sparsity}, seed {seed}: { ({row: round(value, 2) for row, (value, _) in out.items()}) }", flush=True
    )
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.9, 0.95, 0.98])
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--model", default="test_resnet")
    parser.add_argument("--rows", nargs="+", default=["*"], help="wildcards; the controls come with imp")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("output/digits_table"))
    args = parser.parse_args()
    rows = tuple(row for row in (*PRUNERS, *CONTROLS) if any(fnmatchcase(row, pattern) for pattern in args.rows))
    # Spawned, not forked: a forked process inherits torch's threads in no usable state.
    with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as pool:
        waiting = {
            (sparsity, seed): pool.submit(one_cell, seed, sparsity, args.epochs, args.model, rows, args.output)
            for seed in range(args.seeds)
            for sparsity in args.sparsity
        }
        cells = {key: future.result() for key, future in waiting.items()}
    versions = f"torch {torch.__version__}, timm {timm.__version__}, scikit-learn {sklearn.__version__}"
    setting = f"{args.model}, {args.epochs} epochs a run, {args.seeds} seeds, test top-1 (360 images)"
    lines = [
        f"{date.today()}, {versions}, Python {platform.python_version()}; {setting}",
        "",
        "| |" + "".join(f" {s} | spent |" for s in args.sparsity),
        "|---|" + "---|---|" * len(args.sparsity),
    ]
    for row in next(iter(cells.values())):
        line = f"| {row} |"
        for sparsity in args.sparsity:
            values, spent = zip(*(cells[sparsity, seed][row] for seed in range(args.seeds)), strict=True)
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            line += f" {statistics.mean(values):.2f} ± {spread:.2f} | {statistics.mean(spent):.1f} |"
        lines.append(line)
    text = "\n".join(lines) + "\n"
    (args.output / "table.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
