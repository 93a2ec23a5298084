"""Pruner: an iterator over the training runs a method wants, ending with a ticket.

A method is one file under methods/: a frozen dataclass of settings and one generator, `Method.search`, that yields
rounds (lists of independent `Run`s) and receives what each run ended with. It never trains and never sees a device or
a process rank. Whoever iterates the pruner trains.

Resuming is replay: a pruner with a folder writes down what each run ended with; another one with the same settings and
folder feeds these ends to the generator and yields only the runs that are missing.
"""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from .files import is_writer, read_json, read_state, write_json, write_state
from .masks import Masks, collapsed, keep_count, layer_sparsities, prunable_names, sparsity, total
from .method import Method
from .run import End, Run
from .settings import SettingError
from .subnet import State, Subnet
from .ticket import Ticket, describe_model, load_ticket

# A trainer's checkpoint within a run; it stays until the run is written down.
CHECKPOINT = "checkpoint.pt"


class Pruner(Iterator[Run]):
    """A method bound to a model: iterate it for the runs to train, read `ticket` at the end.

    Args:
        method: The method and its settings.
        model: The model to prune, in place; plain, or wrapped by DDP or ``torch.compile``.
        folder: Where to write down what each run ended with; runs found there are replayed, not asked for again.

    Attributes:
        subnet: The model with its mask and rewind point.
        first_state: The state dict the search began with, once it has begun.
        replayed: Names of the runs that were read from the folder instead of trained.
        runs_done: Runs that have ended, replayed ones included.
        rounds_done: Rounds that have ended.
        trained_dense: Whether a run trained the whole network on everything.
    """

    def __init__(self, method: Method, model: nn.Module, folder: str | Path | None = None):
        self.method = method
        self.subnet = Subnet(model, prunable_names(model, method.include, method.exclude, method.classifier))
        keep_count(total(self.subnet.mask), method.sparsity)  # refused now, not after the first training
        method.prepare_(self.subnet)
        self.folder = None if folder is None else Path(folder)
        self.replayed: list[str] = []
        self.runs_done = self.rounds_done = 0
        self.trained_dense = False
        self.metadata: dict[str, Any] = {
            "model": describe_model(self.subnet.model),
            "pruner": method.described(),
        }
        self.first_state: State = {}
        self._start_epoch = 0.0
        self._collapsed: list[str] = []
        self._failure: BaseException | None = None
        self._waiting: Run | None = None
        self._runs = self._generate()

    @property
    def runs(self) -> int | None:
        """How many runs the whole search has, where the method knows."""
        return self.method.runs(self.subnet)

    @property
    def sparsity(self) -> float:
        """Sparsity of the present mask: at the end, the ticket's."""
        self._start()
        return self.subnet.sparsity

    @property
    def ticket(self) -> Ticket:
        """The ticket: at the end of the search the one that was asked for, before it the one the mask now gives."""
        self._start()
        assert self.subnet.start is not None
        return self._ticket(self.subnet.mask, self.subnet.start, self._start_epoch)

    def __next__(self) -> Run:
        if self._waiting is not None:
            run, self._waiting = self._waiting, None
            return run
        self._fail_again()
        try:
            return next(self._runs)
        except StopIteration:
            raise
        except BaseException as error:
            self._failure = error
            raise

    def _start(self) -> None:
        # A pruner without runs has its ticket without being iterated.
        self._fail_again()
        if self.subnet.start is None:
            self._waiting = next(self, None)

    def _fail_again(self) -> None:
        # A generator that has raised is exhausted: without this the next call would look like the end of the search.
        if self._failure is not None:
            raise RuntimeError("the search stopped at an error; create the pruner again to go on") from self._failure

    def _generate(self) -> Iterator[Run]:
        subnet = self.subnet
        subnet.start = self.first_state = self._first_state()
        subnet.load_(subnet.start)
        search = self.method.search(subnet)
        ends: list[End] | None = None
        while True:
            try:
                requests = search.send(ends)  # pyright: ignore[reportArgumentType]
            except StopIteration:
                requests = None
            self._check_layers()
            if requests is None:
                return
            base = subnet.state() if len(requests) > 1 else None
            scores = subnet.scores()
            mask = subnet.mask
            ends = []
            for part, run in enumerate(requests):
                run.subnet, run.index, run.round, run.part = subnet, self.runs_done, self.rounds_done, part
                run.name = f"round_{run.round:02d}" + (f"_part_{part}" if base else "")
                run.epochs = run.epochs or self.method.epochs
                run.seed = self.method.seed
                run.start_epoch = self._start_epoch if run.from_rewind else 0.0
                end = self._read(run)
                if end is None:
                    if base is not None:
                        subnet.set_mask_(mask)
                        subnet.load_(base)
                        subnet.load_scores_(scores)
                    run.begin_()
                    yield run
                    end = run.finish_()
                    self._write(run, end)
                else:
                    subnet.set_mask_(end.mask)
                    subnet.load_(end.state)
                    subnet.load_scores_(end.scores)
                    self.replayed.append(run.name)
                ends.append(end)
                self.trained_dense |= run.whole and sparsity(end.mask) == 0
                self.runs_done += 1
            if ends[0].rewind is not None:
                self._start_epoch = ends[0].rewind_epoch
            self.rounds_done += 1

    def _check_layers(self) -> None:
        """Report layers that the search has pruned to nothing, each once; refuse them where `collapse` says so.

        Here, between the rounds and at the end: every method passes by. A mask that is still being learned is not
        judged: it may empty a layer at one step and fill it at the next.

        Raises:
            SettingError: A layer is empty, and ``collapse`` is not ``warn``.
        """
        if self.subnet.gates:
            return
        empty = collapsed(self.subnet.mask)
        new = [name for name in empty if name not in self._collapsed]
        self._collapsed += new
        if not new:
            return
        told = f"{len(empty)} of {len(self.subnet.names)} layers are pruned to nothing: {', '.join(empty[:8])}"
        told += f" and {len(empty) - 8} more" if len(empty) > 8 else ""
        if self.method.collapse == "warn":
            hint = "nothing passes through them. collapse=prevent keeps the best weight of each, collapse=error stops"
            warnings.warn(f"{self.method.name}: {told}; {hint}", stacklevel=4)
            return
        raise SettingError(
            f"collapse: {told}; lower the sparsity, choose scope=layerwise, leave these layers out with exclude, or "
            "set collapse=prevent or warn"
        )

    def _first_state(self) -> State:
        """The model as given; with a folder, as it was given the first time.

        Raises:
            SettingError: The folder belongs to a search with other settings, or of another model.
        """
        state = self.subnet.state()
        if self.folder is None:
            return state
        shapes = {name: list(value.shape) for name, value in state.items()}
        identity = {**self.method.described(), "model": self.metadata["model"]["architecture"], "tensors": shapes}
        found = read_json(self.folder / "pruner.json")
        if found is not None:
            changed = [key for key in identity if found.get(key) != identity[key]]
            if changed:
                told = "; ".join(f"{k}: {found.get(k)} there, {identity[k]} now" for k in changed if k != "tensors")
                raise SettingError(
                    f"{self.folder} holds another search ({told or 'its tensors differ'}); "
                    "create the pruner with the settings it began with, or give it another folder"
                )
            return read_state(self.folder / "start.safetensors")
        if is_writer():
            write_state(self.folder / "start.safetensors", state)
            write_json(self.folder / "pruner.json", identity)
        return state

    def _read(self, run: Run) -> End | None:
        if self.folder is None:
            return None
        folder = self.folder / run.name
        record = read_json(folder / "run.json")
        if record is None:
            return None
        rewind = folder / "rewind.safetensors"
        baked = read_state(folder / "model.safetensors")
        return End(
            state=baked | (read_state(folder / "ungated.safetensors") if record["gated"] else {}),
            baked=baked,
            mask=load_ticket(folder / f"{run.name}.ticket").masks,
            scores=read_state(folder / "scores.safetensors") if record["scores"] else {},
            rewind=read_state(rewind) if record["rewind"] else None,
            rewind_epoch=record["rewind_epoch"],
            metrics=record["metrics"],
        )

    def _write(self, run: Run, end: End) -> None:
        if self.folder is None:
            return
        start = self.subnet.start if end.rewind is None else end.rewind
        assert start is not None
        ticket = self._ticket(end.mask, start, end.rewind_epoch or self._start_epoch)
        write_run(self.folder / run.name, run, end, ticket)

    def _ticket(self, mask: Masks, start: State, start_epoch: float) -> Ticket:
        counts = {name: int(layer.sum()) for name, layer in mask.items()}
        facts = {"sparsity": sparsity(mask), "kept": counts, "start_epoch": start_epoch, "notes": self.subnet.notes}
        return Ticket.from_state(self.subnet.masked(start, mask), mask, {**self.metadata, **facts})


def write_run(folder: Path, run: Run, end: End, ticket: Ticket) -> None:
    """Write down a finished run; ``run.json`` last, as the sign that its folder is whole."""
    if not is_writer():
        return
    ticket.metadata["metrics"] = end.metrics
    ticket.save(folder / f"{run.name}.ticket")
    write_state(folder / "model.safetensors", end.baked)
    gated = {name: end.state[name] for name in end.mask} if end.baked is not end.state else {}
    if gated:
        write_state(folder / "ungated.safetensors", gated)
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
        "gated": bool(gated),
        "rewind": end.rewind is not None,
        "rewind_epoch": end.rewind_epoch,
        "metrics": end.metrics,
    }
    write_json(folder / "run.json", record)
    (folder / CHECKPOINT).unlink(missing_ok=True)
