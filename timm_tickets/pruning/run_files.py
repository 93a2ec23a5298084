"""The files that a finished run leaves in its folder, read again by whoever continues its search.

Each ``run.json`` holds its own checksum, those of the run's other files, and what the run `follows`: its search, and a
digest of what the runs before it ended with. So a run that is damaged, of another search, or trained after other runs
than those that are there now, is noticed and done again.
"""

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from torch import Tensor

from ..core.masks import layer_sparsities, sparsity
from ..core.states import State, digest
from ..core.warn import warn
from ..distributed.processes import decided
from ..storage.checkpoint_file import CHECKPOINT, remove_checkpoints
from ..storage.files import (
    DamagedError,
    appearing,
    check_whole,
    is_writer,
    read_record,
    read_state,
    remove_temporaries,
    sha256,
    write_record,
    write_state,
)
from ..tickets.ticket import Ticket, load_ticket
from .run_end import End
from .training import Training

RECORD = "run.json"


def following(follows: str | None, ends: Sequence[str | None]) -> str:
    """What runs follow that come after these: the search, and a digest of what all runs before them ended with.

    Args:
        follows: What those runs followed.
        ends: Digests of what they ended with, in their order; None for those that this process has not written.
    """
    search, _, before = (follows or "/").partition("/")
    return f"{search}/{hashlib.sha256(json.dumps([before, *ends]).encode()).hexdigest()}"


def write_run(folder: Path, run: Training, end: End, ticket: Ticket, baked: Mapping[str, Tensor] | None = None) -> None:
    """Write down a finished run; ``run.json`` last, as the sign that its folder is whole.

    Args:
        folder: The run's own.
        run: The run.
        end: What it ended with; it gets the digest of that.
        ticket: Its ticket.
        baked: Behind gates, the state dict of the plain sparse model that the end stands for.
    """
    if not is_writer():
        return
    remove_temporaries(folder)
    ticket.metadata["metrics"] = end.metrics
    ticket.save(folder / f"{run.name}.ticket")
    # Where these are made as they are read, one after the other is there.
    write_state(folder / "model.safetensors", end.state if baked is None else baked)
    if baked is not None:
        write_state(folder / "ungated.safetensors", end.weights)
    if end.scores:
        write_state(folder / "scores.safetensors", end.scores)
    if end.rewind is not None:
        write_state(folder / "rewind.safetensors", end.rewind)
    layers = layer_sparsities(end.mask)
    record: dict[str, Any] = {
        "name": run.name,
        "index": run.index,
        "round": run.round,
        "part": run.part,
        "classes": None if run.classes is None else list(run.classes),
        "sparsity": sparsity(end.mask),
        "layer_min": min(layers.values()),
        "layer_max": max(layers.values()),
        "epochs": run.schedule_epochs,
        "all_images": run.all_images,
        "steps": run.step,
        "scored": not run.reads_only,
        "scores": bool(end.scores),
        "gated": baked is not None,
        "penalised": run.request.penalised,
        "rewind": end.rewind is not None,
        "rewind_epoch": end.rewind_epoch,
        "metrics": end.metrics,
    }
    files = {name: sha256(folder / name) for name in _names(record)}
    record["whole"] = {"follows": run.place.follows, "mask": digest(end.mask), "files": files}
    end.digest = _digest(record)
    write_record(folder / RECORD, record)
    remove_checkpoints(folder)  # a trainer's; they stay until the run is written down


def _names(record: Mapping[str, Any]) -> list[str]:
    """The files of a run; those that its digest is of come after the first, which holds times and versions too."""
    more = {"ungated": record["gated"], "scores": record["scores"], "rewind": record["rewind"]}
    return [f"{record['name']}.ticket", *(f"{name}.safetensors" for name in ("model", *more) if more.get(name, True))]


def _digest(record: Mapping[str, Any]) -> str:
    """What a run ended with, as far as later runs depend on it: not how long it took."""
    whole = record["whole"]
    ended = [whole["mask"], record["rewind_epoch"], *(whole["files"][name] for name in _names(record)[1:])]
    return hashlib.sha256(json.dumps(ended).encode()).hexdigest()


def follows_of(record: Mapping[str, Any]) -> str | None:
    """What the run of a record follows, as `Place.follows`."""
    return record["whole"]["follows"]


def search_of(follows: str | None) -> str:
    """The search in what a run follows."""
    return (follows or "").partition("/")[0]


class _Whole(BaseModel):
    follows: str | None
    mask: str
    files: dict[str, str]


class Row(BaseModel):
    """What has to be in a run's record for those who show it."""

    name: str
    round: int
    part: int
    epochs: int
    all_images: bool
    sparsity: float
    layer_min: float
    layer_max: float
    steps: int
    scored: bool
    scores: bool
    gated: bool
    rewind: bool
    rewind_epoch: float
    metrics: dict[str, Any]


class _Record(Row):
    """What has to be in a run's record for those who go on from it."""

    whole: _Whole


def read_run_record(folder: Path, lineage: Collection[str | None] | None = None) -> dict[str, Any] | None:
    """The record of the run of this folder; None where it has not ended.

    Args:
        folder: The run's own.
        lineage: What it may follow; anything where None.

    Raises:
        DamagedError: It is damaged, another run's, or follows something else.
        OSError: It cannot be read.
    """
    path = folder / RECORD
    if (found := read_record(path)) is None:
        return None
    record, _ = found
    try:
        _Record.model_validate(record, strict=True)
    except ValidationError as error:
        raise DamagedError(f"{path} is damaged (it is no record of a run)") from error
    if record["name"] != folder.name:
        raise DamagedError(f"{path} is of another run ({record['name'][:40]!r})")
    follows = follows_of(record)
    if lineage is not None and follows not in lineage:
        ours = search_of(follows) in map(search_of, lineage)
        other = "was written after other runs than those that are now before it" if ours else "is of another search"
        raise DamagedError(f"{path} {other}")
    return record


def read_run(folder: Path, follows: str | None) -> End | None:
    """What the run of this folder ended with; None where it has not ended.

    Args:
        folder: The run's own.
        follows: What it has to follow.

    Raises:
        DamagedError: A file of it is damaged or missing, or it follows something else.
        OSError: A file cannot be read.
        TicketError: Its ticket is whole and cannot be read: pretrained weights that it needs are not there.
    """
    record = read_run_record(folder, [follows])
    if record is None:
        return None
    checksums: dict[str, str] = record["whole"]["files"]
    if checksums.keys() != {*_names(record)}:
        raise DamagedError(f"{folder / RECORD} is damaged (it does not name the run's files)")

    def state(name: str) -> State:
        return read_state(folder / f"{name}.safetensors", checksums[f"{name}.safetensors"])

    ticket = folder / f"{folder.name}.ticket"
    check_whole(ticket, checksums[ticket.name])
    return End(
        state=state("model") | (state("ungated") if record["gated"] else {}),
        mask=load_ticket(ticket).masks,
        scores=state("scores") if record["scores"] else {},
        rewind=state("rewind") if record["rewind"] else None,
        rewind_epoch=record["rewind_epoch"],
        metrics=record["metrics"],
        digest=_digest(record),
    )


def replayed(folder: Path, follows: str | None) -> End | None:
    """As `read_run`; but a run that is damaged is told and counts as one that has not ended.

    Every process that is to train the run has to call it: the first of them decides.
    """
    end: End | None = None

    def whole() -> bool:
        nonlocal end
        try:
            end = read_run(folder, follows)
        except DamagedError as error:
            warn(f"{error}; {folder.name} is done again")
            (folder / RECORD).unlink(missing_ok=True)  # first of all: what is written next is not of this record
        else:
            if end is None and (folder / f"{folder.name}.ticket").exists() and not (folder / CHECKPOINT).exists():
                warn(f"{folder / RECORD} is missing; {folder.name} is done again")
        return end is not None

    return appearing_run(folder, follows) if decided(whole) and end is None else end


def appearing_run(folder: Path, follows: str | None) -> End:
    """As `read_run`, of a run that another process has read or written: waited for.

    Raises:
        OSError: It does not appear, or stays damaged.
    """
    return appearing(folder, lambda folder: read_run(folder, follows))
