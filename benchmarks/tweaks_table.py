"""The retraining tweaks on IMP tickets of digits: each alone and all together, against none; one command, resumable.

    python benchmarks/tweaks_table.py [--seeds 5] [--sparsity 0.95 0.98] [--models test_resnet test_vit] [--jobs 2]

For each model, sparsity and seed one IMP ticket (recipe `digits_imp`, 40 % a round, fewer epochs), trained once without
and once with each tweak from the same start. Printed, and written to table.md in the output folder: mean test top-1,
and the mean difference to none with its 95 % interval (paired by seed, Student's t), of top-1 and of the test loss.
"""

import argparse
import io
import multiprocessing
import platform
import statistics
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from pathlib import Path

import sklearn
import timm
import torch
from rich.console import Console
from scipy.stats import t as student

import timm_tickets as tt

TWEAKS = ("label_smoothing", "smooth_activation", "skip_injection", "rescaled_init")
# Rescaling costs two steps' time an iteration, and a whole retraining here has 120.
SETTINGS = {"rescaled_init": "{iterations: 40}"}
MODELS = {
    "test_resnet": [],
    "test_vit": ["model.model=test_vit", "training.opt=adamw", "training.lr=2e-3", "training.weight_decay=0.05"],
}
ROWS: dict[str, tuple[str, ...]] = {"none": (), **{name: (name,) for name in TWEAKS}, "all four": TWEAKS}
Cell = dict[str, tuple[float, float]]


def one_cell(model: str, sparsity: float, seed: int, epochs: int, output: Path) -> Cell:
    """(test top-1, test loss) by row of the table."""
    torch.set_num_threads(1)
    console = Console(file=io.StringIO())
    folder = output / f"{model}_{sparsity}_{seed}"
    common = [*MODELS[model], f"seed={seed}", f"training.epochs={epochs}", f"pruner.sparsity={sparsity}"]
    found = tt.search("digits_imp", [*common, "pruner.prune_rate=0.4", f"output={folder / 'search'}"], console=console)
    out: Cell = {}
    for row, tweaks in ROWS.items():
        settings = [f"retrain.tweaks.{name}={SETTINGS.get(name, '{}')}" for name in tweaks]
        where = f"output={folder / row.replace(' ', '_')}"
        ticket = found.folder / "digits_imp.ticket"
        rows = tt.train("digits_imp", ticket, [*common, *settings, where], console=console).rows
        out[row] = rows[0]["metrics"]["test_top1"], rows[0]["metrics"]["test_loss"]
    print(
        f"{model}, {sparsity}, seed {seed}: { ({row: round(top1, 2) for row, (top1, _) in out.items()}) }", flush=True
    )
    return out


def difference(values: list[float], none: list[float], digits: int) -> str:
    """Mean of the paired differences and half their 95 % interval."""
    pairs = [one - other for one, other in zip(values, none, strict=True)]
    if len(pairs) < 2 or not any(pairs):
        return f"{statistics.mean(pairs):+.{digits}f}"
    half = student.ppf(0.975, len(pairs) - 1) * statistics.stdev(pairs) / len(pairs) ** 0.5
    return f"{statistics.mean(pairs):+.{digits}f} ± {half:.{digits}f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.95, 0.98])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("output/tweaks_table"))
    args = parser.parse_args()
    # Spawned, not forked: a forked process inherits torch's threads in no usable state.
    with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as pool:
        waiting = {
            (model, sparsity, seed): pool.submit(one_cell, model, sparsity, seed, args.epochs, args.output)
            for seed in range(args.seeds)
            for model in args.models
            for sparsity in args.sparsity
        }
        cells = {key: future.result() for key, future in waiting.items()}
    versions = f"torch {torch.__version__}, timm {timm.__version__}, scikit-learn {sklearn.__version__}"
    lines = [
        f"{date.today()}, {versions}, Python {platform.python_version()}; {args.epochs} epochs a run, {args.seeds} "
        "seeds; test top-1 (360 images), and differences to none, paired by seed, with 95 % intervals",
    ]
    for model in args.models:
        for sparsity in args.sparsity:
            lines += ["", f"{model}, IMP ticket at {sparsity}", ""]
            lines += ["| tweak | top-1 | difference | difference of the loss |", "|---|---|---|---|"]
            columns = {
                row: list(zip(*(cells[model, sparsity, s][row] for s in range(args.seeds)), strict=True))
                for row in ROWS
            }
            for row, (top1, loss) in columns.items():
                apart = [
                    difference(list(v), list(n), d)
                    for v, n, d in zip((top1, loss), columns["none"], (2, 4), strict=True)
                ]
                apart = ["", ""] if row == "none" else apart
                lines.append(f"| {row} | {statistics.mean(top1):.2f} | {apart[0]} | {apart[1]} |")
    text = "\n".join(lines) + "\n"
    (args.output / "table.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
