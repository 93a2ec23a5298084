"""Writing files so that nothing already written is lost: a temporary file beside the target, then a rename."""

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from .lazy import Lazy
from .processes import rank

_TEMPORARY = ".timm-tickets-tmp"
# Seconds in which what another machine has written in a shared folder has to be seen.
_APPEARS = 180


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
    temporary = path.with_name(f".{path.name}{_TEMPORARY}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        _flush(temporary)
        if keep is not None and path.exists():
            path.replace(keep)  # killed here, the file before is still whole under its other name
        temporary.replace(path)
        _flush(path.parent)  # the rename itself
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            temporary.unlink()
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        message = f"cannot write {path}: {reason}; nothing written before is lost. Free or choose a place, run again"
        raise OSError(message) from error
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_temporaries(folder: Path) -> None:
    """Delete what a process that was killed while it wrote has left in a folder."""
    for left in folder.glob(f".*{_TEMPORARY}"):
        left.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def write_json(path: Path, value: Any) -> None:
    write_bytes(path, (json.dumps(value, indent=2) + "\n").encode())


def read_json(path: Path) -> Any:
    """The parsed file, or None where it does not exist."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None


def appearing(path: Path) -> Any:
    """The parsed file that another process has written, waited for: NFS remembers for a minute what was not there.

    Raises:
        OSError: It does not appear.
    """
    deadline = time.monotonic() + _APPEARS
    while (found := read_json(path)) is None:
        if time.monotonic() > deadline:
            raise OSError(
                f"cannot find {path}, which another process has written; give all processes an output folder that they "
                "share, or set parallel=data"
            )
        time.sleep(0.1)
    return found


def write_state(path: Path, state: Mapping[str, Tensor]) -> None:
    """Save a state dict as safetensors: what timm's ``--initial-checkpoint`` and ``checkpoint_path`` read."""
    with replacing(path) as temporary:
        save_file(dict(state), temporary)


def read_state(path: Path) -> dict[str, Tensor]:
    return load_file(path)


def stored_state(path: Path) -> Lazy:
    """A saved state dict, each tensor read when it is wanted."""

    def read(name: str) -> Tensor:
        with safe_open(path, "pt") as file:
            return file.get_tensor(name)

    with safe_open(path, "pt") as file:
        return Lazy(file.keys(), read)
