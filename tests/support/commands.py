"""Searches as commands of their own, on one process or several; and the command line called from a test."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from typer.testing import CliRunner

from timm_tickets.cli import app

DRIVER = Path(__file__).parent / "killed_search.py"
ENV = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
COLT = [
    "pruner.name=colt",
    "pruner.prune_rate=0.6",
    "pruner.sparsity=0.8",
    "data.val_fraction=0.7",
    "dense=false",
    "training.epochs=2",
    "training.checkpoint_interval=0",
]
IMP = ["pruner.prune_rate=0.6", "pruner.sparsity=0.6", *COLT[3:]]


def command(folder, overrides, processes, moment=0, number=signal.SIGKILL, of=None, recipe="digits_imp", **more):
    order = {
        "recipe": recipe,
        "overrides": [*overrides, f"output={folder}"],
        "lives": [moment],
        "signal": int(number),
        "rank": of,
        **more,
    }
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return [sys.executable, *(launch if processes > 1 else []), str(DRIVER), json.dumps(order)]


def searched(*args, check=True, **kwargs):
    done = subprocess.run(command(*args, **kwargs), env=ENV, capture_output=True, text=True, timeout=280)
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done


def running(folder):
    """Processes whose command names this folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes()
        except OSError:
            continue
        if str(folder).encode() in words and int(path.parent.name) != os.getpid():
            found.append(int(path.parent.name))
    return found


def call(*args):
    """The command line, in this process."""
    return CliRunner().invoke(app, [str(arg) for arg in args])
