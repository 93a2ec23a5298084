"""Checkpoints within a run: a file that knows whether it is whole, and the one before it.

The file is torch's own, with a SHA-256 of it behind; ``torch.load(path, weights_only=True)`` reads it.
"""

import hashlib
import pickle
from pathlib import Path
from typing import Any, BinaryIO

import torch

from .files import replacing
from .processes import rank
from .wrappers import check_same_everywhere

CHECKPOINT, BEFORE = "checkpoint.pt", "checkpoint_before.pt"
_MARK = b"timm-tickets sha256 "
_TAIL = len(_MARK) + hashlib.sha256().digest_size


class _Hashing:
    """A file to write to that hashes what is written."""

    def __init__(self, file: BinaryIO):
        self.file, self.hash = file, hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        self.hash.update(data)
        try:
            return self.file.write(data)
        except OSError as error:  # torch's writer would only say that a write has failed
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def save_checkpoint(folder: Path, saved: dict[str, Any]) -> None:
    """Write a checkpoint; the one before stays beside it.

    Args:
        folder: The run's folder.
        saved: Tensors and primitives.

    Raises:
        OSError: It could not be written; the one before is untouched.
    """
    with (
        replacing(folder / CHECKPOINT, keep=folder / BEFORE) as temporary,
        temporary.open("wb") as file,
    ):
        hashing = _Hashing(file)
        try:
            torch.save(saved, hashing)  # pyright: ignore[reportArgumentType]
        except RuntimeError:
            if hashing.error is None:
                raise
            raise hashing.error from None
        file.write(_MARK + hashing.hash.digest())


def load_checkpoint(folder: Path) -> tuple[dict[str, Any] | None, list[str]]:
    """The newest whole checkpoint; damaged ones are removed, so that they never take a good one's place.

    Every process has to call it.

    Args:
        folder: The run's folder.

    Returns:
        What was saved, None where there is none; and what to say of damaged ones.

    Raises:
        RuntimeError: Processes read different checkpoints.
    """
    damaged: list[Path] = []
    saved, digest = None, bytes(32)
    for path in (folder / CHECKPOINT, folder / BEFORE):
        try:
            saved, digest = _read(path)
            break
        except FileNotFoundError:
            continue
        except (ValueError, RuntimeError, EOFError, pickle.UnpicklingError):
            damaged.append(path)
    check_same_everywhere(f"the checkpoint in {folder}", digest)  # and so all have read before one removes
    told = []
    for path in damaged:
        then = (
            "the run goes on from the one before" if saved else "no other is whole: the run starts from its beginning"
        )
        told.append(f"{path} is damaged (cut short, or its checksum differs) and is removed; {then}")
        if rank() == 0:
            path.unlink(missing_ok=True)
    return saved, told


def remove_checkpoints(folder: Path) -> None:
    """Delete a run's checkpoints, once it is written down."""
    for name in (CHECKPOINT, BEFORE):
        (folder / name).unlink(missing_ok=True)


def _read(path: Path) -> tuple[dict[str, Any], bytes]:
    """What a checkpoint holds, and its SHA-256.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is damaged.
    """
    with path.open("rb") as file:
        left = path.stat().st_size - _TAIL
        found = hashlib.sha256()
        while left > 0 and (block := file.read(min(left, 1 << 20))):
            found.update(block)
            left -= len(block)
        if left or file.read() != _MARK + found.digest():
            raise ValueError(f"{path} is not whole")
        file.seek(0)
        return torch.load(file, map_location="cpu", weights_only=True), found.digest()
