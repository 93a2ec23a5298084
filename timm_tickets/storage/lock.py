"""A lock on a run folder, so that two commands never write into it at once."""

import json
import os
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from ..core.errors import SettingError
from ..distributed.processes import from_first, rank
from .files import read_bytes, write_json

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# Says who holds the lock; it is no lock itself, so it may stay behind a process that was killed until the next command.
_HOLDER = ".timm-tickets-running.json"
# As often a folder may vanish between two of our steps: others, each ending at that moment, removed it.
_ATTEMPTS = 10
_open: dict[int, bool] = {}  # each held descriptor, and whether its folder was made for it


class FolderInUse(SettingError):
    """Another command works in the folder."""


def _forget() -> None:
    """In a forked child, such as a DataLoader's worker: its copy would hold the lock after its parent was killed."""
    for descriptor in _open:
        with suppress(OSError):
            os.close(descriptor)
    _open.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


@contextmanager
def locked(folder: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Hold a folder for the length of the block; of several processes of one command, the writing one holds it.

    The lock is the kernel's (flock) and on the folder itself, so it ends with the process however that ends. The folder
    is made for it where it is not there, and then removed if it is still empty at the end. Where the file system has no
    such lock, the block runs without one, and that is said.

    Args:
        folder: The folder.
        say: Told where there is no lock.

    Raises:
        FolderInUse: Another command works in it; the message says which.
        SettingError: The folder cannot exist.
    """
    held, problem = (None, None) if rank() else _acquire(folder, say)
    problem = from_first(problem)
    if problem is not None:
        raise problem
    try:
        yield
    finally:
        if held is not None:
            _release(folder, held)


def _acquire(folder: Path, say: Callable[[str], None]) -> tuple[int | None, SettingError | None]:
    """The descriptor that holds the lock, and what to refuse with."""
    if fcntl is None:
        say(f"this system cannot lock {folder}; start no second command on it")
        return None, None
    gone = "it is removed again and again"
    for _ in range(_ATTEMPTS):
        try:
            made = not folder.exists()
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(folder, os.O_RDONLY)
        except FileNotFoundError as error:  # its last holder removed it while it was empty; or it cannot exist
            gone = error.strerror
            continue
        except OSError:
            return None, None  # whoever writes there first says what is wrong
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None, FolderInUse(_refusal(folder))
        except OSError as error:
            os.close(descriptor)
            say(f"{folder} cannot be locked ({error.strerror}); start no second command on it")
            return None, None
        with suppress(OSError):
            if os.path.samestat(os.fstat(descriptor), os.stat(folder)):
                break
        os.close(descriptor)  # the same, between the open and the lock
    else:
        return None, SettingError(
            f"output: the folder {folder} cannot be made ({gone}); choose another one, in a place that exists; if your "
            "working directory was deleted, change to one that is there"
        )
    _open[descriptor] = made
    since = datetime.now().astimezone().isoformat(timespec="seconds")
    with suppress(OSError):
        write_json(folder / _HOLDER, {"pid": os.getpid(), "host": socket.gethostname(), "since": since})
    return descriptor, None


def held(folder: Path) -> bool:
    """Whether a command works in a folder now: its lock is tried, and let go of at once."""
    if fcntl is None:
        return False
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a file system without such locks
        return False
    finally:
        os.close(descriptor)
    return False


def left_behind(folder: Path) -> bool:
    """Whether the last command in a folder that nobody holds was killed: it had no time to say that it has ended."""
    return (folder / _HOLDER).is_file()


def _refusal(folder: Path) -> str:
    return f"{folder} is in use: {_holder(folder)} works in it. Wait until it has ended, or choose another output="


def _holder(folder: Path) -> str:
    """Who holds the lock, as far as its file says so in the form that we write: anybody may have put one there."""
    with suppress(OSError, ValueError, RecursionError, KeyError, TypeError):
        holder = json.loads(read_bytes(folder / _HOLDER, most=1000) or b"")
        host, since = re.fullmatch(r"[\w.-]+", holder["host"]), datetime.fromisoformat(holder["since"])
        if host is not None:
            return f"process {int(holder['pid'])} on {host[0]}, since {since.isoformat(timespec='seconds')},"
    return "another command"


def _release(folder: Path, descriptor: int) -> None:
    with suppress(OSError):
        (folder / _HOLDER).unlink()
    if _open.pop(descriptor):
        with suppress(OSError):
            folder.rmdir()  # only if nothing was written
    os.close(descriptor)
