"""What is compared with what, and the one sentence on each that the data support."""

import shlex
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product

from ..config.recipe import SEARCHED
from ..core.errors import TicketError, shown
from ..experiments.baselines import SAME_START, refused
from .masks import ticket_file
from .read import Experiment, Trained
from .statistics import Difference, difference, holm, paired
from .tasks import Series, Task, differing, mean_of

ALPHA = 0.05
CONTROLS = {
    "dense": "the dense network",
    "equal_epochs": "the dense network trained as long as the ticket's weights",
    "shuffled_layers": "a random mask with the same layer counts",
    "random_mask": "a random mask of the same size",
    "random": "the pruner `random`, whose layers keep other counts",
    "random_reinit": "the same mask over another random start",
    "one_shot": "one-shot magnitude pruning",
    "equal_rate_imp": "IMP at the same rate",
    "equal_cost": "gradual magnitude pruning for as many epochs as search and ticket together",
}


@dataclass(frozen=True)
class Verdict:
    """A ticket beside a control.

    Attributes:
        series: The ticket's.
        control: A key of `CONTROLS`.
        text: The sentence.
        found: The numbers behind it, where seeds could be compared.
        corrected: p of the paired t test, corrected for the tickets of its sparsity compared with this control.
    """

    series: Series
    control: str
    text: str
    found: Difference | None = None
    corrected: float | None = None


def verdicts(task: Task, margin: float) -> list[Verdict]:
    """A sentence on each ticket and control, corrected for how many of one sparsity are compared with that control.

    Args:
        task: What may be compared.
        margin: Points below the dense network that still count as matching it.
    """
    out = []
    tickets: dict[float, list[Series]] = defaultdict(list)
    for series in task.series:
        if not series.experiments[0].control:
            tickets[series.target].append(series)
    for control, alike in product(CONTROLS, tickets.values()):
        pairs = [(series, _Pairs(task, series, control)) for series in alike]
        found = [difference(one.differences, margin) if one.differences else None for _, one in pairs]
        tested = [one for one in found if one is not None and one.p is not None]
        p = dict(zip(map(id, tested), holm([one.p or 0.0 for one in tested]), strict=True))
        worse = dict(zip(map(id, tested), holm([one.not_worse or 0.0 for one in tested]), strict=True))
        for (series, pair), one in zip(pairs, found, strict=True):
            key = id(one)
            text = pair.problem if one is None else sentence(control, one, p.get(key), worse.get(key), margin, len(p))
            if text:
                out.append(Verdict(series, control, "; ".join([text, *pair.left]), one, p.get(key)))
    return sorted(out, key=lambda one: task.series.index(one.series))


def sentence(
    control: str, found: Difference, p: float | None, not_worse: float | None, margin: float, tests: int
) -> str:
    """What paired differences support, in words.

    Args:
        control: A key of `CONTROLS`.
        found: The differences.
        p: Corrected, of the t test against no difference.
        not_worse: Corrected, of the t test against being worse by the margin.
        margin: In points.
        tests: How many tickets were corrected for.
    """
    name, mean = CONTROLS[control], found.mean
    side = f"{points(mean)} points {'above' if mean >= 0 else 'below'}"
    by = f"{side} it"
    if found.low is None or found.high is None or p is None or not_worse is None:
        seeds = "one seed" if found.count == 1 else f"each of {found.count} seeds"
        return f"{side} {name} with {seeds}, which gives no interval and does not say which is better"
    if p < ALPHA:
        low, high = sorted(map(abs, (found.low, found.high)))
        return (
            f"{'better' if mean > 0 else 'worse'} than {name} by {points(mean)} points (95 % interval {points(low)} to "
            f"{points(high)}, {found.count} seeds)"
        )
    seeds = f"95 % interval {_range(found.low, found.high)}, {found.count} seeds"
    if control == "dense" and not_worse < ALPHA / 2:
        return f"matches dense: {by} ({seeds}), and less than {margin:g} below"
    corrected = f", once corrected for the {tests} tickets of this sparsity" if found.low > 0 or found.high < 0 else ""
    return f"not distinguishable from {name}: {by} ({seeds}){corrected}"


def points(difference: float) -> str:
    """How large a difference is, without its sign; one that a large test set makes out is not rounded to nothing.

    >>> points(-1.24), points(0.043), points(0.0)
    ('1.2', '0.04', '0.0')
    """
    size = abs(difference)
    return f"{size:.1g}" if 1e-6 < size < 0.095 else f"{size:.1f}"


def _range(low: float, high: float) -> str:
    """The ends of an interval of differences, without a sign that a reader would have to interpret."""
    if low < 0 < high:
        return f"{points(low)} below to {points(high)} above"
    least, most = sorted(map(abs, (low, high)))
    return f"{points(least)} to {points(most)} {'above' if high > 0 else 'below'}"


class _Pairs:
    """Scores of a ticket and a control with the same seeds, and why others are no pairs.

    Attributes:
        differences: A seed each, in points.
        left: What was left out, a clause each.
        problem: Why there is none, where there is none; empty where nobody would ask.
    """

    def __init__(self, task: Task, series: Series, control: str):
        self.task, self.series = task, series
        unfair: dict[int, str] = {}
        tweaks = ""
        scores: dict[int, tuple[list[float], list[float]]] = defaultdict(lambda: ([], []))
        for one in series.experiments:
            got = False
            for other, run in self._controls(one, control):
                mine = (
                    one if other is one or other.of is None else other
                )  # a transfer has its own training of the ticket
                if mine.final is None or mine.final.top1 is None or run.top1 is None:
                    continue
                if why := _unfair(mine, other, run, control):
                    unfair.setdefault(one.seed, why)
                    continue
                tweaks = tweaks or _tweaks(mine, other, run)
                scores[one.seed][0].append(mine.final.top1)
                scores[one.seed][1].append(run.top1)
                got = True
                break
            if got:
                unfair.pop(one.seed, None)
        both = {seed: (mean_of(ones), mean_of(others)) for seed, (ones, others) in scores.items()}
        seeds: dict[int, float | None] = {one.seed: None for one in series.experiments}
        ours, theirs = ({**seeds, **{seed: pair[side] for seed, pair in both.items()}} for side in (0, 1))
        self.differences, missing = paired(ours, theirs)
        self.left = [tweaks] if tweaks else []
        self.left += [f"seed {seed} is not a fair comparison ({why})" for seed, why in unfair.items()]
        many = [seed for seed, count in Counter(one.seed for one in series.experiments).items() if count > 1]
        self.left += [f"seed {seed} stands in several folders and counts once, as their mean" for seed in many]
        if states := self._without(set(missing) - unfair.keys()):
            self.left.append(states)
        self.problem = ""
        if self.differences:
            return
        if unfair:
            self.problem, self.left = (
                f"not a fair comparison with {CONTROLS[control]}: {next(iter(unfair.values()))}",
                [],
            )
        elif series.finals and (control == "dense" or (control == "shuffled_layers" and not _is_random(series))):
            self.problem, self.left = _absent(series, control), []
        elif control == "dense":
            self.problem, self.left = f"no ticket yet: {self._without(set(seeds))}", []

    def _controls(self, one: Experiment, control: str) -> Iterable[tuple[Experiment, Trained]]:
        """Candidates, the best first: of the same folder, of a transfer of this ticket, of another folder."""
        same = [each for each in self.task.experiments if each.seed == one.seed and each is not one]
        if control == "dense":
            runs = [run for run in one.dense if run.name != "equal_epochs"]
            yield from ((one, run) for run in sorted(runs, key=lambda run: run.epochs != one.weights_trained))
            others = [(each, run) for each in same if each.of is None for run in each.dense]
            yield from sorted(others, key=lambda pair: bool(_unfair(one, *pair, control)))
        elif control in SEARCHED:
            yield from ((each, final) for each in same if each.folder == one.folder / control and (final := each.final))
        elif control == "random":
            yield from self._random(one, same, False)
        else:
            beside = [one, *(each for each in self.series.beside if each.of == one.fingerprint)]
            yield from ((each, run) for each in beside if (run := each.named(control)) is not None)
            if control == "shuffled_layers":
                yield from self._random(one, same, True)

    def _random(self, one: Experiment, same: Iterable[Experiment], alike: bool) -> Iterable[tuple[Experiment, Trained]]:
        """Tickets of the pruner `random` at the same sparsity, with the same layer counts or with others."""
        for each in same:
            final = each.final if each.kind == "search" and each.recipe.pruner["name"] == "random" else None
            if final is None or _is_random(self.series) or each.target != one.target:
                continue
            try:
                counts = [ticket_file(of).kept for of in (one, each)]
            except (TicketError, OSError):
                continue
            if (counts[0] == counts[1]) is alike:
                yield each, final

    def _without(self, seeds: set[int]) -> str:
        """In words, which seeds have no pair, and what became of their searches."""
        of = [one for one in self.series.experiments if one.seed in seeds]
        told = [
            f"seed {one.seed} is {one.state}" if one.final is None else f"seed {one.seed} has no such control"
            for one in of
        ]
        return ", ".join(told)


def _unfair(one: Experiment, other: Experiment, run: Trained, control: str) -> str:
    """Why a ticket's training and a control's may not be compared; empty where they may."""
    length, theirs = one.weights_trained or 0, run.epochs
    if one.kind != "search":
        try:
            if ticket_file(one).trained:
                return "the ticket begins with trained weights"
        except (TicketError, OSError):
            return "the ticket cannot be read, so what it begins with is not known"
    if one is other and control in SAME_START and one.final is not None:
        length = one.final.epochs  # whatever its first weights were trained for, the control's were too
    elif control in SEARCHED:
        theirs = other.weights_trained or 0
    if length != theirs and control != "equal_cost":  # whose meaning is to be trained longer
        times = max(length, theirs) / max(1, min(length, theirs))
        who = "trained" if length > theirs else "the control was trained"
        return f"{who} {times:.3g} times as long ({length} and {theirs} epochs)"
    if one is other:
        return ""
    if one.images != other.images or not one.images:
        return "other images were trained or validated on"
    return ", ".join(differing(one, other)[:3])


def _tweaks(one: Experiment, other: Experiment, run: Trained) -> str:
    """That a ticket was trained with other tweaks than its control, if so; the whole network beside it has none."""
    without = run.sparsity == 0 and other.kind != "dense"
    ours, theirs = one.recipe.retrain.tweaks, {} if without else other.recipe.retrain.tweaks
    if ours == theirs:
        return ""
    how = [", ".join(each) or "none" for each in (ours, theirs)]
    told = how if how[0] != how[1] else [shown(str(each), 80) for each in (ours, theirs)]
    return f"the ticket was trained with the tweaks {told[0]}, the control with {told[1]}"


def _absent(series: Series, control: str) -> str:
    """That a control is not there, and the command that adds it: the folder's own recipe has all settings."""
    one = series.finals[0][0]
    if control == "dense":
        control = "dense" if one.weights_trained == one.epochs else "equal_epochs"
        what = "no dense network was trained as long"
    else:
        what = f"no {CONTROLS[control].removeprefix('a ')} was trained"
    if one.kind == "search" and (why := refused(one.recipe, control)):
        return f"{what}, and none can be: {why}"
    try:
        if one.kind != "search" and (ticket_file(one).trained or control == "equal_epochs"):
            return f"{what}, and none can be: its search trained before the mask was found"
    except (TicketError, OSError) as error:
        return f"{what}, and none can be: {shown(str(error), 300)}"
    there = one.recipe.controls if one.kind == "search" else one.recipe.chosen_controls or ()
    controls = ",".join([*dict.fromkeys([*there, control])])
    chosen = f"--set 'controls=[{controls}]'"
    if one.kind == "transfer":  # of a ticket that lies nobody knows where
        return f"{what}: add it with the same `timm-tickets transfer` and `{chosen}`, for every seed"
    folder, ticket = (shlex.quote(shown(str(path), 200)) for path in (one.folder, one.ticket))
    given = f" --ticket {ticket}" if one.kind == "train" else ""
    command = f"timm-tickets {one.kind} {folder}/recipe.yaml{given} --set output={folder} {chosen}"
    return f"{what}: add it with `{command}`, for every seed"


def _is_random(series: Series) -> bool:
    return series.experiments[0].recipe.pruner["name"] == "random"
