"""Which run folders may stand in one figure, and which are seeds of one ticket."""

import hashlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from ..core.errors import TicketError, shown
from ..pruning.registry import get_method
from .masks import ticket_file
from .read import Experiment, Trained

_SCORED = ("img_size", "mean", "std", "interpolation", "crop_pct", "crop_mode", "input_img_mode", "in_chans", "classes")
_OF_A_SEED = ("seed", "name", "pruner.seed", "data.workers")  # what runs of one series may have otherwise


@dataclass(eq=False)
class Series:
    """Searches of one recipe at several seeds, at one asked sparsity, or tickets trained again.

    Attributes:
        label: Short, and of no other series of the task.
        experiments: In the order of their seeds.
        beside: The same trainings of these very tickets once more, by `transfer`, beside controls.
    """

    label: str
    experiments: list[Experiment]
    beside: list[Experiment] = field(default_factory=list)

    @property
    def target(self) -> float:
        return next((one.target for one in self.experiments if one.target is not None), 0.0)

    @property
    def finals(self) -> list[tuple[Experiment, Trained]]:
        return [(one, final) for one in self.experiments if (final := one.final) is not None and final.top1 is not None]

    @property
    def scores(self) -> dict[int, float]:
        """Test top-1 of the ticket in percent by seed; of several folders of one seed their mean."""
        found: dict[int, list[float]] = defaultdict(list)
        for one, final in self.finals:
            found[one.seed].append(final.top1 or 0.0)
        return {seed: mean_of(each) for seed, each in sorted(found.items())}


@dataclass(eq=False)
class Task:
    """Experiments that may stand in one figure: of one network, scored on the same test images in the same way."""

    experiments: list[Experiment]
    which: str = ""  # where two have the same title

    @property
    def title(self) -> str:
        recipe = self.experiments[0].recipe
        start = ", pretrained" * recipe.model.pretrained
        return f"{recipe.model.model}{start} on {shown(recipe.data.dataset, 60)}{self.which}"

    @cached_property
    def series(self) -> list[Series]:
        found = {one.fingerprint: one for one in self.experiments if one.kind == "search" and one.final is not None}
        again = {one for one in self.experiments if one.of in found and _repeats(one, found[one.of])}
        groups: dict[tuple[str, str], list[Experiment]] = defaultdict(list)
        for one in self.experiments:
            if one.kind != "dense" and one not in again:
                key = [one.kind != "search" and one.target, _settings(one, *_OF_A_SEED)]
                groups[_pruner(one), json.dumps(key, default=str)].append(one)
        made = []
        for label, group in zip(_labels(groups), groups.values(), strict=True):
            of = {each.fingerprint for each in group}
            group.sort(key=lambda one: one.seed)
            made.append(Series(label, group, [each for each in again if each.of in of]))
        return sorted(made, key=lambda one: (one.label, one.target))

    @property
    def test_images(self) -> int:
        """How many there are; 0 where that is not known."""
        counts = self.experiments[0].images.get("test")
        try:
            count = sum(int(each[0]) for each in counts.values()) if isinstance(counts, dict) else 0
        except (TypeError, ValueError, LookupError, ArithmeticError):  # a stranger's
            return 0
        return count if 0 < count < 10**12 else 0

    @cached_property
    def dense(self) -> tuple[int, dict[int, float]]:
        """Epochs and test top-1 by seed of the dense networks that were trained as most of the tickets are."""
        found: dict[tuple[int, str], dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
        count: Counter[tuple[int, str]] = Counter()
        for one in self.experiments:
            how = training_of(one)
            for run in one.dense:
                found[run.epochs, how][one.seed].append(run.top1 or 0.0)
            count[one.epochs, how] += 1
        for key, _ in count.most_common():
            if key in found:
                return key[0], {seed: mean_of(scores) for seed, scores in sorted(found[key].items())}
        return 0, {}


def tasks(experiments: Iterable[Experiment]) -> list[Task]:
    """Experiments by network and test images: others never share a figure, nor those whose images nobody knows."""
    found: dict[str, list[Experiment]] = defaultdict(list)
    for one in experiments:
        test = one.images.get("test") or str(one.folder)
        how = {key: getattr(one.recipe.data, key) for key in _SCORED}
        network = one.recipe.model.model_dump(mode="json", exclude={"initial_checkpoint"})
        found[json.dumps([network, test, how], default=str)].append(one)
    made = [Task(group) for group in found.values()]
    titles = [one.title for one in made]
    for number, one in enumerate(made):
        if titles.count(titles[number]) > 1:
            one.which = f", test set {1 + titles[:number].count(titles[number])}"
    return made


def _pruner(one: Experiment) -> str:
    """The recipe's label, else who found a ticket; and that it was trained again where that is so."""
    if one.kind == "search":
        return (one.recipe.label or one.recipe.pruner["name"]) + (f", {one.control}" if one.control else "")
    if one.recipe.label:
        return f"{one.recipe.label}, {one.kind}"
    try:
        return f"{ticket_file(one).pruner}, {one.kind}"
    except (TicketError, OSError):
        return f"ticket, {one.kind}"


def _repeats(one: Experiment, source: Experiment) -> bool:
    """Whether a transfer is the training that a search ends with once more: of the same seed, images and settings."""
    if get_method(source.recipe.pruner["name"]).ends_trained:
        return False  # that was none
    same = (one.kind, one.seed, one.epochs, one.images) == ("transfer", source.seed, source.epochs, source.images)
    return same and not differing(one, source)


def differing(one: Experiment, other: Experiment) -> list[str]:
    """In words, which settings of model, data and training differ, the epochs apart."""
    ours, theirs = (_settings(each, "training.epochs", "data.workers") for each in (one, other))
    keys = [key for key in {**ours, **theirs} if key.startswith(("training.", "data.", "model."))]
    told = {
        key: [shown(each.get(key), 30) for each in (ours, theirs)] for key in keys if ours.get(key) != theirs.get(key)
    }
    start = "model.initial_checkpoint"
    begins = f"other weights to begin with ({start})"
    return [f"{key} {' and '.join(each)}" if key != start else begins for key, each in told.items()]


def _labels(groups: Mapping[tuple[str, str], Sequence[Experiment]]) -> list[str]:
    """The name, and what tells groups of one name apart; of a label that a recipe gives, at one sparsity."""
    flat = []
    for (name, _), group in groups.items():
        at = group[0].target if group[0].recipe.label else None
        flat.append((name, at, _settings(group[0], *_OF_A_SEED, "pruner.sparsity")))
    out = []
    for name, at, mine in flat:
        alike = [other for *its, other in flat if its == [name, at]]
        keys = [key for key in mine if any(other.get(key) != mine[key] for other in alike)]
        said = [f"{key.rpartition('.')[2]} {shown(mine[key], 20)}" for key in keys]
        out.append(name + (f" ({', '.join([*dict.fromkeys(said)][:3])})" if said else ""))
    return out


def _settings(one: Experiment, *without: str) -> dict[str, Any]:
    found = {key: value for key, value in one.recipe.compared().items() if key not in without}
    if found["model.initial_checkpoint"] is not None:  # each seed's own, where a folder says so
        found["model.initial_checkpoint"] = re.sub(rf"\bseed_{one.seed}\b", "seed_*", found["model.initial_checkpoint"])
    return found


def training_of(one: Experiment) -> str:
    """What trainings have to share, the epochs apart, to be averaged over: settings, images, trained weights."""
    settings = {
        key: value
        for key, value in _settings(one, "training.epochs", "data.workers").items()
        if key.startswith(("training.", "data.", "model."))
    }
    return hashlib.sha256(json.dumps([settings, dict(one.images)], sort_keys=True, default=str).encode()).hexdigest()


def mean_of(values: Sequence[float]) -> float:
    return sum(values) / len(values)
