"""Processes: which one this is among several, working apart for a while, waiting for the others, and their death."""

import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed
from accelerate import PartialState
from accelerate.utils import DistributedType, parse_flag_from_env

from ..core.errors import SettingError, TrainingError
from ..core.private import accelerate_states, set_world_
from .cards import sharing
from .sigterm import Stopped, stop_asked

T = TypeVar("T")

# A collective waits so long for a process that is silent without having closed its connections, as after a power cut.
PATIENCE = timedelta(minutes=15)
_LOST = re.compile(
    r"connection (was )?(closed|reset|refused)|broken pipe|timed? ?out|nccl|gloo.*(closed|reset)|socket", re.IGNORECASE
)
# While this process works apart: its number among those it works with and how many they are; and the same of all.
_near: tuple[int, int] | None = None
_all: tuple[int, int] | None = None
_formed: dict[tuple[Any, int], Any] = {}  # this process's group, by the group it was made within and its size
_waiting: dict[Any, Any] = {}  # the group that waits, by the group it waits for


def join_processes() -> PartialState:
    """Join the other processes that the same command has started, if any: Accelerate's state of them.

    Whoever asks Accelerate first decides. Asked without `cpu`, on a machine without accelerators, it joins the others
    and says all the same that there is one process, so that each would train by itself on everything.
    """
    asked = parse_flag_from_env("ACCELERATE_USE_CPU")
    backend = {} if sharing() is None else {"backend": "gloo"}
    return PartialState(cpu=asked or not torch.accelerator.is_available(), timeout=PATIENCE, **backend)


def rank() -> int:
    """Number of this process among those that it now works together with."""
    return (_near or place())[0]


def world_size() -> int:
    """How many processes now work together, this one among them."""
    return (_near or place())[1]


def place() -> tuple[int, int]:
    """Number of this process, and how many there are, whether or not it now works apart."""
    if _all is not None:
        return _all
    if not torch.distributed.is_initialized():
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def groups_of(size: int) -> tuple[int, int]:
    """Number of this process's group, and how many there are, where the processes are divided into groups of so many.

    While this process works apart, its group is the only one. Every process has to call this, in the same order as
    whatever else they do together: the first call connects those of a group.

    Args:
        size: Processes of one group; no matter for a single process, which is a group.

    Raises:
        SettingError: The processes cannot be divided so.
    """
    number, count = place()
    if size < 1:
        raise SettingError(f"processes_per_run: {size} is not valid; it is how many processes train a run, at least 1")
    if _near is not None or count == 1:
        return 0, 1
    if count % size:
        valid = ", ".join(str(one) for one in range(1, count + 1) if count % one == 0)
        raise SettingError(
            f"processes_per_run: {size} does not divide the {count} processes into groups; set it to one of {valid}, "
            f"or start a multiple of {size} processes"
        )
    if 1 < size < count and (whole := (torch.distributed.group.WORLD, size)) not in _formed:
        for first in range(0, count, size):  # torch wants every process in the making of every group
            members = [*range(first, first + size)]
            group = torch.distributed.new_group(members, timeout=PATIENCE)
            waiting = _patient_group(members)
            if number in members:
                _formed[whole], _waiting[group] = group, waiting
    return number // size, count // size


@contextmanager
def apart(size: int | None = 1) -> Iterator[None]:
    """Work in this process's group of so many as if there were no other process: the first of the group writes.

    Nothing is split among, gathered from or waited for any but the group: torch's default process group, which DDP,
    collectives and Accelerate take, is the group's. A DDP model or an Accelerator that is created in such a block is to
    be used in such blocks only.

    Args:
        size: Processes of the group, neighbours by number; None to change nothing. The first block of a size above 1
            connects the groups, as `groups_of` does, so every process has to get there. Within a block, the group
            stays or is made one process.

    Raises:
        SettingError: The processes cannot be divided so, or are in groups of another size already.
    """
    global _near, _all
    if size is not None and _near is not None and 1 < size < world_size():
        raise SettingError(
            f"processes_per_run: groups of {size} cannot be made within one of {world_size()}; leave that block before"
        )
    if size is None or (groups_of(size)[1] == 1 if _near is None else world_size() <= size):
        yield
        return
    join_processes()  # or the first to want it would make it in the block, of one process
    whole = torch.distributed.group.WORLD
    before = _near, _all
    changed: dict[str, Any] = {"num_processes": size, "process_index": rank() % size}
    if size == 1:
        changed["distributed_type"] = DistributedType.NO
    states = accelerate_states()
    kept = [{key: state.get(key, states[0][key]) for key in changed} for state in states]
    _near, _all = (rank() % size, size), place()
    try:
        for state in states:
            if state:
                state.update(changed)
        set_world_(_formed[whole, size] if size > 1 else _by_itself(whole))
        yield
    finally:
        _near, _all = before
        set_world_(whole)
        for state, values in zip(states, kept, strict=True):
            if state:
                state.update(values)


def _by_itself(whole: Any) -> Any:
    """The group of this process, which no other has to help making."""
    if (whole, 1) not in _formed:
        me = torch.distributed.get_rank()
        _formed[whole, 1] = torch.distributed.new_group([me], timeout=PATIENCE, use_local_synchronization=True)
    return _formed[whole, 1]


def wait_for_others() -> None:
    """Wait until every process is here, even if it trains for days; every process has to call this equally often.

    Raises:
        RuntimeError: Another process has died.
        Stopped: SIGTERM came while waiting.
    """
    if world_size() == 1:
        return
    whole = torch.distributed.group.WORLD
    if whole not in _waiting:
        _waiting[whole] = _patient_group()
    work: Any = torch.distributed.all_reduce(torch.zeros(1), group=_waiting[whole], async_op=True)
    while not work.is_completed():
        if stop_asked():
            raise Stopped
        time.sleep(0.02)
    work.wait()


def _patient_group(members: list[int] | None = None) -> Any:
    """A group to wait in: collectives of the training are given minutes, and a wait must not occupy the GPU."""
    return torch.distributed.new_group(members, backend="gloo", timeout=timedelta(days=30))


def any_of(flags: Sequence[bool]) -> list[bool]:
    """For each flag, whether any process has raised it; the same answer everywhere."""
    if world_size() == 1:
        return list(flags)
    device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
    found = torch.tensor([float(flag) for flag in flags], device=device)
    torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
    return [bool(flag) for flag in found.tolist()]


def from_first(value: T) -> T:
    """The first process's value, which can be pickled; every process has to call this."""
    if world_size() == 1:
        return value
    held = [value]
    torch.distributed.broadcast_object_list(held, 0)
    return held[0]


def decided(decide: Callable[[], T]) -> T:
    """What the first process makes of something, its value or its error, everywhere; every process has to call this.

    Files are read at different moments and through different caches: processes that each judged them might disagree.
    """
    found = error = None
    if rank() == 0:
        try:
            found = decide()
        except (OSError, ValueError) as raised:
            error = raised
    found, error = from_first((found, error))
    if error is not None:
        raise error
    return found  # pyright: ignore[reportReturnType]


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
