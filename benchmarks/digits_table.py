"""Pruners against their controls on scikit-learn's digits, several seeds, from recipes: one command, resumable.

    python benchmarks/digits_table.py [--seeds 3] [--sparsity 0.95 0.98] [--output output/digits_table]

Every search is the recipe `digits_imp` with another pruner. The two controls stand on IMP's own ticket: the same start
under a random mask with the same number of weights in every layer, and the same masks over another random start.
Writes a Markdown table (mean and sample standard deviation of test top-1) to table.md in the output folder.
"""

import argparse
import platform
import statistics
from datetime import date
from pathlib import Path

import sklearn
import timm
import torch
from rich.console import Console

import timm_tickets as tt
from timm_tickets.trainer import build_model

RECIPE = "digits_imp"
PRUNERS = {
    "imp, 20 % a round": ["pruner.name=imp"],
    "imp, one shot": ["pruner.name=imp", "pruner.prune_rate={s}"],
    "magnitude at initialisation": ["pruner.name=magnitude"],
    "random, global": ["pruner.name=random"],
}
CONTROLS = ("imp's layer counts, random mask", "imp's mask, other start")


def one_seed(seed: int, sparsity: float, output: Path, console: Console) -> tuple[dict[str, float], dict[str, int]]:
    """Test top-1 and the number of trainings spent, by row of the table."""
    accuracy: dict[str, float] = {}
    trainings: dict[str, int] = {}
    found: tt.Ticket | None = None
    common = [f"seed={seed}", f"pruner.sparsity={sparsity}", "dense=false"]
    for row, pruner in PRUNERS.items():
        folder = output / f"{row.replace(' ', '_').replace(',', '').replace('%', 'percent')}_{sparsity}_{seed}"
        settings = [setting.format(s=sparsity) for setting in pruner]
        result = tt.search(RECIPE, [*common, *settings, f"output={folder}"], console=console)
        accuracy[row] = result.rows[-1]["metrics"]["test_top1"]
        trainings[row] = len(result.rows)
        if row == "imp, 20 % a round":
            accuracy["dense"], trainings["dense"] = result.rows[0]["metrics"]["test_top1"], 1
            found = result.ticket
    assert found is not None
    same, other = (build_model(tt.load_recipe(RECIPE, [f"seed={s}"]), 10) for s in (seed, seed + 1000))
    tickets = (tt.Ticket.of(same, tt.shuffled_masks(found.masks, seed)), tt.Ticket.of(other, found.masks))
    for row, ticket in zip(CONTROLS, tickets, strict=True):
        folder = output / f"{'random_mask' if ticket is tickets[0] else 'other_start'}_{sparsity}_{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        ticket.save(folder / "control.ticket")
        result = tt.train(RECIPE, folder / "control.ticket", [*common, f"output={folder}"], console=console)
        accuracy[row] = result.rows[-1]["metrics"]["test_top1"]
        trainings[row] = trainings["imp, 20 % a round"] + 1
    return accuracy, trainings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.95, 0.98])
    parser.add_argument("--output", type=Path, default=Path("output/digits_table"))
    args = parser.parse_args()
    console = Console()
    cells: dict[str, dict[float, list[float]]] = {}
    spent: dict[str, dict[float, int]] = {}
    for sparsity in args.sparsity:
        for seed in range(args.seeds):
            accuracy, trainings = one_seed(seed, sparsity, args.output, console)
            for row, value in accuracy.items():
                cells.setdefault(row, {}).setdefault(sparsity, []).append(value)
                spent.setdefault(row, {})[sparsity] = trainings[row]
    versions = f"torch {torch.__version__}, timm {timm.__version__}, scikit-learn {sklearn.__version__}"
    lines = [
        f"{date.today()}, {versions}, Python {platform.python_version()}, {args.seeds} seeds, test top-1 (360 images)",
        "",
        "| |" + "".join(f" {s} | trainings |" for s in args.sparsity),
        "|---|" + "---|---|" * len(args.sparsity),
    ]
    for row in ("dense", *PRUNERS, *CONTROLS):
        line = f"| {row} |"
        for sparsity in args.sparsity:
            values = cells[row][sparsity]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            line += f" {statistics.mean(values):.2f} ± {spread:.2f} | {spent[row][sparsity]} |"
        lines.append(line)
    text = "\n".join(lines) + "\n"
    (args.output / "table.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
