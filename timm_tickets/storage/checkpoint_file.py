"""Checkpoints within a run: a file that knows whether it is whole, and the one before it.

The file is torch's own, with a SHA-256 of it behind; ``torch.load(path, weights_only=True)`` reads it.
"""

import hashlib
import os
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ..distributed.collectives import check_same_everywhere
from ..distributed.processes import rank
from .files import DamagedError, opened, replacing

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


def save_checkpoint(folder: Path, saved: dict[str, Any], of: str | None = None) -> None:
    """Write a checkpoint; the one before stays beside it.

    Args:
        folder: The run's folder.
        saved: Tensors and primitives.
        of: What stands for the run: its checkpoints are no other's.

    Raises:
        OSError: It could not be written; the one before is untouched.
    """
    with (
        replacing(folder / CHECKPOINT, keep=folder / BEFORE) as temporary,
        temporary.open("wb") as file,
    ):
        hashing = _Hashing(file)
        try:
            torch.save(saved if of is None else {**saved, "of": of}, hashing)  # pyright: ignore[reportArgumentType]
        except RuntimeError:
            if hashing.error is None:
                raise
            raise hashing.error from None
        file.write(_MARK + hashing.hash.digest())


def load_checkpoint(folder: Path, of: str | None = None) -> tuple[dict[str, Any] | None, list[str]]:
    """The newest whole checkpoint; damaged ones are removed, so that they never take a good one's place.

    Every process has to call it.

    Args:
        folder: The run's folder.
        of: What it was saved with.

    Returns:
        What was saved, None where there is none; and what to say of damaged ones.

    Raises:
        OSError: A folder stands in its place, or it cannot be read.
        RuntimeError: Processes read different checkpoints.
    """
    damaged: dict[Path, str] = {}
    saved, digest = None, bytes(32)
    for path in (folder / CHECKPOINT, folder / BEFORE):
        try:
            saved, digest = _read(path, of)
            break
        except (FileNotFoundError, NotADirectoryError):
            continue
        except DamagedError as error:
            damaged[path] = str(error)
    check_same_everywhere(f"the checkpoint in {folder}", digest)  # and so all have read before one removes
    told = []
    for path, why in damaged.items():
        then = (
            "the run goes on from the one before" if saved else "no other is whole: the run starts from its beginning"
        )
        told.append(f"{why} and is removed; {then}")
        if rank() == 0:
            path.unlink(missing_ok=True)
    return saved, told


def remove_checkpoints(folder: Path) -> None:
    """Delete a run's checkpoints, once it is written down."""
    for name in (CHECKPOINT, BEFORE):
        (folder / name).unlink(missing_ok=True)


def _read(path: Path, of: str | None) -> tuple[dict[str, Any], bytes]:
    """What a checkpoint holds, and its SHA-256.

    Raises:
        FileNotFoundError: There is none.
        DamagedError: It is damaged, or another run's.
        OSError: As `opened`.
    """
    with opened(path) as file:
        left = os.fstat(file.fileno()).st_size - _TAIL
        found = hashlib.sha256()
        while left > 0 and (block := file.read(min(left, 1 << 20))):
            found.update(block)
            left -= len(block)
        if left or file.read() != _MARK + found.digest():
            raise DamagedError(f"{path} is damaged (cut short, or its checksum differs)")
        file.seek(0)
        try:
            saved = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # whatever torch makes of what is whole and no checkpoint
            raise DamagedError(f"{path} is damaged (it is no checkpoint)") from error
        if not isinstance(saved, dict) or saved.get("of") != of:
            raise DamagedError(f"{path} is of another run, or of this one after others than those now before it,")
        return saved, found.digest()
