"""The files that a search and its finished runs leave in its folder, read again by whoever continues it."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from .checkpoint import remove_checkpoints
from .end import End
from .files import is_writer, read_json, read_state, stored_state, write_json, write_state
from .lazy import Lazy
from .masks import layer_sparsities, sparsity
from .run import Run
from .settings import SettingError
from .subnet import State
from .ticket import Ticket, load_ticket

_IDENTITY, _FIRST = "pruner.json", "start.safetensors"


def begun(folder: Path, identity: Mapping[str, Any], state: State) -> State:
    """The state that a folder's search began with: this one where it begins now, which is then written down.

    Args:
        folder: The search's.
        identity: What makes it this search, in JSON types.
        state: The model as given.

    Raises:
        SettingError: The folder holds another search.
    """
    found = read_json(folder / _IDENTITY)
    if found is None:
        if is_writer():
            write_state(folder / _FIRST, state)
            write_json(folder / _IDENTITY, identity)
        return state
    changed = [key for key in identity if found.get(key) != identity[key]]
    if changed:
        told = "; ".join(f"{k}: {found.get(k)} there, {identity[k]} now" for k in changed if k != "tensors")
        raise SettingError(
            f"{folder} holds another search ({told or 'its tensors differ'}); "
            "create the pruner with the settings it began with, or give it another folder"
        )
    return read_state(folder / _FIRST)


def first_state(folder: Path, names: Iterable[str]) -> Lazy:
    """The state that a folder's search began with, in the order of these names, each tensor read when it is wanted."""
    stored = stored_state(folder / _FIRST)
    return Lazy(names, stored.__getitem__)


def write_run(folder: Path, run: Run, end: End, ticket: Ticket, baked: Mapping[str, Tensor] | None = None) -> None:
    """Write down a finished run; ``run.json`` last, as the sign that its folder is whole.

    Args:
        folder: The run's own.
        run: The run.
        end: What it ended with.
        ticket: Its ticket.
        baked: Behind gates, the state dict of the plain sparse model that the end stands for.
    """
    if not is_writer():
        return
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
    record = {
        "name": run.name,
        "index": run.index,
        "round": run.round,
        "part": run.part,
        "classes": None if run.classes is None else list(run.classes),
        "sparsity": sparsity(end.mask),
        "layer_min": min(layers.values()),
        "layer_max": max(layers.values()),
        "epochs": run.schedule_epochs,
        "whole": run.whole,
        "steps": run.step,
        "scored": run.read is None,
        "scores": bool(end.scores),
        "gated": baked is not None,
        "rewind": end.rewind is not None,
        "rewind_epoch": end.rewind_epoch,
        "metrics": end.metrics,
    }
    write_json(folder / "run.json", record)
    remove_checkpoints(folder)  # a trainer's; they stay until the run is written down


def read_run(folder: Path) -> End | None:
    """What the run of this folder ended with; None where it has not ended."""
    record = read_json(folder / "run.json")
    if record is None:
        return None
    rewind = folder / "rewind.safetensors"
    state = read_state(folder / "model.safetensors")
    return End(
        state=state | (read_state(folder / "ungated.safetensors") if record["gated"] else {}),
        mask=load_ticket(folder / f"{folder.name}.ticket").masks,
        scores=read_state(folder / "scores.safetensors") if record["scores"] else {},
        rewind=read_state(rewind) if record["rewind"] else None,
        rewind_epoch=record["rewind_epoch"],
        metrics=record["metrics"],
    )
