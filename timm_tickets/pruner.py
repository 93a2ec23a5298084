"""Pruner: an iterator over the training runs a method wants, ending with a ticket.

A method is one file under methods/: a frozen dataclass of settings and one generator, `Method.search`, that yields
rounds (lists of independent `Run`s) and receives what each run ended with. It never trains and never sees a device or
a process rank. Whoever iterates the pruner trains.

Resuming is replay: a pruner with a folder writes down what each run ended with; another one with the same settings and
folder feeds these ends to the generator and yields only the runs that are missing.
"""

from collections.abc import Generator, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from .began import begun, first_state
from .end import End
from .files import is_writer
from .masks import Masks, collapsed, keep_count, sparsity, total
from .method import Method
from .processes import apart, from_first, groups_of, wait_for_others, world_size
from .prunable import prunable_names
from .run import Run
from .run_files import appearing_run, following, replayed, write_run
from .settings import SettingError
from .sharded import local, reshard_
from .starts import Pretrained, cached_pretrained, digest
from .subnet import State, Subnet, sharing
from .ticket import Ticket, describe_model
from .warn import warn
from .wrappers import check_same_everywhere, share_

Parallel = Literal["runs", "data", "auto"]


class Pruner(Iterator[Run]):
    """A method bound to a model: iterate it for the runs to train, read `ticket` at the end.

    Args:
        method: The method and its settings.
        model: The model to prune, in place; plain, or wrapped by DDP or ``torch.compile``.
        folder: Where to write down what each run ended with; runs found there are replayed, not asked for again.

    Attributes:
        subnet: The model with its mask and rewind point.
        replayed: Names of the runs that were read from the folder instead of trained.
        runs_done: Runs that have ended, replayed ones included.
        rounds_done: Rounds that have ended.
        trained_dense: Whether a run trained the whole network on everything.
        run: The run that was asked for last and has not ended; None before the first and after the last.
        parallel: Set it before iterating. Under several processes, ``runs`` asks each of them for its own runs of a
            round only (train each within `processes.apart`, given `Run.processes`) and gathers the ends through the
            folder, which all have to see; ``data`` asks every process for every run, to train it together; ``auto``
            does the first for rounds of several runs, the second for others.
        processes_per_run: Set it before iterating, too: how many processes, neighbours by number, are asked for the
            same run where runs are handed out, to train it together. The number of processes has to be a multiple.
        handed_out: Whether runs of a round went to different processes.
        lineage: What the runs of each round follow, as `Run.follows`, and at the end what comes after the last.
    """

    def __init__(self, method: Method, model: nn.Module, folder: str | Path | None = None):
        self.method = method
        self.subnet = Subnet(model, prunable_names(model, method.include, method.exclude, method.classifier))
        keep_count(total(self.subnet.mask), method.sparsity)  # refused now, not after the first training
        described = describe_model(self.subnet.model)  # before gates hide the stem's weight
        method.prepare_(self.subnet)
        self.folder = None if folder is None else Path(folder)
        self.replayed: list[str] = []
        self.runs_done = self.rounds_done = 0
        self.trained_dense = False
        self.run: Run | None = None
        self.parallel: Parallel = "data"
        self.processes_per_run = 1
        self.handed_out = False
        self.lineage: list[str | None] = [None]
        self.metadata: dict[str, Any] = {
            "model": described,
            "pruner": method.described(),
        }
        self._begun = self._ended = False
        self._looked, self._pretrained = False, None
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
        """The ticket: at the end of the search the one that was asked for, before it the one the mask now gives.

        At the end the subnet's rewind point becomes its values, zero where pruned, and its masks are the subnet's;
        before, they are copies. Under FSDP2 every process has to ask.

        Raises:
            RuntimeError: The search ended without a rewind point.
        """
        self._start()
        subnet, start = self.subnet, self.subnet.start
        if not self._ended:
            start = subnet.baked_state() if start is None else start
            ticket = self._ticket(subnet.mask, start, subnet.start_epoch)
            return replace(
                Ticket.from_state(ticket.values, ticket.masks, ticket.metadata), pretrained=ticket.pretrained
            )
        if start is None:
            raise RuntimeError(
                f"{self.method.name} ended without a rewind point, so its ticket has no values; a method that ends "
                "trained has to call `subnet.restart_()` at the end of its search"
            )
        # Nobody will rewind to what is pruned now: the start itself becomes the ticket, which is as large.
        values = subnet.masked(start, subnet.mask)
        live = {_memory(value) for value in map(local, subnet.model.state_dict().values()) if value.is_cpu}
        for name in start:
            if _memory(start[name]) in live:  # a method has made the model's own tensors the start
                start[name] = values[name].clone()
            else:
                start[name].copy_(values[name])
        return replace(self._ticket(subnet.mask, start, subnet.start_epoch), values=dict(start))

    @property
    def first_state(self) -> Mapping[str, Tensor]:
        """The state dict the search began with, from its folder, a tensor at a time.

        Raises:
            SettingError: It has no folder; the search keeps no copy that it does not need.
        """
        if self.folder is None:
            raise SettingError("folder: the first state is kept there; create the pruner with one, or copy the model")
        if not self._begun:
            self._start()
        return first_state(self.folder, self._shapes)

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

    def mask_(self, other: nn.Module) -> None:
        """Zero in another copy of the model, such as its moving average, what is pruned now.

        Call it before the copy is used or saved: an average that began before its model was pruned keeps a residue of
        the pruned weights.

        Args:
            other: A model of the same architecture, wrapped or not.
        """
        self._start()
        self.subnet.mask_(other)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint within a run must hold besides model and optimizer: tensors and primitives.

        This and `load_state_dict` are what ``Accelerator.register_for_checkpointing`` wants. Finished runs are not in
        it; they are in the folder.

        Raises:
            SettingError: The search has several runs and no folder.
        """
        if self.run is None:
            return {"run": None}
        if self.folder is None and self.runs != 1:
            raise SettingError(
                f"folder: a checkpoint of {self.method.name} holds only the run that is being trained; create the "
                "pruner with a folder, where those before it are written down"
            )
        start = self.subnet.start if self.folder is None else None
        return {"run": self.run.name, "start": start, "progress": self.run.progress_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on within a run; after `Run.attach`, which clears the optimizer, and with the model's state loaded.

        Raises:
            RuntimeError: No run is attached.
            ValueError: The checkpoint is of another run than the one asked for.
        """
        if state["run"] is None:
            return
        if self.run is None or self.run.optimizer is None:
            raise RuntimeError(
                "the checkpoint is from within a run, and none is attached; load it inside `for run in pruner:`, "
                "after `run.attach(optimizer)`"
            )
        if state["run"] != self.run.name:
            raise ValueError(
                f"the checkpoint is from within {state['run']}, the search is at {self.run.name}; load the checkpoint "
                "of that run, or none to train it from its beginning, and use the folder of that search"
            )
        if state["start"] is not None:
            self.subnet.start = state["start"]
        self.run.load_progress_(state["progress"])

    def record_(self) -> None:
        """Write down the present run as it is now, for a later process to go on from; this one may train it on."""
        if self.run is not None:
            self._write(self.run, self.run.end())

    def _start(self) -> None:
        # A pruner without runs has its ticket without being iterated.
        self._fail_again()
        if not self._begun:
            self._waiting = next(self, None)

    def _fail_again(self) -> None:
        # A generator that has raised is exhausted: without this the next call would look like the end of the search.
        if self._failure is not None:
            raise RuntimeError("the search stopped at an error; create the pruner again to go on") from self._failure

    def _generate(self) -> Iterator[Run]:
        subnet = self.subnet
        split = reshard_(subnet.model)
        if not split:  # timm's train.py seeds each process by its number, and DDP evens that out only afterwards
            share_(subnet.model.state_dict().values())
        else:
            refuse_split(self.method)
        self._begin_()
        search = self.method.search(subnet)
        ends: list[End] | None = None
        while True:
            try:
                requests = search.send(ends)  # pyright: ignore[reportArgumentType]
            except StopIteration:
                requests = None
            self._check_layers()
            name = "the ticket" if requests is None else f"round {self.rounds_done}"
            _check_same(name, subnet.mask)
            if requests is None:
                self._ended = True
                return
            ends = None  # they are models: none stays while others are trained
            ends = yield from self._round(requests)
            self.rounds_done += 1

    def _check_layers(self) -> None:
        """Report layers that the search has pruned to nothing, each once; refuse them where `collapse` says so.

        Here, between the rounds and at the end: every method passes by. A mask that is still being learned is not
        judged: it may empty a layer at one step and fill it at the next.

        Raises:
            SettingError: A layer is empty, and ``collapse`` is not ``warn``.
        """
        if self.subnet.gates and not self.subnet.sealed:
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
            warn(f"{self.method.name}: {told}; {hint}")
            return
        raise SettingError(
            f"collapse: {told}; lower the sparsity, choose scope=layerwise, leave these layers out with exclude, or "
            "set collapse=prevent or warn"
        )

    def _round(self, requests: list[Run]) -> Generator[Run, None, list[End]]:
        """Ask for a round's runs, as far as they are not written down, and give what all of them ended with."""
        subnet = self.subnet
        mine, groups = (0, 1) if self.parallel == "data" else groups_of(self.processes_per_run)
        hand_out = groups > 1 and (self.parallel == "runs" or len(requests) > 1)
        if hand_out and self.folder is None:
            raise SettingError(
                "folder: runs that are handed out to several processes are gathered through one; create the pruner "
                "with a folder that all processes see, or set its parallel to 'data'"
            )
        self.handed_out |= hand_out
        mask, base, scores = {}, None, {}
        if len(requests) > 1:  # each begins where the first does
            mask, start = subnet.mask, subnet.start or {}
            shown = subnet.masked(start, {} if subnet.gates else mask)
            base, scores = sharing(subnet.present_state(), start, shown), subnet.scores()
        for part, run in enumerate(requests):
            run.subnet, run.index, run.round, run.part = subnet, self.runs_done + part, self.rounds_done, part
            if unknown := {*run.reads} - {"state", "scores"}:
                raise ValueError(f"reads: {sorted(unknown)} is no part of an end; a run may read 'state' and 'scores'")
            run.single = base is None
            run.name = f"round_{run.round:02d}" + ("" if run.single else f"_part_{part}")
            run.plan_(run.epochs or self.method.epochs, subnet.start_epoch if run.from_rewind else 0.0)
            run.seed = self.method.seed
            run.processes = self.processes_per_run if hand_out else None
            run.follows = self.lineage[-1]
        ends: dict[int, End] = {}
        for run in requests:
            if hand_out and run.part % groups != mine:
                continue
            if (end := self._read(run)) is not None:
                self._take_(end)
                self.replayed.append(run.name)
            else:
                if base is not None:
                    subnet.set_mask_(mask)
                    subnet.load_(base)
                    subnet.load_scores_(scores)
                run.begin_()
                self.run = run
                yield run
                self.run = None
                with apart(run.processes):
                    end = run.finish_()
                    _check_same(run.name, end.mask)
                    self._write(run, end)
            ends[run.part] = end.keep_(run.reads)
            self._count(run, end)
        if hand_out:
            wait_for_others()
            for run in requests:
                if run.part not in ends:
                    assert self.folder is not None
                    end = appearing_run(self.folder / run.name, run.follows)
                    if run is requests[-1]:
                        self._take_(end)  # where one process that trains them all would be
                    ends[run.part] = end.keep_(run.reads)
                    self._count(run, end)
        if ends[0].rewind is not None:
            subnet.start_epoch = ends[0].rewind_epoch
            subnet.start = ends[0].rewind if base is None else subnet.start
        if self.folder is not None:  # only who has written a run down knows the digest of its end
            after = following(self.lineage[-1], [ends[run.part].digest for run in requests])
            self.lineage.append(from_first(after))
        return [ends[run.part] for run in requests]

    def _count(self, run: Run, end: End) -> None:
        self.runs_done += 1
        self.trained_dense |= run.all_images and sparsity(end.mask) == 0

    def _take_(self, end: End) -> None:
        """Bring the model to where a run has ended."""
        self.subnet.set_mask_(end.mask)
        self.subnet.load_(end.state)
        self.subnet.load_scores_(end.scores)

    def _begin_(self) -> None:
        """Bring the model to where the search begins, and keep that where the ticket is to start from it."""
        subnet, self._begun = self.subnet, True
        state = self._first_state()
        subnet.load_(state)
        self._shapes = {name: value.shape for name, value in state.items()}
        subnet.strange = {name: value.clone() for name, value in state.items() if not value.isfinite().all()}
        subnet.start = None if self.method.ends_trained else state

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
        recipe = self.metadata.get("recipe")
        recipe = recipe.get("hash") if isinstance(recipe, dict) else None
        state, first = begun(self.folder, identity, state, recipe)
        self.lineage = [first]
        return state

    def _read(self, run: Run) -> End | None:
        if self.folder is None:
            return None
        with apart(run.processes):
            return replayed(self.folder / run.name, run.follows)

    def _write(self, run: Run, end: End) -> None:
        if self.folder is None:
            return
        subnet = self.subnet
        baked = subnet.baked_state() if subnet.gates else None
        if not is_writer():  # the folder may be the writer's alone
            return
        start = end.rewind or subnet.start or self.first_state
        ticket = self._ticket(end.mask, start, end.rewind_epoch or subnet.start_epoch)
        write_run(self.folder / run.name, run, end, ticket, baked)

    def _ticket(self, mask: Masks, start: Mapping[str, Tensor], start_epoch: float) -> Ticket:
        counts = {name: int(layer.sum()) for name, layer in mask.items()}
        facts = {"sparsity": sparsity(mask), "kept": counts, "start_epoch": start_epoch, "notes": self.subnet.notes}
        origin = self.subnet.origin
        ticket = Ticket.over(
            self.subnet.masked(start, mask), mask, {**self.metadata, **facts, **({"origin": origin} if origin else {})}
        )
        ticket.pretrained = self._pretrained_start()
        return ticket

    def _pretrained_start(self) -> Pretrained | None:
        """The pretrained weights a method says it started from, if this machine has them; a search fetches nothing."""
        tag = self.subnet.origin.get("tag")
        if tag is not None and not self._looked:
            self._looked = True
            self._pretrained = cached_pretrained(tag, self._shapes)
        return self._pretrained


def refuse_split(method: Method) -> None:
    """Refuse a search on a model that FSDP2 has split, where the method cannot do with it.

    Raises:
        SettingError: It cannot.
    """
    if method.reads_gradients:
        raise SettingError(
            f"pruner: {method.name} reads gradients before `backward`, which FSDP2 does not give; search with DDP, or "
            "in one process, and train the ticket with FSDP2"
        )


def _memory(value: Tensor) -> int:
    return value.untyped_storage().data_ptr()


def _check_same(name: str, masks: Masks) -> None:
    """Stop where the processes hold different masks; one process has nothing to hash them for."""
    if world_size() > 1:
        check_same_everywhere(f"the mask of {name}", digest(masks))
