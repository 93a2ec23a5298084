"""Processes: which one this is among several, working alone for a while, waiting for the others, and their death."""

import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, parse_flag_from_env

from .settings import TrainingError
from .stop import Stopped, stop_asked

# A collective waits so long for a process that is silent without having closed its connections, as after a power cut.
PATIENCE = timedelta(minutes=15)
_LOST = re.compile(
    r"connection (was )?(closed|reset|refused)|broken pipe|timed? ?out|nccl|gloo.*(closed|reset)|socket", re.IGNORECASE
)
_alone = False
_waiting: Any = None


def join_processes() -> PartialState:
    """Join the other processes that the same command has started, if any: Accelerate's state of them.

    Whoever asks Accelerate first decides. Asked without `cpu`, on a machine without accelerators, it joins the others
    and says all the same that there is one process, so that each would train by itself on everything.
    """
    asked = parse_flag_from_env("ACCELERATE_USE_CPU")
    return PartialState(cpu=asked or not torch.accelerator.is_available(), timeout=PATIENCE)


def rank() -> int:
    """Number of this process among those that work together; 0 while it works alone."""
    return 0 if _alone else place()[0]


def world_size() -> int:
    """How many processes work together; 1 while this one works alone."""
    return 1 if _alone else place()[1]


def place() -> tuple[int, int]:
    """Number of this process, and how many there are, whether or not it now works alone."""
    if not torch.distributed.is_initialized():
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


@contextmanager
def alone(really: bool = True) -> Iterator[None]:
    """Work as if there were no other process: nothing is split, gathered or waited for, and this one writes.

    An Accelerator that is created in such a block is to be used in such blocks only.

    Args:
        really: False to change nothing.
    """
    global _alone
    if not really or world_size() == 1:
        yield
        return
    join_processes()  # or the first to want it would make it in the block, of one process
    # Accelerate has no public way to this; its two states are dicts that all their instances share.
    states: tuple[dict[str, Any], ...] = (PartialState._shared_state, AcceleratorState._shared_state)
    changed = {"distributed_type": DistributedType.NO, "num_processes": 1, "process_index": 0}
    before = [{key: state.get(key, states[0][key]) for key in changed} for state in states]
    _alone = True
    try:
        for state in states:
            if state:
                state.update(changed)
        yield
    finally:
        _alone = False
        for state, values in zip(states, before, strict=True):
            if state:
                state.update(values)


def wait_for_others() -> None:
    """Wait until every process is here, even if it trains for days; every process has to call this equally often.

    Raises:
        RuntimeError: Another process has died.
        Stopped: SIGTERM came while waiting.
    """
    global _waiting
    if world_size() == 1:
        return
    if _waiting is None:
        # Collectives of the training are given minutes; and a wait must not occupy the GPU.
        _waiting = torch.distributed.new_group(backend="gloo", timeout=timedelta(days=30))
    work: Any = torch.distributed.all_reduce(torch.zeros(1), group=_waiting, async_op=True)
    while not work.is_completed():
        if stop_asked():
            raise Stopped
        time.sleep(0.02)
    work.wait()


def any_of(flags: Sequence[bool]) -> list[bool]:
    """For each flag, whether any process has raised it; the same answer everywhere."""
    if world_size() == 1:
        return list(flags)
    device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
    found = torch.tensor([float(flag) for flag in flags], device=device)
    torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
    return [bool(flag) for flag in found.tolist()]


@contextmanager
def ending_with_others() -> Iterator[None]:
    """Say in words that a collective failed because another process has died.

    Raises:
        TrainingError: Instead of the collective's own error.
    """
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, TrainingError) or place()[1] == 1 or not _LOST.search(str(error)):
            raise
        number, count = place()
        raise TrainingError(
            f"process {number} of {count} has lost another one, which has died or cannot be reached, so it ends too. "
            f"Look for the first error of the others; the same command continues ({str(error).splitlines()[0]})"
        ) from error
