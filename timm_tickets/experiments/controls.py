"""Trainings that are not part of a search: a ticket's own and its controls'; and which of them may be compared."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from accelerate.utils import parse_flag_from_env
from torch import Tensor

from ..config.parts import RetrainSettings
from ..config.recipe import CONTROLS, Recipe
from ..data.datasets import Data
from ..distributed.cards import sharing
from ..distributed.processes import apart, decided, groups_of, wait_for_others
from ..pruning.registry import get_method, trained_before
from ..pruning.round import Parallel
from ..pruning.run import Place, Run
from ..pruning.run_end import End, plain_metrics
from ..pruning.run_files import read_run_record, replayed, write_run
from ..pruning.training import Training
from ..sparse.pretrained import Pretrained
from ..sparse.subnet import Subnet
from ..storage.files import appearing
from ..tickets.ticket import Ticket
from ..training.trainer import Trainer
from ..tweaks.registry import create_tweaks
from .report import RichProgress, counted
from .run_folder import experiment_of


def asked_parallel(recipe: Recipe) -> Parallel:
    """The recipe's; where processes share cards they have no training together, so `auto` is `runs`."""
    if recipe.parallel == "auto" and sharing() is not None:
        return "runs"
    return recipe.parallel


def groups_apart(recipe: Recipe) -> tuple[int, int]:
    """Number of this process's group, and how many may carry out experiments of their own; 1 where all share each."""
    # What spans the processes is only handed out where that is asked for, as the runs of one search are.
    spans = recipe.training.sync_bn or parse_flag_from_env("ACCELERATE_USE_FSDP")
    parallel = asked_parallel(recipe)
    if parallel == "data" or (parallel == "auto" and spans):
        return 0, 1
    return groups_of(recipe.processes_per_run)


class Trainers:
    """The trainer that all processes share, and the one that each group has for itself; built when first wanted.

    Attributes:
        parallel: What the processes share, as asked.
        groups: How many groups trainings may be handed out to.
    """

    def __init__(self, recipe: Recipe, model: Any, data: Data):
        self.recipe, self.model, self.data = recipe, model, data
        self._kind: bool | None = None
        self.parallel: Parallel = asked_parallel(recipe)
        self.groups = 1 if self.parallel == "data" else groups_of(recipe.processes_per_run)[1]

    def of(self, by_itself: bool) -> Trainer:
        """The one of these kinds; only the one used last is kept."""
        by_itself = by_itself and self.groups > 1
        if self._kind is not by_itself:
            with apart(self.recipe.processes_per_run if by_itself else None):
                self._kind, self._trainer = by_itself, Trainer(self.recipe, self.model, self.data)
        return self._trainer


@dataclass(frozen=True)
class Controls:
    """Trains what is not part of a search: a ticket and its controls, independent of one another.

    `processes` is how many carry out each, while others carry out others; None where all of them carry out all.
    `epochs` is how long each is trained, or was in the search where it is only scored. `follows` is what a search's
    runs were followed by; None where there is no search.
    """

    folder: Path
    trainer: Trainer
    subnet: Subnet
    progress: RichProgress
    metadata: dict[str, Any]
    epochs: int
    retrain: RetrainSettings = field(default_factory=RetrainSettings)
    pretrained: Pretrained | None = None
    processes: int | None = None
    follows: str | None = None

    def train(self, name: str, *args: Any, by: int = 0, **kwargs: Any) -> None:
        """As `_train`; where groups work apart, the one of this number does it, and `ended` waits for it."""
        mine, groups = (0, 1) if self.processes is None else groups_of(self.processes)
        if mine == by % groups:
            with apart(self.processes):
                self._train(name, *args, **kwargs)

    def ended(self, *names: str) -> list[dict[str, Any]]:
        """The metrics of these trainings, once every process has ended its own."""
        wait_for_others()
        read = partial(read_run_record, lineage=[self._follows()])
        return [appearing(self.folder / name, read)["metrics"] for name in names]

    def _follows(self) -> str | None:
        return self.follows or experiment_of(self.folder)

    def _train(
        self,
        name: str,
        masks: Mapping[str, Tensor],
        start: Mapping[str, Tensor],
        index: int,
        round: int = 0,
        start_epoch: float = 0.0,
        train: bool = True,
    ) -> None:
        """Train these masks from this start into the folder of this name, or only score them; skip what is finished."""
        where = self.folder / name
        follows = decided(self._follows)
        if replayed(where, follows) is not None:
            self.progress.say(f"{name} is finished; skipped")
            return
        self.subnet.set_mask_(masks)
        self.subnet.load_(start)
        place = Place(name, index, round, follows=follows)
        run = Training(Run(self.epochs), self.subnet, place, start_epoch=start_epoch)
        if train:
            if self.retrain.tweaks:
                run.tweaks = create_tweaks(self.subnet.model, self.retrain.tweaks)
                run.metrics |= {"tweaks": list(self.retrain.tweaks), "sparsity_tweaked": run.tweaks.sparsity(masks)}
            self.trainer.fit(run, where, self.progress)
            end = run.finish_()
        else:
            self.trainer.score(run)
            state = self.subnet.state()
            end = End(state, masks, metrics=plain_metrics(run.metrics))
        self.progress.end(run)
        ticket = Ticket.from_state(start, masks, self.metadata)
        write_run(where, run, end, replace(ticket, pretrained=self.pretrained))


def lacking(recipe: Recipe, rows: list[dict[str, Any]]) -> list[str]:
    """The controls of a recipe that a finished search has not trained."""
    there = {row["name"] for row in rows}
    if control_of(rows[:-1], recipe.ticket_epochs, True)[0] is not None:
        there.add("dense")
        if weights_trained(recipe, rows[:-1]) == recipe.ticket_epochs:
            there.add("equal_epochs")
    return [name for name in recipe.controls if name not in there]


def weights_trained(recipe: Recipe, rows: Sequence[dict[str, Any]]) -> int:
    """Epochs that the weights of a search's ticket are trained for in all, its own training among them.

    Args:
        recipe: The recipe.
        rows: The trainings but the ticket's own.
    """
    own = 0 if get_method(recipe.pruner["name"]).ends_trained else recipe.ticket_epochs
    runs = {row["round"]: (row["epochs"], row["steps"]) for row in rows if row["steps"] and row["name"] not in CONTROLS}
    return own + trained_before(recipe.pruner, [*runs.values()])


def control_of(rows: list[dict[str, Any]], epochs: int, wanted: bool) -> tuple[dict[str, Any] | None, str]:
    """The dense network's record, if it was trained as long as the ticket; else why there is none to compare with."""
    plain = (row for row in rows if not row["gated"] and not row.get("penalised"))  # older records do not say
    dense = [row for row in plain if row["all_images"] and row["sparsity"] == 0]
    for row in dense:
        if row["epochs"] == epochs:
            return row, ""
    if not dense:
        return None, ""
    mend = "--restart trains one as long" if wanted else "with controls=[dense], one is trained as long"
    return None, (
        f"no dense network to compare with: {dense[0]['name']} was trained for {counted(dense[0]['epochs'])}, the "
        f"ticket for {counted(epochs)}; {mend}"
    )
