"""The files that a finished run leaves in its folder, and what it ended with read from them again."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from .checkpoint import remove_checkpoints
from .files import is_writer, read_json, read_state, write_json, write_state
from .masks import layer_sparsities, sparsity
from .run import End, Run
from .ticket import Ticket, load_ticket


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
        "steps": run.step,
        "scored": run.limit is None,
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
