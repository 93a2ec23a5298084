"""What a search began with: its settings in ``pruner.json``, the model as given in ``start.state``.

``pruner.json`` holds its own checksum, which names the search, and that of the state. Where one of both is damaged, it
is written again if what is there, or the model as given now, shows that it would be the same.
"""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch

from ..core.errors import SettingError
from ..core.lazy import Lazy
from ..core.states import State
from ..core.warn import warn
from ..distributed.processes import decided
from ..storage.files import (
    DamagedError,
    check_whole,
    read_record,
    read_state,
    seal,
    sha256,
    stored_state,
    write_record,
    write_state,
)
from .run_files import RECORD, follows_of, read_run_record, search_of

# timm before 1.0.29 loads no folder that has two .safetensors files, and the trained model is one.
_IDENTITY, _FIRST = "pruner.json", "start.state"
_ANEW = (
    "that it began with. Put the file back, or give the model of then (the same seed); else delete the folder "
    "(--restart does) and search anew"
)


def is_begun(folder: Path) -> bool:
    """Whether a folder holds a search."""
    return (folder / _IDENTITY).is_file()


def begun(folder: Path, identity: Mapping[str, Any], state: State, recipe: str | None) -> tuple[State, str]:
    """The state that a folder's search began with: this one where it begins now, which is then written down.

    Every process has to call it.

    Args:
        folder: The search's.
        identity: What makes it this search, in JSON types.
        state: The model as given.
        recipe: Hash of the recipe it is of, if any. Only what a search begins with counts.

    Returns:
        The state, and what its first runs follow.

    Raises:
        SettingError: The folder holds another search.
        OSError: What it began with is damaged, and the model as given is not that.
    """
    search, given, checksum = decided(lambda: _first(folder, identity, state, recipe))
    return (state if given else read_state(folder / _FIRST, checksum)), f"{search}/"


def _first(folder: Path, identity: Mapping[str, Any], state: State, recipe: str | None) -> tuple[str, bool, str]:
    """The search's name, whether it began with the state as given, and that state's checksum; now all in the folder."""
    record, start = folder / _IDENTITY, folder / _FIRST
    lost = None
    try:
        stored = read_record(record)
    except DamagedError as error:
        stored, lost = None, str(error)
    if stored is None:
        return _begin_again(folder, identity, recipe, state, lost)
    found, search = stored
    changed = [key for key in identity if found.get(key) != identity[key]]
    if changed:
        told = "; ".join(f"{k}: {found.get(k)} there, {identity[k]} now" for k in changed if k != "tensors")
        raise SettingError(
            f"{folder} holds another search ({told or 'its tensors differ'}); "
            "create the pruner with the settings it began with, or give it another folder"
        )
    checksum = found["began"]["start"]
    try:
        check_whole(start, checksum)
    except DamagedError as error:
        if _checksum(state) != checksum:
            raise OSError(f"{error}, and the model as given is not known to be the one {_ANEW}") from error
        warn(f"{error}; it is written again: the model as given is the same")
        write_state(start, state)
    return search, False, checksum


def _begin_again(
    folder: Path, identity: Mapping[str, Any], recipe: str | None, state: State, lost: str | None
) -> tuple[str, bool, str]:
    """Begin a search; where its runs are there and its record is not, only if it is the search that they are of."""
    record, start = folder / _IDENTITY, folder / _FIRST

    def began(checksum: str) -> dict[str, Any]:
        return {**identity, "began": {"start": checksum, "recipe": recipe}}

    given = True
    if any(folder.glob(f"round_*/{RECORD}")):
        lost = lost or f"{record} is missing"
        searches = {*map(_search_of, folder.glob(f"*/{RECORD}"))}
        given = not (start.is_file() and seal(began(sha256(start))) in searches)
        if given and seal(began(_checksum(state))) not in searches:
            raise OSError(f"{lost}, and the finished runs beside it are not known to be of the search {_ANEW}")
    if given:
        write_state(start, state)
    if lost is not None:
        warn(f"{lost}; it is written again")
    found = began(sha256(start))
    write_record(record, found)
    return seal(found), given, found["began"]["start"]


def _checksum(state: State) -> str:
    """SHA-256 of the file that this state would be."""
    return hashlib.sha256(safetensors.torch.save(dict(state))).hexdigest()


def _search_of(record: Path) -> str:
    """The search that the run of a record is of, as far as the record says."""
    try:
        found = read_run_record(record.parent)
        return "" if found is None else search_of(follows_of(found))
    except OSError:
        return ""


def first_state(folder: Path, names: Iterable[str]) -> Lazy:
    """The state that a folder's search began with, in the order of these names, each tensor read when it is wanted."""
    stored = stored_state(folder / _FIRST)
    return Lazy(names, stored.__getitem__)
