"""Pruner: an iterator over the training runs a method wants, ending with a ticket.

A method is one file under methods/: a frozen dataclass of settings and one generator, `Method.search`, that yields
rounds (lists of independent `Run`s) and receives what each run ended with. It never trains and never sees a device or
a process rank. Whoever iterates the pruner trains.

Resuming is replay: a pruner with a folder writes down what each run ended with; another one with the same settings and
folder feeds these ends to the generator and yields only the runs that are missing.
"""

from collections.abc import Generator, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..core.errors import SettingError
from ..core.masks import sparsity
from ..core.warn import warn
from ..distributed.collectives import share_
from ..distributed.fsdp2 import reshard_
from ..distributed.processes import apart, groups_of
from ..sparse.describe import describe_model, model_name
from ..sparse.prunable import prunable_names
from ..sparse.subnet import Subnet
from ..storage.files import is_writer
from ..tickets.ticket import Ticket
from .beginning import is_begun
from .checks import EmptyLayers, check_same_masks, refuse_gated, refuse_split, tell_used, warn_of_thin_layers
from .draft import Draft
from .history import History
from .method import Method
from .round import Parallel, carried_out, handed_out, next_round, placed
from .run import Place, Run
from .run_end import End
from .training import Training


class Pruner(Iterator[Training]):
    """A method bound to a model: iterate it for the runs to train, read `ticket` at the end.

    Args:
        method: The method and its settings.
        model: The model to prune, in place; plain, or wrapped by DDP or ``torch.compile``.
        folder: Where to write down what each run ended with; runs found there are replayed, not asked for again.

    Attributes:
        subnet: The model with its mask and rewind point.
        history: What it has behind it, in its folder.
        runs_done: Runs of the rounds that have ended, replayed ones included.
        rounds_done: Rounds that have ended.
        trained_dense: Whether a run of these trained the whole network on everything, without a penalty.
        run: The run that was asked for last and has not ended; None before the first and after the last.
        parallel: Set it before iterating. Under several processes, ``runs`` asks each of them for its own runs of a
            round only (train each within `processes.apart`, given `Training.processes`) and gathers the ends through
            the folder, which all have to see; ``data`` asks every process for every run, to train it together; ``auto``
            does the first for rounds of several runs, the second for others.
        processes_per_run: Set it before iterating, too: how many processes, neighbours by number, are asked for the
            same run where runs are handed out, to train it together. The number of processes has to be a multiple.
        handed_out: Whether runs of a round went to different processes.
    """

    def __init__(self, method: Method, model: nn.Module, folder: str | Path | None = None):
        refuse_gated(model)
        self.subnet = Subnet(model, prunable_names(model, method.include, method.exclude, method.classifier))
        self.method = method = method.on(self.subnet)  # refused now, not after the first training
        described = describe_model(self.subnet.model)  # before gates hide the stem's weight
        self.history = History(None if folder is None else Path(folder))
        if self.folder is None or not is_begun(self.folder):  # else it begins with the values of then
            tell_used(self.subnet)
        method.prepare_(self.subnet)
        self._draft = Draft(self.subnet, {"model": described, "pruner": method.described()})
        self.runs_done = self.rounds_done = 0
        self.trained_dense = False
        self.run: Training | None = None
        self.parallel: Parallel = "data"
        self.processes_per_run = 1
        self.handed_out = False
        self._begun = self._ended = self._over = False
        self._empty = EmptyLayers(method)
        self._failure: BaseException | None = None
        self._waiting: Training | None = None
        self._runs = self._generate()

    def __repr__(self) -> str:
        known = "" if self.runs is None else f" of {self.runs}"
        state = f"{self.runs_done}{known} runs done"
        if self._failure is not None:
            state = f"stopped at an error in run {self.runs_done + 1}{known}"
        elif self._ended:
            state += ", ended: see its `ticket`"
        elif self.run is not None:
            state = f"run {self.run.index + 1}{known}"
        asked = f"sparsity {self.subnet.sparsity:.4f} of {self.method.sparsity:g}"
        return f"Pruner({self.method.name}, {model_name(self.subnet.model)}, {asked}, {state})"

    def __bool__(self) -> bool:
        return True  # a pruner that asks for no run is one

    def __len__(self) -> int:
        """How many runs the whole search has, those that are replayed among them.

        Raises:
            TypeError: The method does not know beforehand.
        """
        if self.runs is None:
            raise TypeError(f"len: {self.method.name} does not know beforehand how many runs it will ask for")
        return self.runs

    def __iter__(self) -> "Pruner":
        if self._over:
            warn(
                f"this {self.method.name} search has ended, and asks for no more runs: `pruner.ticket` is its ticket. "
                "For another search create the model and the pruner again"
            )
        return self

    @property
    def folder(self) -> Path | None:
        """Where what each run ended with is written down."""
        return self.history.folder

    @property
    def metadata(self) -> dict[str, Any]:
        """What goes into every ticket of the search; add to it before iterating."""
        return self._draft.metadata

    @metadata.setter
    def metadata(self, value: dict[str, Any]) -> None:
        self._draft.metadata = value

    @property
    def replayed(self) -> list[str]:
        """Names of the runs that were read from the folder instead of trained."""
        return self.history.replayed

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
        if not self._ended:
            if self._waiting is not None:
                warn(f"{self.method.name}: its search has not begun, so this is not its ticket; iterate it first")
            return self._draft.now()
        if self.subnet.start is None:
            raise RuntimeError(
                f"{self.method.name} ended without a rewind point, so its ticket has no values; a method that ends "
                "trained has to call `subnet.restart_()` at the end of its search"
            )
        return self._draft.final(self.subnet.start)

    @property
    def first_state(self) -> Mapping[str, Tensor]:
        """The state dict the search began with, from its folder, a tensor at a time.

        Raises:
            SettingError: It has no folder; the search keeps no copy that it does not need.
        """
        if self.folder is not None and not self._begun:
            self._start()
        return self.history.first_state(self._draft.shapes)

    def __next__(self) -> Training:
        if self._waiting is not None:
            run, self._waiting = self._waiting, None
            return run
        self._fail_again()
        try:
            return next(self._runs)
        except StopIteration:
            self._over = True
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
        """Go on within a run; after `Training.attach`, which clears the optimizer, and with the model's state loaded.

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
            self.subnet.set_start_(state["start"], self.subnet.start_epoch)
        self.run.load_progress_(state["progress"])

    def record_(self) -> None:
        """Write down the present run as it is now, for a later process to go on from; this one may train it on."""
        if self.run is not None:
            self._write(self.run, self.run.end())

    def _start(self) -> None:
        # A pruner without runs has its ticket without being iterated.
        self._fail_again()
        if not self._begun:
            self._waiting, self._over = next(self, None), False  # nobody has iterated it yet

    def _fail_again(self) -> None:
        # A generator that has raised is exhausted: without this the next call would look like the end of the search.
        if self._failure is not None:
            raise RuntimeError("the search stopped at an error; create the pruner again to go on") from self._failure

    def _generate(self) -> Iterator[Training]:
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
            requests = next_round(self.method.name, search, ends)
            for end in ends or ():
                end.release_()
            self._empty.check(self.subnet)
            name = "the ticket" if requests is None else f"round {self.rounds_done}"
            check_same_masks(name, subnet.mask)
            if requests is None:
                warn_of_thin_layers(self.method, subnet)
                subnet.notes += self.method.told(subnet.mask)
                self._ended = True
                return
            ends = yield from self._round(requests)
            requests = None  # they may hold a gradient of all weights, which the next round has no use for
            self.rounds_done += 1

    def _round(self, requests: list[Run]) -> Generator[Training, None, list[End]]:
        """Ask for a round's runs, as far as they are not written down, and give what all of them ended with."""
        mine, groups = (0, 1) if self.parallel == "data" else groups_of(self.processes_per_run)
        hand_out = handed_out(self.parallel, len(requests), groups, self.folder)
        self.handed_out |= hand_out
        at = Place(
            index=self.runs_done,
            round=self.rounds_done,
            processes=self.processes_per_run if hand_out else None,
            follows=self.history.lineage[-1],
        )
        runs = placed(requests, self.subnet, at, self.method.epochs, self.method.seed)
        share = (mine, groups) if hand_out else (0, 1)
        ends = yield from carried_out(runs, self.subnet, self.history, self._trained, share)
        self.runs_done += len(runs)
        self.trained_dense |= any(
            run.all_images and not run.request.penalised and sparsity(end.mask) == 0
            for run, end in zip(runs, ends, strict=True)
        )
        return ends

    def _trained(self, run: Training) -> Generator[Training, None, End]:
        """Have the user train a run; write down what it ended with."""
        run.begin_()
        self.run = run
        yield run
        self.run = None
        with apart(run.processes):
            end = run.finish_()
            check_same_masks(run.name, end.mask)
            self._write(run, end)
        return end

    def _begin_(self) -> None:
        """Bring the model to where the search begins, and keep that where the ticket is to start from it."""
        subnet, self._begun = self.subnet, True
        state = subnet.state()
        shapes = {name: list(value.shape) for name, value in state.items()}
        identity = {**self.method.described(), "model": self.metadata["model"]["architecture"], "tensors": shapes}
        recipe = self.metadata.get("recipe")
        state = self.history.begin_(identity, state, recipe.get("hash") if isinstance(recipe, dict) else None)
        subnet.load_(state)
        self._draft.shapes = {name: value.shape for name, value in state.items()}
        subnet.strange = {name: value.clone() for name, value in state.items() if not value.isfinite().all()}
        if not self.method.ends_trained:
            subnet.set_start_(state)

    def _write(self, run: Training, end: End) -> None:
        if self.folder is None:
            return
        subnet = self.subnet
        baked = subnet.baked_state() if subnet.gates else None
        if not is_writer():  # the folder may be the writer's alone
            return
        start = end.rewind or subnet.start or self.first_state
        ticket = self._draft.ticket(end.mask, start, end.rewind_epoch or subnet.start_epoch)
        self.history.write_(run, end, ticket, baked)
