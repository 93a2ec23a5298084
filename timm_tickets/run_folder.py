"""The run folder: whose experiment it holds, whether this one may continue it, and what is cleared from it."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .checkpoint import BEFORE, CHECKPOINT, remove_checkpoints
from .files import is_writer, read_json, remove_temporaries, write_bytes, write_json
from .lock import locked
from .processes import ending_with_others, join_processes, wait_for_others
from .recipe import Recipe, load_recipe
from .settings import SettingError
from .stop import stoppable

RESULT = "result.json"
IMAGES = "images.json"  # what is in the splits
_RECIPE, _KIND = "recipe.yaml", "experiment.json"
_MARK = "# timm-tickets: the resolved recipe of this folder's results."
_RUN_FOLDER = re.compile(r"dense|ticket|random|round_\d+(_part_\d+)?")


@contextmanager
def working_in(folder: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Together with the other processes, hold a run folder; stop at the next step on SIGTERM, and when one has died.

    Args:
        folder: The run folder.
        say: Told where the folder cannot be locked.

    Raises:
        SettingError: Another command works in the folder.
        Stopped: SIGTERM came; a checkpoint is written.
        TrainingError: Another process of this command has died.
    """
    join_processes()  # from here on one of them writes
    with stoppable(), ending_with_others(), locked(folder, say):
        yield


def check_folder(folder: Path, recipe: Recipe, kind: str, restart: bool) -> None:
    """Find out whether this very experiment may begin or continue in the folder; clear it where that is asked.

    Args:
        folder: The run folder.
        recipe: The recipe.
        kind: What is done with it, such as ``search``, down to the very ticket.
        restart: Delete what an earlier experiment left.

    Raises:
        SettingError: The folder holds another experiment, or files of somebody else under our names.
    """
    stored = folder / _RECIPE
    if not stored.exists():
        return
    if not stored.read_text().startswith(_MARK):
        raise SettingError(f"{stored} was not written by timm-tickets; choose another output=")
    if restart:
        if is_writer():
            _clear(folder, recipe)
        wait_for_others()
        return
    try:
        old = load_recipe(stored).compared()  # resolved again: settings newer than the folder have their defaults
    except SettingError as error:
        raise SettingError(f"{stored} cannot be continued: {error}\nbegin again with --restart") from None
    new = recipe.compared()
    changed = [f"{key}: {old.get(key)} there, {new.get(key)} now" for key in new | old if old.get(key) != new.get(key)]
    there = read_json(folder / _KIND)
    if there is not None and there != kind:
        changed.append(f"experiment: {there} there, {kind} now")
    if changed:
        raise SettingError(
            f"{folder} holds another experiment's results:\n  "
            + "\n  ".join(changed)
            + "\ncontinue it with the old settings, choose another output=, or begin again with --restart"
        )


def claim_folder(folder: Path, recipe: Recipe, kind: str) -> None:
    """Make the folder this experiment's, and clean up after a process that was killed while it wrote."""
    if is_writer():
        write_json(folder / _KIND, kind)
        write_bytes(folder / _RECIPE, f"{_MARK}\n{recipe.to_yaml()}".encode())
        for place in (folder, *(path for path in folder.iterdir() if _RUN_FOLDER.fullmatch(path.name))):
            remove_temporaries(place)
            if (place / "run.json").exists():  # killed between writing the run down and deleting these
                remove_checkpoints(place)
    wait_for_others()


def _clear(folder: Path, recipe: Recipe) -> None:
    """Delete what an experiment of this name wrote, and nothing else; the recipe goes last, to be able to try again."""
    for path in folder.iterdir():
        if path.is_dir() and _RUN_FOLDER.fullmatch(path.name) and not path.is_symlink():
            for name in ("*.ticket", "*.safetensors", "run.json", CHECKPOINT, BEFORE):
                for file in path.glob(name):
                    file.unlink()
            remove_temporaries(path)
            with suppress(OSError):  # something of the user's is in it
                path.rmdir()
    ours = (RESULT, f"{recipe.name}.ticket", "start.safetensors", "pruner.json", "summary.csv", "accuracy.png", _KIND)
    for name in (*ours, IMAGES, _RECIPE):
        (folder / name).unlink(missing_ok=True)


def records(folder: Path) -> list[dict[str, Any]]:
    """The finished trainings of a folder, in order: dense first, then by round and part."""
    found = [record for path in folder.glob("*/run.json") if (record := read_json(path))["scored"]]
    return sorted(found, key=lambda row: (row["name"] != "dense", row["round"], row["part"]))
