"""Programs that tests start, in processes forked from one that has imported torch and timm already.

Importing them takes five seconds of the processor, and torchrun has every process do it, itself too. The processes here
are new ones all the same: nothing of the test's own is in them, and no seed or thread of another program.
"""

import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants

_forks: Any = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(["timm_tickets.experiments.search", "sklearn.model_selection"])


@dataclass(frozen=True)
class Done:
    """A program that has ended, of one process or several.

    Attributes:
        returncode: As of `subprocess`; of several the first that is not 0.
        outs: What each wrote.
        errs: What each wrote to the other stream.
    """

    returncode: int
    outs: list[str]
    errs: list[str]

    @property
    def stdout(self) -> str:
        return "".join(self.outs)

    @property
    def stderr(self) -> str:
        return "".join(self.errs)


class Program:
    """A program that runs, of one process or several.

    Attributes:
        processes: To be looked at, stopped and killed one by one.
    """

    def __init__(self, words: list[str], places: list[dict[str, str]], cwd: str):
        self.processes, self._folder = [], tempfile.TemporaryDirectory()
        self._said = [[Path(self._folder.name, f"{name}_{n}") for n in range(len(places))] for name in ("out", "err")]
        for number, env in enumerate(places):
            streams = [str(one[number]) for one in self._said]
            self.processes.append(_forks.Process(target=_become, args=(words, env, cwd, streams)))
            self.processes[-1].start()

    def ended(self, timeout: float = 280) -> Done:
        """Wait for it; where one process fails the others are ended."""
        with self._folder:
            code = _ended(self.processes, time.monotonic() + timeout)
            return Done(code, *([path.read_text() for path in one] for one in self._said))


def run(*line: Any, **more: Any) -> Done:
    """As ``python LINE``: a script, ``-c`` or ``-m`` and its arguments; for ``env`` and ``cwd`` see `start`."""
    return run_together(line, 1, **more)


def run_together(line: Sequence[Any], count: int, timeout: float = 280, **more: Any) -> Done:
    """As ``torchrun --standalone --nproc_per_node COUNT LINE``."""
    return start(line, count, **more).ended(timeout)


def start(line: Sequence[Any], count: int = 1, env: Mapping[str, str] = os.environ, cwd: Any = None) -> Program:
    """The same, without waiting for its end."""
    shared = dict(env)
    if count > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        shared |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    places = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} if count > 1 else {} for rank in range(count)]
    return Program([*map(str, line)], [shared | place for place in places], str(cwd or os.getcwd()))


def _ended(processes: list[Any], deadline: float) -> int:
    """Wait for all; the first status that is not 0, else 0."""
    first = 0
    while any(process.exitcode is None for process in processes):
        for process in processes:
            process.join(0.02)
        failed = [process.exitcode for process in processes if process.exitcode]
        if failed and not first:
            first = failed[0]
            for process in processes:
                process.terminate()
        if time.monotonic() > deadline:
            for process in processes:
                process.kill()
            raise TimeoutError("a program of the tests has not ended")
    return first or next((process.exitcode for process in processes if process.exitcode), 0)


def _become(words: list[str], env: dict[str, str], cwd: str, streams: list[str]) -> None:
    """Be that program: its environment, folder, streams and arguments."""
    for number, path in enumerate(streams, start=1):
        opened = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
        os.dup2(opened, number)
        os.close(opened)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    torch.set_num_threads(int(env.get("OMP_NUM_THREADS", 1)))
    constants.HF_HUB_OFFLINE = env.get("HF_HUB_OFFLINE") == "1"  # read when it was imported
    first, *rest = words
    if first == "-c":
        sys.argv, sys.path = ["-c", *rest[1:]], ["", *sys.path]
        exec(rest[0], {"__name__": "__main__"})
    elif first == "-m":
        sys.argv, sys.path = rest, ["", *sys.path]
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path = words, [str(Path(first).parent), *sys.path]
        runpy.run_path(first, run_name="__main__")
