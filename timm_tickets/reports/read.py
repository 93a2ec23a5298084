"""What run folders hold, as far as it can be trusted: a stranger may have written them, and some are not finished."""

import csv
import io
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..config.recipe import CONTROLS, SEARCHED, Recipe, load_recipe
from ..core.errors import SettingError, shown
from ..experiments.run_folder import IMAGES, RESULT
from ..pruning.registry import get_method, trained_before
from ..pruning.run_files import RECORD, follows_of, read_run_record, search_of
from ..storage.files import DamagedError, read_bytes, read_record
from ..storage.lock import held, left_behind
from ..training.epoch_log import EPOCHS

_MOST_BYTES = 1 << 24  # of a record; one of 1,000 trainings has 1 MB
_MOST = 2_000  # trainings of a folder, and folders of a report
_NAME = rf"^({'|'.join(CONTROLS)}|ticket|native|round_\d{{1,6}}(_part_\d{{1,6}})?)$"
_INSIDE = re.compile(rf"native|{'|'.join(SEARCHED)}|seed_\d{{1,20}}")  # of a run folder: searches of their own
_DEPTH = 5  # folders between one that is given and a run folder: a leaderboard within output/ has 4

State = Literal["finished", "running", "killed", "stopped"]
Percent = Annotated[float, Field(ge=0, le=100)]
Count = Annotated[int, Field(ge=0, le=10**12)]


class _Strict(BaseModel):
    model_config = ConfigDict(allow_inf_nan=False, frozen=True)


class Metrics(_Strict):
    """What a training was scored with: percent, seconds."""

    test_top1: Percent | None = None
    val_top1: Percent | None = None
    val_top1_soft: Percent | None = None
    seconds: Annotated[float, Field(ge=0)] = 0.0


class Trained(_Strict):
    """A finished training, as its record has it."""

    name: Annotated[str, Field(pattern=_NAME)]
    round: Count = 0
    part: Count = 0
    sparsity: Annotated[float, Field(ge=0, le=1)]
    epochs: Count
    steps: Count
    all_images: bool
    gated: bool
    penalised: bool = False
    scored: bool
    metrics: Metrics

    @property
    def top1(self) -> float | None:
        """Test top-1 in percent, where it is that of a network on the whole task: no part of it, no soft mask."""
        whole = self.all_images and not self.gated and self.metrics.val_top1_soft is None
        return self.metrics.test_top1 if whole else None


@dataclass(frozen=True, eq=False)
class Experiment:
    """What one run folder holds.

    Attributes:
        folder: The run folder.
        state: ``running`` where a command holds it now; else ``finished``, ``killed`` (its last command had no time to
            say that it ended), or ``stopped``.
        kind: ``search``, ``train`` or ``transfer``; ``dense`` where the dense network alone is trained.
        of: Fingerprint of the ticket that is trained or transferred.
        recipe: Its recipe.
        images: What is in its splits; empty where that is not known.
        trained: Its finished trainings in their order.
        fingerprint: Of the final ticket.
        notes: What is wrong with it, a sentence each.
    """

    folder: Path
    state: State
    kind: str
    of: str | None
    recipe: Recipe
    images: Mapping[str, Any]
    trained: tuple[Trained, ...]
    fingerprint: str | None
    notes: list[str] = field(default_factory=list)

    @property
    def seed(self) -> int:
        return self.recipe.seed

    @property
    def control(self) -> str | None:
        """Which control of the experiment around it it is, being a search of its own; None where it is none."""
        inside = self.folder.name in SEARCHED and (self.folder.parent / "experiment.json").is_file()
        return self.folder.name if inside else None

    @property
    def target(self) -> float | None:
        """The asked sparsity, of which the reached one may differ a little; of a given ticket its own, once trained."""
        if self.kind == "search":
            return self.recipe.pruner["sparsity"]
        return None if self.final is None else round(self.final.sparsity, 4)

    @property
    def epochs(self) -> int:
        """How long its ticket is trained at the end."""
        if self.kind == "search":
            return self.recipe.ticket_epochs
        return self.recipe.retrain.epochs or self.recipe.training.epochs

    def named(self, name: str) -> Trained | None:
        return next((one for one in self.trained if one.name == name), None)

    @property
    def final(self) -> Trained | None:
        """The training of the ticket; None while there is none."""
        if self.kind == "search":
            return self.trained[-1] if self.state == "finished" and self.trained else None
        return {"train": self.named("round_00"), "transfer": self.named("ticket")}.get(self.kind)

    @property
    def dense(self) -> list[Trained]:
        """Trainings of the whole network on all images, the control first."""
        found = [one for one in self.trained if one.sparsity == 0 and not one.penalised and one.top1 is not None]
        return sorted(found, key=lambda one: one.name != "dense")

    @property
    def points(self) -> list[Trained]:
        """Sparse networks that were trained as a ticket is: of a search in rounds one a round."""
        final = self.final
        if self.kind != "search" or get_method(self.recipe.pruner["name"]).ends_trained:
            found = [final] if final is not None else []
        else:
            found = [one for one in self.searched if one.epochs == self.epochs and 0 < one.sparsity < 1]
        return [one for one in {one.sparsity: one for one in found}.values() if one.top1 is not None]

    @property
    def searched(self) -> list[Trained]:
        """What was trained to find and train the ticket: all but controls."""
        return [one for one in self.trained if one.name not in (*CONTROLS, "native")]

    @property
    def spent(self) -> float | None:
        """Epochs of all images that these trainings took, by their steps; None where no training had all images."""
        full = [one.steps / one.epochs for one in self.trained if one.all_images and one.epochs and one.steps]
        return sum(one.steps for one in self.searched) / max(full) if full else None

    @property
    def seconds(self) -> float:
        return sum(one.metrics.seconds for one in self.searched)

    @property
    def weights_trained(self) -> int | None:
        """Epochs that the ticket's weights were trained for: its own, and of runs before those that it goes on from."""
        if (final := self.final) is None or self.kind != "search":
            return None if final is None else final.epochs
        before = {one.round: (one.epochs, one.steps) for one in self.searched if one.steps and one is not final}
        trained = trained_before(self.recipe.pruner, [*before.values()])
        return trained + (final.epochs if final.steps or not trained else 0)

    @property
    def ticket(self) -> Path:
        """The file of the final ticket."""
        own = {"train": "round_00/round_00", "dense": "round_00/round_00", "transfer": "ticket/ticket"}
        return self.folder / f"{own.get(self.kind, self.recipe.name)}.ticket"

    @cached_property
    def curves(self) -> dict[str, list[tuple[int, float]]]:
        """Validation top-1 by epoch of every training, those that have not ended too."""
        found = {}
        for folder in _run_folders(self.folder):
            try:
                if rows := _curve(folder):
                    found[folder.name] = rows
            except (OSError, ValueError, KeyError, csv.Error):
                self.notes.append(f"{shown(str(folder / EPOCHS), 300)} is damaged; its curve is left out")
        return found


def read_all(folders: Iterable[Path]) -> tuple[list[Experiment], list[str]]:
    """The experiments in folders or below them, and why others are left out.

    Raises:
        SettingError: One of the folders is not there, or holds no experiment.
    """
    found, left, seen = [], [], set()
    for given in folders:
        if not given.is_dir():
            raise SettingError(
                f"folder: {shown(str(given), 300)} is no folder; give one that a search has left, or several"
            )
        places = [*islice(_experiments(given, _DEPTH, left), _MOST)]
        if not places:
            raise SettingError(
                f"folder: {shown(str(given), 300)} holds no experiment: no recipe.yaml in it or below; give "
                "the output folder of a search, train or transfer"
            )
        if len(places) == _MOST:
            left.append(f"{shown(str(given), 300)}: all but the first {_MOST:,} experiments are left out")
        for place in places:
            if place.resolve() in seen:
                continue
            seen.add(place.resolve())
            try:
                found.append(read(place))
            except (OSError, SettingError) as error:
                left.append(f"{shown(str(place), 300)} is left out: {shown(str(error), 600)}")
    return found, left


def _experiments(folder: Path, depth: int, left: list[str]) -> Iterator[Path]:
    """Folders with a recipe in them, and those within that are searches of their own: controls, and other seeds."""
    ours = any(os.path.lexists(folder / name) for name in ("recipe.yaml", "experiment.json"))
    if ours:
        yield folder
    elif not depth:
        return
    try:
        found = sorted(islice(folder.iterdir(), _MOST))
        inside = [one for one in found if (not ours or _INSIDE.fullmatch(one.name)) and not one.is_symlink()]
        inside = [one for one in inside if one.is_dir()]
    except OSError as error:
        left.append(f"{shown(str(folder), 300)}: what is in it is left out: {shown(str(error), 300)}")
        return
    for one in inside:
        yield from _experiments(one, max(0, depth - 1), left)


def read(folder: Path) -> Experiment:
    """What a run folder holds.

    Raises:
        DamagedError, SettingError: Its recipe or what says whose it is cannot be read.
    """
    bounded(folder / "recipe.yaml")
    recipe = load_recipe(folder / "recipe.yaml")
    if (stored := _record(folder / "experiment.json")) is None:
        raise DamagedError("experiment.json, which says what was done, is missing")
    told, name = str(stored[0].get("experiment")), stored[1]
    kind = re.fullmatch(r"(search|training|transfer)(?: of (?:(dense)|ticket ([0-9a-f]{64})))?(,.*)?", told)
    if kind is None:
        raise DamagedError(f"experiment.json says {shown(told, 60)!r}, which is no experiment of ours")
    notes: list[str] = []

    def known(name: str) -> dict[str, Any] | None:
        try:
            return None if (found := _record(folder / name)) is None else found[0]
        except OSError as error:
            notes.append(f"{shown(str(error), 300)}; it is left out")
            return None

    result = known(RESULT)
    if result is not None and (result.get("experiment") != name or not isinstance(result.get("rows"), list)):
        notes.append(f"{shown(str(folder / RESULT), 300)} is of another experiment; it is left out")
        result = None
    rows = [*_finished_runs(folder, name, notes)] if result is None else result["rows"]
    trained = []
    for row in rows[:_MOST]:
        try:
            one = Trained.model_validate(row)
        except ValidationError:
            said = shown(row.get("name"), 40) if isinstance(row, dict) else "one"
            notes.append(f"{shown(str(folder), 300)}: the record of {said} is damaged; it is left out")
            continue
        if one.scored and one.name not in ("native", *SEARCHED):
            trained.append(one)
    state: State = (
        "running" if held(folder) else "finished" if result else "killed" if left_behind(folder) else "stopped"
    )
    what = "dense" if kind[2] else {"training": "train"}.get(kind[1], kind[1])
    print_ = None if result is None else result.get("fingerprint")
    images = known(IMAGES) or {}
    if not images and not any(IMAGES in one for one in notes):
        notes.append(f"{shown(str(folder), 300)}: {IMAGES} is missing, so it is compared with no other folder")
    if result is None:
        trained.sort(key=lambda row: (row.name not in CONTROLS, row.round, row.part))
    return Experiment(folder, state, what, kind[3], recipe, images, tuple(trained), print_, notes)


def _finished_runs(folder: Path, name: str, notes: list[str]) -> Iterator[Any]:
    """Records of the trainings of an experiment that has not ended."""
    ours = {name}
    places = [folder / "pruner.json", *(run / RECORD for run in _run_folders(folder))]
    for place in places:
        try:
            if place is places[0]:
                ours |= {found[1]} if (found := _record(place)) is not None else set()
                continue
            bounded(place)
            if (record := read_run_record(place.parent)) is None:
                continue
            if search_of(follows_of(record)) in ours:
                yield record
            else:
                notes.append(f"{shown(str(place), 300)} is of another search; it is left out")
        except OSError as error:
            notes.append(f"{shown(str(error), 300)}; it is left out")


def _run_folders(folder: Path) -> list[Path]:
    found = (one for one in folder.iterdir() if re.fullmatch(_NAME, one.name) and not one.is_symlink())
    return sorted(one for one in islice(found, _MOST) if one.is_dir())


def _curve(folder: Path) -> list[tuple[int, float]]:
    bounded(folder / EPOCHS)
    data = read_bytes(folder / EPOCHS)
    rows = csv.DictReader(io.StringIO((data or b"").decode()), strict=True)
    found = [(int(row["epoch"] or ""), float(row["val_top1"] or "")) for row in islice(rows, 100_000)]
    if not all(0 < epoch < 10**7 and 0 <= score <= 100 for epoch, score in found):
        raise ValueError("no epochs and percents")
    return found


def _record(path: Path) -> tuple[dict[str, Any], str] | None:
    bounded(path)
    return read_record(path)


def bounded(path: Path) -> None:
    """Refuse a file that is larger than any record of ours, before it is read.

    Raises:
        DamagedError: It is.
    """
    try:
        size = path.stat().st_size
    except OSError:
        return
    if size > _MOST_BYTES:
        raise DamagedError(f"{path} has {size:,} bytes, more than any record of ours")
