"""Answers: what a command has said, kept for as long as everything that it follows from stays as it is.

To check a recipe, every pruner's settings, timm's models and optimizers have to be known, and torch with them: seconds,
for a page of text that is the same each time. It is kept in the user's cache folder under a name that stands for all of
it; where anything is other than then, or damaged, or another package brings pruners, the answer is found anew.
"""

import hashlib
import json
import os
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import entry_points, version
from pathlib import Path
from typing import Any

from ..config.files import recipes_folder

_PACKAGE = Path(__file__).parents[1]
_MOST = 100  # answers that are kept


def kept(question: Any, answer: Callable[[], str]) -> str:
    """The answer to a question, from the cache where it is there.

    Args:
        question: Everything typed and read that the answer follows from, besides this package and those it uses; JSON
            types.
        answer: Finds it; what it raises is not kept.
    """
    if any(entry_points(group=f"timm_tickets.{kind}s") for kind in ("pruner", "tweak")):
        return answer()  # an editable package's files change while its version stays
    path = _folder() / hashlib.sha256(json.dumps([question, _installed()]).encode()).hexdigest()
    with suppress(OSError, ValueError):
        text, _, seal = path.read_text("utf-8").rpartition("\n")
        if seal == _seal(text):
            return text
    text = answer()
    with suppress(OSError):  # no home, or a full disk: then it is found anew each time
        _keep(path, f"{text}\n{_seal(text)}")
    return text


def _folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "timm-tickets"


def _seal(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _installed() -> list[Any]:
    """What stands for this package's files, however it is installed, and for the packages that check settings."""
    names = ("torch", "timm", "accelerate", "pydantic", "pydantic_core", "omegaconf", "pyyaml", "pillow")
    files = [*_PACKAGE.rglob("*.py"), *recipes_folder().glob("*.yaml")]
    found = sorted((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files)
    return [[version(name) for name in names], found]


def _keep(path: Path, text: str) -> None:
    there = [*path.parent.iterdir()] if path.parent.is_dir() else []
    for one in there if len(there) >= _MOST else ():
        one.unlink(missing_ok=True)
    write_text(path, text)


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all; as `storage.files` does, but without torch."""
    path.parent.mkdir(parents=True, exist_ok=True)
    place = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        place.write_text(text, "utf-8")
        place.replace(path)
    finally:
        place.unlink(missing_ok=True)
