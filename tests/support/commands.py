"""Searches as commands of their own, on one process or several; and the command line called from a test."""

import io
import json
import os
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

from support import started

from timm_tickets.cli import app

DRIVER = Path(__file__).parent / "killed_search.py"
ENV = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
COLT = [
    "pruner.name=colt",
    "pruner.prune_rate=0.6",
    "pruner.sparsity=0.8",
    "data.val_fraction=0.7",
    "controls=[]",
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


def searched(folder, overrides, processes, check=True, moment=0, **more):
    """A search that is carried through; one that is killed at a moment is torchrun's own, which reports that."""
    line = command(folder, overrides, processes, moment, **more)
    if moment:
        done = subprocess.run(line, env=ENV, capture_output=True, text=True, timeout=280)
    else:
        done = started.run_together(line[-2:], processes, env=ENV)
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


@dataclass(frozen=True)
class Said:
    """What a command ended with; `output` is all that it said."""

    exit_code: int
    stdout: str
    stderr: str
    exception: Exception | None = None

    @property
    def output(self) -> str:
        return self.stdout + self.stderr


def call(*args, **env):
    """The command line, in this process. Typer's own runner tells the two streams apart only with click 8.2."""
    out, err, code, raised = io.StringIO(), io.StringIO(), 0, None
    with patch.dict(os.environ, env), redirect_stdout(out), redirect_stderr(err):
        try:
            app([str(arg) for arg in args], prog_name="timm-tickets")
        except SystemExit as end:
            code = end.code or 0
        except Exception as error:
            code, raised = 1, error
    return Said(code, out.getvalue(), err.getvalue(), raised)
