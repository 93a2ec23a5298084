"""The run folder: whose experiment it holds, whether this one may continue it, and what is cleared from it."""

import hashlib
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from ..config.recipe import CONTROLS, SEARCHED, Recipe, load_recipe
from ..core.errors import SettingError, TicketError
from ..core.warn import warn
from ..distributed.processes import decided, ending_with_others, join_processes, wait_for_others
from ..distributed.sigterm import stoppable
from ..pruning.run_files import RECORD, Row, read_run_record
from ..storage.checkpoint_file import BEFORE, CHECKPOINT, remove_checkpoints
from ..storage.files import (
    DamagedError,
    check_whole,
    is_writer,
    read_bytes,
    read_record,
    remove_temporaries,
    write_bytes,
    write_record,
)
from ..storage.lock import locked
from ..tickets.ticket import load_ticket
from ..training.best import BEST
from ..training.epoch_log import EPOCHS

RESULT = "result.json"
MODEL, CONFIG = "model.safetensors", "config.json"  # the trained model as plain timm reads it
IMAGES = "images.json"  # what is in the splits
_RECIPE, _KIND = "recipe.yaml", "experiment.json"
_MARK = b"# timm-tickets: the resolved recipe of this folder's results."
_CHECKSUM = b" sha256 "
_RUN_FOLDER = re.compile(rf"{'|'.join(CONTROLS)}|ticket|round_\d+(_part_\d+)?")


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

    Every process has to call it.

    Args:
        folder: The run folder.
        recipe: The recipe.
        kind: What is done with it, such as ``search``, down to the very ticket.
        restart: Delete what an earlier experiment left.

    Raises:
        SettingError: The folder holds another experiment, or files of somebody else under our names; or that cannot be
            told, because what says so is damaged.
    """
    decided(lambda: _check_folder(folder, recipe, kind, restart))


def _check_folder(folder: Path, recipe: Recipe, kind: str, restart: bool) -> None:
    stored, there = folder / _RECIPE, _Experiment()
    lost, ours = _lost_recipe(stored)
    lost_kind = None
    try:
        there = _experiment(folder)
    except DamagedError as error:
        lost_kind = str(error)
    if there.recipe is None and lost is not None and not ours:
        if not os.path.lexists(stored):
            _check_free(folder)
            return
        raise SettingError(f"{stored} was not written by timm-tickets; choose another output=")
    if restart:
        _clear(folder, recipe)
        return
    if lost is not None and there.recipe != recipe.hash:
        raise SettingError(
            f"{lost}, so whether {folder} holds results of this recipe cannot be told. If it does, delete {stored} and "
            f"{folder / _KIND} to continue; else choose another output=, or begin again with --restart"
        )
    changed = changes(stored, recipe) if lost is None else []
    if there.kind not in (None, kind):
        changed.append(f"experiment: {there.kind} there, {kind} now")
    if changed:
        raise SettingError(
            f"{folder} holds another experiment's results:\n  "
            + "\n  ".join(changed)
            + "\ncontinue it with the old settings, choose another output=, or begin again with --restart"
        )
    if there.kind is None:
        lost_kind = lost_kind or f"{folder / _KIND} is missing"
    if told := [what for what in (lost, lost_kind) if what is not None]:
        warn(f"{' and '.join(told)}; written again, as of this command")
        _write_claim(folder, recipe, kind, there)


def _check_free(folder: Path) -> None:
    """Refuse a folder that is nobody's yet and has somebody's model where the trained one would go."""
    for name in (MODEL, CONFIG):
        if os.path.lexists(folder / name) and not (folder / RESULT).exists():
            raise SettingError(f"{folder / name} was not written by timm-tickets; choose another output=")


def changes(stored: Path, recipe: Recipe) -> list[str]:
    """What a stored recipe has otherwise than this one."""
    try:
        old = load_recipe(stored).compared()  # resolved again: settings newer than the folder have their defaults
    except SettingError as error:
        raise SettingError(f"{stored} cannot be continued: {error}\nbegin again with --restart") from None
    new = recipe.compared()
    return [f"{key}: {old.get(key)} there, {new.get(key)} now" for key in new | old if old.get(key) != new.get(key)]


def _lost_recipe(stored: Path) -> tuple[str | None, bool]:
    """What is wrong with a stored recipe, None if nothing is; and whether its first line is of ours.

    That line has the SHA-256 of the others.
    """
    try:
        data = read_bytes(stored)
    except DamagedError as error:
        return str(error), False
    if data is None:
        return f"{stored} is missing", False
    first, _, rest = data.partition(b"\n")
    checksum = hashlib.sha256(rest).hexdigest().encode()
    if first == _MARK + _CHECKSUM + checksum:
        return None, True
    return f"{stored} is damaged (its checksum differs)", first.startswith(_MARK) or first.endswith(checksum)


@dataclass(frozen=True)
class _Experiment:
    """A folder's experiment, as far as it says: its kind, the recipe's hash, and the record's checksum as its name."""

    kind: str | None = None
    recipe: str | None = None
    name: str | None = None


def _experiment(folder: Path) -> _Experiment:
    if (stored := read_record(folder / _KIND)) is None:
        return _Experiment()
    found, checksum = stored
    return _Experiment(found.get("experiment"), found.get("recipe"), checksum)


def experiment_of(folder: Path) -> str | None:
    """What the trainings of a folder follow that belong to no search; None where it is nobody's yet."""
    name = _experiment(folder).name
    return None if name is None else f"{name}/"


def claim_folder(folder: Path, recipe: Recipe, kind: str) -> None:
    """Make the folder this experiment's, and clean up after a process that was killed while it wrote."""
    if is_writer():
        _write_claim(folder, recipe, kind, _experiment(folder))
        for place in (folder, *filter(_is_run_folder, folder.iterdir())):
            remove_temporaries(place)
            if (place / RECORD).exists():  # killed between writing the run down and deleting these
                remove_checkpoints(place)
    wait_for_others()


def _write_claim(folder: Path, recipe: Recipe, kind: str, there: _Experiment) -> None:
    text = recipe.to_yaml().encode()
    checksum = hashlib.sha256(text).hexdigest().encode()
    write_bytes(folder / _RECIPE, _MARK + _CHECKSUM + checksum + b"\n" + text)
    if there.kind is None:  # else it stays as it began: its trainings follow it
        write_record(folder / _KIND, {"experiment": kind, "recipe": recipe.hash})


def _clear(folder: Path, recipe: Recipe) -> None:
    """Delete what an experiment of this name wrote, and nothing else; the recipe goes last, to be able to try again."""
    for path in folder.iterdir():
        if _is_run_folder(path):
            for name in ("*.ticket", "*.safetensors", RECORD, EPOCHS, CHECKPOINT, BEFORE):
                for file in path.glob(name):
                    _remove(file)
            remove_temporaries(path)
            with suppress(OSError):  # something of the user's is in it
                path.rmdir()
    for name in ("native", *SEARCHED):  # controls that are searches of their own
        if _lost_recipe(folder / name / _RECIPE)[1]:
            _clear(folder / name, recipe)
            with suppress(OSError):
                (folder / name).rmdir()
    ours = (RESULT, f"{recipe.name}.ticket", "start.state", "pruner.json", "summary.csv", "accuracy.png", _KIND)
    for name in (*ours, MODEL, CONFIG, BEST, EPOCHS, IMAGES, _RECIPE):
        _remove(folder / name)


def _is_run_folder(path: Path) -> bool:
    """Whether it is a run's folder, and not a link to one that may be somebody else's."""
    return _RUN_FOLDER.fullmatch(path.name) is not None and path.is_dir() and not path.is_symlink()


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except (IsADirectoryError, PermissionError) as error:
        raise OSError(f"cannot delete {path}: {error.strerror}; move or delete it yourself") from error


def finished(folder: Path, ticket: Path | None = None) -> dict[str, Any] | None:
    """What a finished experiment has left; where that is damaged, it is told, and counts as not finished.

    Every process has to call it.

    Args:
        folder: The run folder.
        ticket: The final ticket, where the experiment leaves one.
    """
    return decided(lambda: whole_result(folder, ticket))


def whole_result(folder: Path, ticket: Path | None = None) -> dict[str, Any] | None:
    """As `finished`, for one process alone."""
    try:
        if (stored := read_record(folder / RESULT)) is None:
            return None
        done, _ = stored
        done.setdefault("files", {})
        try:
            _Result.model_validate(done)
        except ValidationError:
            raise DamagedError(f"{folder / RESULT} is damaged (it is no experiment's result)") from None
        if done["experiment"] != _experiment(folder).name:
            raise DamagedError(f"{folder / RESULT} is of another experiment")
        for name, checksum in done["files"].items():
            check_whole(folder / name, checksum)
        if ticket is not None and load_ticket(ticket).fingerprint != done["fingerprint"]:
            raise TicketError(f"{ticket} is not the ticket that was found here")
        return done
    except (DamagedError, TicketError, FileNotFoundError) as error:
        warn(f"{error}; it is made again from the finished runs")
        return None


class _Result(BaseModel):
    rows: list[Row]
    files: dict[str, str] = {}  # versions before had none
    fingerprint: str
    experiment: str | None


def write_result(folder: Path, rows: list[dict[str, Any]], fingerprint: str, files: Mapping[str, str]) -> None:
    """Write down, last of all, what an experiment has left; with the checksums of the trained model's files."""
    record = {"rows": rows, "fingerprint": fingerprint, "experiment": _experiment(folder).name, "files": dict(files)}
    write_record(folder / RESULT, record)


def in_order(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Controls first, then by round and part: the ticket's own training comes last, but for a native one."""
    return sorted(rows, key=lambda row: (*_place(row["name"]), row["round"], row["part"]))


def records(folder: Path, lineage: Collection[str | None] = ()) -> list[dict[str, Any]]:
    """The finished trainings of a folder, `in_order`.

    Args:
        folder: The run folder.
        lineage: What they may follow; the experiment itself where nothing is given. Others are told and left out.
    """
    lineage = lineage or [experiment_of(folder)]
    found = []
    for path in folder.glob(f"*/{RECORD}"):
        try:
            record = read_run_record(path.parent, lineage)
        except DamagedError as error:
            warn(f"{error}; it is left out of the results")
            continue
        if record is not None and record["scored"]:
            del record["whole"]
            found.append(record)
    return in_order(found)


def _place(name: str) -> tuple[bool, int]:
    return (False, CONTROLS.index(name)) if name in CONTROLS else (True, name == "native")
