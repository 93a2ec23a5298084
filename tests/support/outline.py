"""The scripts of tests/scripts, with our lines and without, and what a run of the outline of train.py leaves."""

import argparse
import csv
import sys
from pathlib import Path

import pictures
import timm
import torch

import timm_tickets as tt

SCRIPTS = {path.stem: path.read_text() for path in sorted((Path(__file__).parents[1] / "scripts").glob("*.py"))}
TRAIN = SCRIPTS["train"]


def indent(line):
    return len(line) - len(line.lstrip())


def unmodified(script):
    """The script as it was before our lines."""
    out, inside = [], None
    for line in script.splitlines():
        if inside is not None and line.strip() and indent(line) <= inside:
            inside = None
        if line.endswith("# +"):
            if line.lstrip().startswith("for run in "):
                inside = indent(line)
            continue
        if "  # was: " in line:
            line = " " * indent(line) + line.split("  # was: ")[1]
        out.append(line[4:] if inside is not None else line)
    return "\n".join(out)


def run_script(code, monkeypatch, folder, *args):
    folder.mkdir(exist_ok=True)
    if "--data-dir" in code and not (folder / "data").exists():
        pictures.make(folder / "data", {"train": 8, "val": 4}, "abcd")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["script.py", *args])
    names = {"__name__": "__main__"}
    exec(code, names)
    return names


def rows(folder):
    with open(folder / "output" / "summary.csv") as file:
        return list(csv.DictReader(file))


def checkpoint_of(folder):
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(folder / "output" / "last.pth.tar", weights_only=True)


def save_ticket(folder, name="model.ticket", sparsity=0.7):
    folder.mkdir(exist_ok=True)
    torch.manual_seed(5)
    tt.create_pruner("random", timm.create_model("test_resnet", num_classes=10), sparsity=sparsity).ticket.save(
        folder / name
    )
