"""The figures of a report."""

from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from typing import Any

from ..config.recipe import CONTROLS
from ..core.errors import shown
from ..experiments.report import counted
from .drawing import COLOURS, FAINT, INK, Figure, bars, drawn, said
from .masks import Overlap, TicketFile
from .statistics import Interval, interval, percent
from .tasks import Series, Task, mean_of

_MARKERS, _LINES = "osD^vPX*<>hd", ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
_MOST = 12  # lines of a figure


def accuracy(task: Task, name: str) -> Figure | None:
    """Test top-1 against sparsity: a point a seed, a line through the means, their intervals, the dense network's."""
    by_label: dict[str, dict[float, dict[int, list[float]]]] = defaultdict(
        lambda: defaultdict(lambda: defaultdict(list))
    )
    (epochs, dense), bases = task.dense, {}
    for series in task.series:
        for one in series.experiments:
            other = one.weights_trained or one.epochs
            label = f"{series.label}, {counted(other)}" if dense and other != epochs else series.label
            bases[label] = series.label
            for run in one.points:
                place = series.target if run is one.final else round(run.sparsity, 4)
                by_label[label][place][one.seed].append(run.top1 or 0.0)
    if not by_label:
        return None

    def draw(axes: Any) -> str:
        told = []
        for label, places in [*by_label.items()][:_MOST]:
            number, looks = _looks(task, bases[label])
            means = {place: _seeds(seeds) for place, seeds in sorted(places.items())}
            x = [(1 - place) * 1.025 ** (number - len(by_label) / 2) for place in means]  # side by side
            for density, seeds in zip(x, (places[place] for place in means), strict=True):
                scores = [sum(each) / len(each) for each in seeds.values()]
                axes.plot([density] * len(scores), scores, **looks | {"linestyle": "", "markersize": 3, "alpha": 0.5})
            axes.plot(x, [one.mean for one in means.values()], label=label, **looks)
            bars(axes, x, [*means.values()], looks["color"])
            told.append(f"{label}: " + ", ".join(f"{said(one)} at sparsity {p:.4g}" for p, one in means.items()))
        if dense:
            found = percent([*dense.values()])
            axes.axhline(found.mean, color=INK, linestyle=(0, (1, 1)), linewidth=1.2, label=f"dense, {counted(epochs)}")
            if found.low is not None:
                axes.axhspan(found.low, found.high, color=FAINT, alpha=0.35, linewidth=0)
            told.append(f"dense, {counted(epochs)}: {said(found)}")
        places = sorted({1 - place for each in by_label.values() for place in each}, reverse=True)
        axes.set_xscale("log")
        axes.set_xlim(max(places) * 1.25, min(places) / 1.25)  # a single sparsity is a place, not a range
        axes.minorticks_off()
        axes.set_xticks(places, [f"{1 - one:.3g}" for one in places], rotation=50 if len(places) > 5 else 0)
        axes.set_xlabel("sparsity (log scale of what remains)")
        axes.set_ylabel("test top-1 (%)")
        return "; ".join(told)

    return drawn(name, f"Accuracy against sparsity: {task.title}{_of(by_label)}", draw)


def trainings(task: Task, name: str) -> Figure | None:
    """Test top-1 against what finding and training a ticket took, in epochs of all images."""
    found: dict[str, list[tuple[float, list[float], float]]] = defaultdict(list)
    for series in task.series:
        spent = [one.spent for one, _ in series.finals if one.kind == "search" and one.spent is not None]
        if spent:
            found[series.label].append((mean_of(spent), [*series.scores.values()], series.target))
    if not found:
        return None

    def draw(axes: Any) -> str:
        told = []
        most = max(spent for points in found.values() for spent, *_ in points)
        for label, points in [*found.items()][:_MOST]:
            number, looks = _looks(task, label)
            looks, shift = looks | {"linestyle": ""}, most * 0.008 * (number - len(found) / 2)
            for place, (spent, ys, target) in enumerate(points):
                x, mean = spent + shift, percent(ys)
                axes.plot([x] * len(ys), ys, **looks | {"markersize": 3, "alpha": 0.5})
                axes.plot([x], [mean.mean], label=None if place else label, **looks)
                bars(axes, [x], [mean], looks["color"])
                told.append(f"{label} at sparsity {target:.4g}: {said(mean)} for {spent:.4g} epochs")
        epochs, dense = task.dense
        if dense:
            mean = percent([*dense.values()])
            axes.plot([epochs], [mean.mean], color=INK, marker="_", markersize=14, linestyle="", label="dense")
            bars(axes, [epochs], [mean], INK)
            told.append(f"dense: {said(mean)} for {counted(epochs)}")
        axes.set_xlim(0, max(most, epochs) * 1.06)
        axes.set_xlabel("epochs of all images, search and ticket")
        axes.set_ylabel("test top-1 (%)")
        return "; ".join(told)

    return drawn(name, f"Accuracy against trainings spent: {task.title}{_of(found)}", draw)


def density(task: Task, files: dict[Series, list[TicketFile]], name: str) -> Figure | None:
    """What each layer keeps, the mean over seeds."""
    found = {series: [one for one in each if one.kept.keys() == each[0].kept.keys()] for series, each in files.items()}
    if not any(found.values()):
        return None

    def draw(axes: Any) -> str:
        told, deepest = [], 0
        names = _names(task)
        for series, each in [(s, f) for s, f in found.items() if f][:_MOST]:
            means = {layer: sum(one.density[layer] for one in each) / len(each) for layer in each[0].density}
            deepest = max(deepest, len(means))
            label, looks = names[series], _looks(task, series.label)[1] | {"markersize": 4}
            axes.plot(range(1, len(means) + 1), [*means.values()], label=label, **looks)
            least, most = (how(means, key=lambda layer: means[layer]) for how in (min, max))
            told.append(
                f"{label}: from {means[least]:.3g} in {shown(least, 60)} to {means[most]:.3g} in {shown(most, 60)}"
            )
        _whole(axes)
        axes.set_ylim(bottom=0)
        axes.set_xlabel(f"layer, of {deepest} in the network's order")
        axes.set_ylabel("share of its weights kept")
        return "; ".join(told)

    return drawn(name, f"Density by layer: {task.title}{_of([s for s, f in found.items() if f])}", draw)


def overlaps(task: Task, found: Sequence[Overlap], name: str) -> Figure | None:
    """What masks of two searches share, beside what chance would share."""
    groups: dict[tuple[bool, str], list[Overlap]] = defaultdict(list)
    labels = {one: name for series, name in _names(task).items() for one in series.experiments}
    for pair in found:
        first, second = sorted([labels[pair.first], labels[pair.second]])
        across = pair.first.seed == pair.second.seed
        groups[across, f"{first} &\n{second}" if across else f"{first}, two seeds"].append(pair)
    if not groups:
        return None
    farthest = sorted(groups.items(), key=lambda one: one[1][0].by_chance - one[1][0].iou)
    own, across = ([(label, each) for (of, label), each in farthest if of is kind] for kind in (False, True))
    rows = [*own[: max(8, 16 - len(across))], *across[: max(8, 16 - len(own))]]
    left = f", the {len(rows)} of {len(farthest)} farthest above chance" if len(rows) < len(farthest) else ""

    def draw(axes: Any) -> str:
        told = []
        for place, (label, pairs) in enumerate(rows):
            values, chance = interval([one.iou for one in pairs]), interval([one.by_chance for one in pairs])
            axes.plot([one.iou for one in pairs], [place] * len(pairs), "o", color=COLOURS[0], markersize=5)
            axes.plot([chance.mean], [place], "|", color=COLOURS[1], markersize=16, markeredgewidth=2)
            told.append(f"{' '.join(label.split())}: {values.mean:.3f} shared, {chance.mean:.3f} by chance")
        axes.plot([], [], "o", color=COLOURS[0], label="a pair of masks")
        axes.plot([], [], "|", color=COLOURS[1], markersize=12, markeredgewidth=2, label="chance, same layer counts")
        axes.set_yticks(range(len(rows)), [label for label, _ in rows], fontsize=8)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlim(left=0)
        axes.set_xlabel("kept by both / by either")
        return "; ".join(told)

    return drawn(name, f"Overlap of masks: {task.title}{left}", draw, height=1.6 + 0.4 * len(rows))


def rounds(task: Task, files: dict[Series, list[TicketFile]], name: str) -> Figure | None:
    """What COLT's copies keep in common, round by round, beside what chance would keep."""
    found = {series: [one.rounds for one in each if one.rounds] for series, each in files.items()}
    found = {series: each for series, each in found.items() if each}
    if not found:
        return None

    def draw(axes: Any) -> str:
        told = []
        for number, (series, each) in enumerate([*found.items()][:_MOST]):
            label, looks = _names(task)[series], _looks(task, series.label)[1]
            for place, one in enumerate(each):
                x = range(1, len(one) + 1)
                axes.plot(x, [kept for kept, _ in one], label=label if not place else None, **looks)
                chance = {"color": INK, "linestyle": ":", "label": "by chance" if not number + place else None}
                axes.plot(x, [by_chance for _, by_chance in one], **chance)
            last = each[0][-1]
            told.append(f"{label}: {last[0]:.3f} kept by all in round {len(each[0])}, {last[1]:.3f} by chance")
        _whole(axes)
        axes.set_xlabel("cut of the search")
        axes.set_ylabel("share kept by all copies")
        return "; ".join(told)

    return drawn(name, f"What COLT's copies agree on: {task.title}", draw)


def curves(task: Task, name: str) -> Figure | None:
    """Validation top-1 by epoch: of every search its last training so far, and of dense networks."""
    lines: dict[str, dict[int, list[tuple[int, float]]]] = defaultdict(dict)
    states: dict[str, Counter[str]] = defaultdict(Counter)
    for label, one in [(s.label, one) for s in task.series for one in s.experiments] + [
        ("dense", one) for one in task.experiments
    ]:
        if label == "dense":
            names = [run.name for run in one.dense if run.name in one.curves]
        else:
            names = sorted(name for name in one.curves if name not in CONTROLS)
            states[label][one.state] += 1
        if names:
            lines[label].setdefault(one.seed, one.curves[names[0 if label == "dense" else -1]])
    if not lines:
        return None

    def draw(axes: Any) -> str:
        told = []
        for label, each in [*lines.items()][-_MOST:]:
            looks = {"color": INK, "linestyle": ":"} if label == "dense" else _looks(task, label)[1]
            state = ", ".join(f"{count} {name}" for name, count in states[label].items() if name != "finished")
            state = f" ({state})" if state else ""
            for place, curve in enumerate(each.values()):
                once = {"label": label + state if not place else None, "markersize": 3, "linewidth": 1}
                axes.plot([epoch for epoch, _ in curve], [score for _, score in curve], **looks | once)
            ends = percent([curve[-1][1] for curve in each.values()])
            told.append(f"{label}{state}: {said(ends)} after epoch {max(curve[-1][0] for curve in each.values())}")
        _whole(axes)
        axes.set_xlabel("epoch")
        axes.set_ylabel("validation top-1 (%)")
        return "; ".join(told)

    return drawn(name, f"Training curves, of each search the last training: {task.title}{_of(lines)}", draw)


def _of(found: Collection[Any]) -> str:
    """That a figure shows some of what there is, where that is so."""
    return f", {_MOST} of {len(found)}" if len(found) > _MOST else ""


def _looks(task: Task, label: str) -> tuple[int, dict[str, Any]]:
    """A line's number and looks, the same in all figures of a task."""
    number = [*dict.fromkeys(one.label for one in task.series)].index(label)
    return number, {
        "color": COLOURS[number % len(COLOURS)],
        "marker": _MARKERS[number % len(_MARKERS)],
        "linestyle": _LINES[number % len(_LINES)],
        "markersize": 6,
    }


def _names(task: Task) -> dict[Series, str]:
    """What tells series apart: labels, with the sparsity where several share one."""
    labels = Counter(one.label for one in task.series)
    return {one: one.label if labels[one.label] == 1 else f"{one.label} {one.target:.4g}" for one in task.series}


def _whole(axes: Any) -> None:
    """Label an axis of numbers with whole ones alone."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _seeds(seeds: dict[int, list[float]]) -> Interval:
    """Mean and interval over seeds, each counted once."""
    return percent([sum(each) / len(each) for each in seeds.values()])
