"""Files: written so that nothing already written is lost, and read so that nothing damaged is taken for whole.

What is written goes into a new folder beside its target, is flushed to disk and then renamed.
"""

import errno
import hashlib
import json
import os
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..core.lazy import Lazy
from ..distributed.processes import rank
from ..distributed.sigterm import Stopped, stop_asked

_TEMPORARY = ".timm-tickets-tmp"
# In records; two, because a flipped bit may hit the name of the checksum, but then not the other's.
_FORMAT, _SEAL = "_format", "_sha256"
# Seconds in which what another machine has written in a shared folder has to be seen.
_APPEARS = 180


class DamagedError(OSError):
    """A file of ours that is missing, cut short, changed, or of something else; the message names it."""


def is_writer() -> bool:
    """Whether this process is the one that writes: the first of those that now work together."""
    return rank() == 0


@contextmanager
def replacing(path: Path, keep: Path | None = None) -> Iterator[Path]:
    """Give a temporary path; when the block ends well, flush it to disk and rename it to ``path``.

    Args:
        path: The file to write.
        keep: Where what stood at ``path`` before is moved; it is overwritten where None.

    Raises:
        OSError: The file could not be written (a full disk, no permission). The temporary file is gone and what
            stood at ``path`` before is untouched.
    """
    # A new folder under a name that nobody can guess: no link that somebody has put there is followed. And safetensors
    # writes through a temporary file of its own, which is left nowhere else when it is killed.
    place = path.with_name(f".{secrets.token_hex(8)}{_TEMPORARY}")
    temporary = place / path.name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        place.mkdir()
        yield temporary
        with suppress(OSError):  # a file system without permissions
            temporary.chmod(place.stat().st_mode & 0o666)  # the umask's, where safetensors gives none to others
        _flush(temporary)
        if keep is not None and path.exists():
            path.replace(keep)  # killed here, the file before is still whole under its other name
        temporary.replace(path)
        _flush(path.parent)  # the rename itself
    except (OSError, SafetensorError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        message = f"cannot write {path}: {reason}; nothing written before is lost. Free or choose a place, run again"
        raise OSError(message) from error
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_temporaries(folder: Path) -> None:
    """Delete what a process that was killed while it wrote has left in a folder; links, never what they lead to."""
    for left in folder.glob(f".*{_TEMPORARY}"):
        if left.is_dir() and not left.is_symlink():
            shutil.rmtree(left, ignore_errors=True)
        else:  # of versions that had no folder for it
            left.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def write_json(path: Path, value: Any) -> None:
    write_bytes(path, (json.dumps(value, indent=2) + "\n").encode())


def write_record(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object with its checksum, which `read_record` compares."""
    write_json(path, {_FORMAT: 2, **value, _SEAL: seal(value)})


def seal(value: Mapping[str, Any]) -> str:
    """The checksum of a record: SHA-256 of its JSON, however that is laid out."""
    plain = json.loads(json.dumps({**value, _FORMAT: 2}))  # keys are text from here on
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def opened(path: Path) -> BinaryIO:
    """Open a file to read, and nothing else that stands under its name: a FIFO would wait for its writer for ever.

    Raises:
        FileNotFoundError, NotADirectoryError: Nothing is there.
        DamagedError: It is no file.
        OSError: It is a folder, or cannot be read.
    """
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    no_file = f"{path} is damaged (it is a FIFO, a device or a socket, not a file)"
    try:
        descriptor = os.open(path, flags)
    except (FileNotFoundError, NotADirectoryError):
        raise
    except OSError as error:
        if error.errno in (errno.ENXIO, errno.ELOOP):
            raise DamagedError(no_file if error.errno == errno.ENXIO else f"{path} is a link to itself") from error
        raise OSError(f"cannot read {path}: {error.strerror}; make it readable, or delete it") from error
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(f"{path} is a folder, where a file belongs; move or delete it, and run again")
    raise DamagedError(no_file)


def read_bytes(path: Path, most: int = -1) -> bytes | None:
    """What is in a file, or its first so many bytes; None where it does not exist.

    Raises:
        DamagedError: It is no file, or the disk fails to give it.
        OSError: It is a folder, or cannot be read.
    """
    try:
        with opened(path) as file, _reading(path):
            return file.read(most)
    except (FileNotFoundError, NotADirectoryError):
        return None


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DamagedError(f"{path} is damaged ({error.strerror})") from error


def read_json(path: Path) -> Any:
    """The parsed file, or None where it does not exist.

    Raises:
        DamagedError: It is not JSON; else as `read_bytes`.
    """
    data = read_bytes(path)
    try:
        return None if data is None else json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{path} is damaged (it is {'not JSON' if data else 'empty'})") from error


def read_record(path: Path) -> tuple[dict[str, Any], str] | None:
    """What `write_record` has written and its checksum; None where there is nothing.

    Raises:
        DamagedError: It has no checksum, or it differs; else as `read_json`.
    """
    found = read_json(path)
    if found is None:
        return None
    if not isinstance(found, dict) or _SEAL not in found:
        raise DamagedError(f"{path} is damaged (it has no checksum)")
    format, checksum = found.pop(_FORMAT, None), found.pop(_SEAL, None)
    if format != 2 or checksum != seal(found):
        raise DamagedError(f"{path} is damaged (its checksum differs)")
    return found, checksum


def appearing(path: Path, read: Callable[[Path], Any] = read_json) -> Any:
    """What another process has written, waited for: NFS remembers for a minute what was there, or was not.

    Raises:
        OSError: It does not appear, or stays damaged.
        Stopped: SIGTERM came while waiting.
    """
    deadline = time.monotonic() + _APPEARS
    while True:
        late = time.monotonic() > deadline
        try:
            if (found := read(path)) is not None:
                return found
        except DamagedError:
            if late:
                raise
        if late:
            raise OSError(
                f"cannot find {path}, which another process has written; give all processes an output folder that they "
                "share, or set parallel=data"
            )
        if stop_asked():
            raise Stopped
        time.sleep(0.1)


def sha256(path: Path) -> str:
    """SHA-256 of a file.

    Raises:
        OSError: As `opened`.
    """
    found = hashlib.sha256()
    with opened(path) as file, _reading(path):
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()


def check_whole(path: Path, checksum: str | None) -> None:
    """Compare a file with its SHA-256, where it has one; where it has none, see that it is there.

    Raises:
        DamagedError: It is missing, no file, or another one.
        OSError: It is a folder, or cannot be read.
    """
    try:
        if checksum is None:
            opened(path).close()
        elif sha256(path) != checksum:
            raise DamagedError(f"{path} is damaged (its checksum differs)")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DamagedError(f"{path} is missing") from error


def write_state(path: Path, state: Mapping[str, Tensor], told: dict[str, str] | None = None) -> None:
    """Save a state dict as safetensors: what timm's ``--initial-checkpoint`` and ``checkpoint_path`` read.

    Args:
        path: The file.
        state: The tensors.
        told: What stands in its header beside them.
    """
    with replacing(path) as temporary:
        # safetensors refuses what does not lie in its own order, such as what a channels-last weight's gate makes.
        save_file({name: state[name].contiguous() for name in state}, temporary, told)


def write_same(source: Path, path: Path) -> None:
    """Have the same file under a second name: one in bytes where the file system has hard links, else a copy.

    Raises:
        OSError: As `replacing`.
    """
    with replacing(path) as temporary:
        try:
            os.link(source, temporary)
        except OSError:  # none here, or too many; what is wrong with the source is said by the copy
            shutil.copyfile(source, temporary)


def read_state(path: Path, checksum: str | None = None) -> dict[str, Tensor]:
    """A saved state dict; raises as `check_whole` does."""
    check_whole(path, checksum)
    try:
        return load_file(path)
    except Exception as error:  # whatever the libraries make of what is no state dict
        raise DamagedError(f"{path} is damaged ({error})") from error


def stored_state(path: Path) -> Lazy:
    """A saved state dict, each tensor read when it is wanted."""

    def read(name: str) -> Tensor:
        with safe_open(path, "pt") as file:
            return file.get_tensor(name)

    with safe_open(path, "pt") as file:
        return Lazy(file.keys(), read)
