"""The papers' CIFAR recipes, each to its end, in an order of worth a minute of a card; one command, resumable.

    python benchmarks/papers.py --minutes 60 [--data-dir DIR] [--only RECIPE ...] [--set KEY=VALUE ...]
    python benchmarks/papers.py --minutes 0                              # only writes the table

What is trained goes into WORK/output (--work, this folder by default), one folder a recipe, by the very command that
the table shows. When the minutes are over it is stopped as a cluster would, with SIGTERM: a checkpoint is written, and
the same command goes on from there. DIR holds image folders, cifar10/train, cifar10/test, cifar100/train,
cifar100/test; without it the recipes download what torchvision has.

The order: first what has a figure to be compared with and takes few epochs, each recipe after the one whose weights it
needs; then what has a figure and takes many; then what only shows that it ends, the shorter first. Whatever is not in
the order comes last, so that no CIFAR recipe is left out. Finished rows are kept in papers.json beside the table, from
whichever machine they came.
"""

import argparse
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import timm
import torch

import timm_tickets as tt
from timm_tickets.experiments.controls import control_of
from timm_tickets.experiments.run_folder import RESULT
from timm_tickets.pruning.run_files import RECORD
from timm_tickets.storage.files import read_record, write_bytes, write_json

NONE = "no figure at hand"
# Test top-1 in percent, from the recipes' own `source`; the words where a paper's figure is no single accuracy.
ORDER = {
    "dense_cifar10_resnet32x2": f"{NONE} (the jackpots below start from it)",
    "jackpot_cifar10_resnet32x2_30ep": "93.70",
    "jackpot_cifar10_resnet32x2_95_30ep": "92.90",
    "continuous_sparsification_cifar10_resnet20": "91.5 to 92.0 at '20-30 % sparsity', dense 90 to 91 (release)",
    "dense_cifar10_vgg19": f"{NONE} (the jackpots below start from it)",
    "jackpot_cifar10_vgg19_30ep": "93.88",
    "jackpot_cifar10_vgg19_95_30ep": "93.49",
    "dense_cifar100_resnet32x2": f"{NONE} (the jackpots below start from it)",
    "jackpot_cifar100_resnet32x2_30ep": "72.22",
    "jackpot_cifar10_resnet32x2": "94.39",
    "jackpot_cifar10_resnet32x2_95": "93.41",
    "jackpot_cifar10_vgg19": "93.94",
    "jackpot_cifar10_vgg19_95": "93.74",
    "jackpot_cifar100_resnet32x2": "73.43",
    "imp_cifar100_resnet18": f"{NONE} (the control of the next)",
    "tweaks_cifar100_resnet18": "1.05 to 4.93 points more than imp_cifar100_resnet18",
    "edge_popup_cifar10_conv6": NONE,
    "frozen_slt_cifar10_conv6": NONE,
    "frozen_slt_cifar10_resnet18": f"{NONE}; 0.419 MB at inference",
    "continuous_sparsification_cifar10_vgg16": NONE,
    "colt_cifar10_resnet18_3_partitions": NONE,
    "colt_cifar10_resnet18": NONE,
    "imp_cifar10_resnet20": NONE,
    "colt_cifar100_resnet18_3_partitions": NONE,
    "colt_cifar100_resnet18": NONE,
}


@dataclass(frozen=True)
class Row:
    """A recipe, and what is changed in it for this table; `data` is where the images lie, which changes nothing."""

    recipe: str
    settings: tuple[str, ...]
    data: tuple[str, ...]

    @property
    def words(self) -> list[str]:
        """The command's own, without where the images lie."""
        # What others start from is a dense training; a search would prune it by magnitude.
        kind = "train" if self.recipe.startswith("dense_") else "search"
        return [kind, self.recipe, *(word for one in self.settings for word in ("--set", one))]

    def folder(self, work: Path) -> Path:
        name = tt.load_recipe(self.recipe, self.settings).folder
        return work / (f"{name}_train_dense" if self.words[0] == "train" else name)


def rows_of(settings: list[str], only: list[str] | None, data_dir: Path | None) -> list[Row]:
    """All CIFAR recipes, in their order; with these settings all those, or only some."""
    names = [*ORDER, *(name for name in tt.list_recipes() if "cifar" in name and name not in ORDER)]
    rows = []
    for name in names:
        data: tuple[str, ...] = ()
        if data_dir is not None:
            place = data_dir.absolute() / tt.load_recipe(name).data.dataset.removeprefix("torch/")
            data = ("data.dataset=folder", f"data.data_dir={place}", "data.dataset_download=false")
        rows.append(Row(name, tuple(settings) if only is None or name in only else (), data))
    return rows


def run(row: Row, work: Path, processes: int, deadline: float) -> str:
    """Search or train until it ends or the time is over; what is to be said of it."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *(launch if processes > 1 else []), "-m", "timm_tickets", *row.words]
    for one in row.data:
        command += ["--set", one]
    here = str(Path(__file__).parents[1])
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))}
    work.mkdir(parents=True, exist_ok=True)
    with (work / f"{row.recipe}.log").open("ab") as log:
        process = subprocess.Popen(command, cwd=work, stdout=log, stderr=subprocess.STDOUT, env=env)
        try:
            code = process.wait(max(1.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            return "stopped when the minutes were over"
        finally:  # also where this script itself is asked to stop
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(60)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
    return "done" if code == 0 else f"ended with exit code {code}: see {log.name}"


def found(row: Row, work: Path) -> dict[str, Any] | None:
    """What a finished recipe has left; None where it is not finished."""
    try:
        stored = read_record(row.folder(work) / RESULT)
    except (OSError, ValueError):  # damaged: the search itself says so, and mends it
        stored = None
    if stored is None:
        return None
    recipe, rows = tt.load_recipe(row.recipe, row.settings), stored[0]["rows"]
    dense, _ = control_of(rows, recipe.ticket_epochs, True)
    return {
        "sparsity": rows[-1]["sparsity"],
        "reached": rows[-1]["metrics"]["test_top1"],
        "dense": None if dense is None or row.words[0] == "train" else dense["metrics"]["test_top1"],
        "trainings": len(rows),
        "seconds": sum(one["metrics"]["seconds"] for one in rows),
        "seed": recipe.seed,
        "words": row.words,
        "date": str(date.today()),
        "where": where(),
    }


def where() -> str:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu, {torch.get_num_threads()} threads"
    return f"{device}, torch {torch.__version__}, timm {timm.__version__}, Python {platform.python_version()}"


def table(rows: list[Row], done: dict[str, Any], work: Path) -> str:
    """Every recipe, those that have not been run too."""
    lines = [
        "# The papers' recipes on CIFAR: reached, and what the papers report",
        "",
        "`python benchmarks/papers.py --minutes M` runs them in this order and writes this table again.",
        "",
        "Top-1 of the test split in percent, after the last epoch, of one seed; minutes are of all trainings together,",
        f"validation included. '{NONE.capitalize()}' says nothing of the paper, only that the recipe states none.",
        "",
    ]
    titles = ("recipe", "sparsity", "reached", "dense", "paper", "seed", "minutes", "trainings", "command; when, where")
    lines += [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for row in rows:
        one, paper = done.get(row.recipe), ORDER.get(row.recipe, NONE)
        if one is None:
            begun = len([*row.folder(work).glob(f"*/{RECORD}")])
            state = f"not finished: {begun} trainings so far" if begun else "not run"
            command = shlex.join(["timm-tickets", *row.words])
            lines.append(f"| {row.recipe} | | {state} | | {paper} | | | | `{command}` |")
            continue
        dense = "" if one["dense"] is None else f"{one['dense']:.2f}"
        command = shlex.join(["timm-tickets", *one["words"]])
        lines.append(
            f"| {row.recipe} | {one['sparsity']:.4f} | {one['reached']:.2f} | {dense} | {paper} | {one['seed']} | "
            f"{one['seconds'] / 60:.1f} | {one['trainings']} | `{command}`; {one['date']}, {one['where']} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, required=True, help="stop after so many; 0 only writes the table")
    parser.add_argument("--data-dir", type=Path, help="folder with cifar10 and cifar100 as image folders")
    parser.add_argument("--only", nargs="+", metavar="RECIPE", help="only these")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of those recipes")
    parser.add_argument("--processes", type=int, default=1, help="that torchrun starts for each")
    parser.add_argument("--work", type=Path, default=Path(), help="where the folder `output` is")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results", help="where the table goes")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    deadline = time.monotonic() + 60 * args.minutes
    rows, kept = rows_of(args.set, args.only, args.data_dir), args.results / "papers.json"
    if unknown := {*(args.only or ())} - {row.recipe for row in rows}:
        parser.error(f"--only: {', '.join(sorted(unknown))} is none of {', '.join(row.recipe for row in rows)}")
    done: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {}
    args.results.mkdir(parents=True, exist_ok=True)
    chosen = [row for row in rows if args.only is None or row.recipe in args.only]
    failed = []
    try:
        for row in chosen:
            if row.recipe in done:
                if done[row.recipe]["words"] != row.words:
                    print(f"{row.recipe}: is done, as `{shlex.join(done[row.recipe]['words'])}`: delete it from {kept}")
                continue
            if time.monotonic() >= deadline:
                continue
            said = "done" if found(row, args.work) else run(row, args.work, args.processes, deadline)
            print(f"{row.recipe}: {said}", flush=True)
            if (one := found(row, args.work)) is not None:
                done[row.recipe] = one
                write_json(kept, done)
            elif "exit code" in said:
                failed.append(row.recipe)
    finally:
        write_bytes(args.results / "papers.md", table(rows, done, args.work).encode())
    print(f"{args.results / 'papers.md'} is written")
    if failed:
        sys.exit(f"error: {', '.join(failed)} failed; the others went on")
    if args.minutes and any(row.recipe not in done for row in chosen):
        print("not all are finished; the same command continues")
        sys.exit(3)


if __name__ == "__main__":
    main()
