"""Tickets of one sparsity beside one another: what was reached, for how much, and what can be told apart."""

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..experiments.report import counted
from .drawing import COLOURS, FAINT, INK, Figure, drawn, said
from .ranks import Rank, logit, ranks
from .statistics import Interval, percent
from .tasks import Series, Task, differing, mean_of, training_of
from .verdicts import Verdict, points

DENSE = "dense"
_BESIDE = {
    "dense": "beside dense",
    "shuffled_layers": "beside a random mask with its layer counts",
    "random_reinit": "beside its mask over another start",
}  # keys of `verdicts.CONTROLS`
RANKING = (
    *("sparsity", "rank", "ticket", "test top-1 (%)", "95 % interval", "dense trainings"),
    *_BESIDE.values(),
)
_UNKNOWN = 10_000  # test images, where a folder does not say how many there are


@dataclass(frozen=True, eq=False)
class Standing:
    """A ticket over its seeds, or the dense network, among those of one sparsity.

    Attributes:
        label: The ticket's, or `DENSE`.
        scores: Test top-1 in percent by seed.
        score: Their mean and interval.
        trainings: What search and ticket took, in trainings of the dense network; None where that is not known.
        rank: None where too few seeds are there to compare.
        series: The ticket's experiments; None for the dense network.
        unlike: How its training differs from that of most tickets of its sparsity; empty where it does not.
    """

    label: str
    scores: Mapping[int, float]
    score: Interval
    trainings: float | None
    rank: Rank | None = None
    series: Series | None = None
    unlike: str = ""


def standings(task: Task) -> dict[float, list[Standing]]:
    """By sparsity, of those that several searches have; the best mean first."""
    by_target: dict[float, list[Standing]] = defaultdict(list)
    for series in task.series:
        first, scores = series.experiments[0], series.scores
        if scores and first.kind == "search" and not first.control:
            score = percent([*scores.values()])
            by_target[series.target].append(Standing(series.label, scores, score, _trainings(series), series=series))
    epochs, dense = task.dense
    out = {}
    for target, found in sorted(by_target.items()):
        if len(found) > 1:
            every = found + ([Standing(DENSE, dense, percent([*dense.values()]), 1.0)] if dense else [])
            ranked, _ = ranks({one: one.scores for one in every}, task.test_images or _UNKNOWN)
            unlike = _unlike(found, epochs)
            every = [replace(one, rank=ranked.get(one), unlike=unlike[one.series]) for one in every]
            out[target] = sorted(every, key=lambda one: -one.score.mean)
    return out


def _unlike(found: Sequence[Standing], epochs: int) -> dict[Series | None, str]:
    """In words, how each ticket's training, and a dense network's of so many epochs, differs from that of most."""
    firsts = [(one.series, one.series.finals[0][0]) for one in found if one.series is not None]
    ways = [(one.weights_trained, training_of(one), str(one.recipe.retrain.tweaks)) for _, one in firsts]
    most = Counter(ways).most_common(1)[0][0]
    usual = firsts[ways.index(most)][1]

    def told(length: int | None) -> list[str]:
        same = length == usual.weights_trained
        return [] if same else [f"weights trained for {counted(length or 0)}, not {usual.weights_trained}"]

    out: dict[Series | None, str] = {None: ", ".join(told(epochs))}
    for series, one in firsts:
        words = [*told(one.weights_trained), *differing(one, usual)[:3]]
        words += ["other tweaks"] * (one.recipe.retrain.tweaks != usual.recipe.retrain.tweaks)
        words += ["other training images"] * (one.images != usual.images)
        out[series] = ", ".join(words)
    return out


def ranking_words(found: Mapping[float, Sequence[Standing]]) -> list[str]:
    """What beats what beyond noise, a sentence a sparsity."""
    told = []
    for target, every in found.items():
        ranked = [one for one in every if one.rank is not None]
        behind = [one.label for one in ranked if one.rank and one.rank.best > 1]
        common = len(set.intersection(*(set(one.scores) for one in ranked))) if ranked else 0
        more = any(len(one.scores) > common for one in ranked)
        at = f"Sparsity {target:.4g}, " + (f"by the {common} seeds that all have" if more else f"{common} seeds")
        if not ranked:
            said = f"Sparsity {target:.4g}: there are no two seeds that all have, so nothing is told apart."
        elif not behind:
            said = f"{at}: none of the {len(ranked)} can be told from the best."
        else:
            ahead = [one.label for one in ranked if one.label not in behind]
            said = f"{at}: the best may be {_or(ahead)}; behind it beyond noise: {', '.join(behind)}."
        unlike = [f"{one.label} ({one.unlike})" for one in every if one.unlike]
        note = " Trained otherwise than most, so its place is no fair comparison: "
        told.append(said + (f"{note}{'; '.join(unlike)}." if unlike else ""))
    return told


def _or(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"any of {', '.join(names)}"


def ranking_rows(found: Mapping[float, Sequence[Standing]], judged: Sequence[Verdict]) -> list[list[str]]:
    """A row on each, in words."""
    verdicts: dict[tuple[Series | None, str], str] = {(one.series, one.control): _short(one) for one in judged}
    rows = []
    for target, every in found.items():
        for one in every:
            low, high = one.score.low, one.score.high
            start = "" if one.series is None else _start(one.series)
            rows.append(
                [
                    f"{target:.4g}",
                    "too few seeds" if one.rank is None else str(one.rank),
                    one.label,
                    f"{one.score.mean:.2f}",
                    "none" if low is None else f"{low:.2f} to {high:.2f}",
                    "not known" if one.trainings is None else f"{one.trainings:.3g}{start}",
                    *(verdicts.get((one.series, control), "") for control in _BESIDE),
                ]
            )
    return rows


def _trainings(series: Series) -> float | None:
    spent = [one.spent / one.epochs for one, _ in series.finals if one.spent is not None and one.kind == "search"]
    return mean_of(spent) if spent else None


def _start(series: Series) -> str:
    return " and its start" if series.experiments[0].recipe.model.initial_checkpoint is not None else ""


def _short(one: Verdict) -> str:
    """A verdict in a few words; what it is compared with stands above the column."""
    kinds = ("better", "worse", "matches", "not distinguishable", "not a fair comparison")
    kind = next((kind for kind in kinds if one.text.startswith(kind)), "")
    if one.found is not None and kind in ("better", "worse"):
        return f"{kind} by {points(one.found.mean)}"
    if one.found is not None and kind == "not distinguishable":  # a large difference of few seeds would look like none
        side = "above" if one.found.mean > 0 else "below"
        return f"unclear: {points(one.found.mean)} {side}" if points(one.found.mean) != "0.0" else "unclear: equal"
    if one.found is not None and not kind:
        seeds = "one seed" if one.found.count == 1 else f"each of {one.found.count} seeds"
        return f"{one.found.mean:+.1f} with {seeds}"
    return kind


def ranking_figure(task: Task, found: Mapping[float, Sequence[Standing]], name: str, note: str = "") -> Figure | None:
    """Test top-1 of every ticket, a panel a sparsity: seeds, mean, interval, the dense network's as a band.

    Args:
        task: Of the tickets.
        found: Their standings.
        name: Of the figure's files.
        note: A line above.
    """
    if not found:
        return None
    images = task.test_images or _UNKNOWN
    places: dict[str, list[int]] = defaultdict(list)
    for every in found.values():
        for place, one in enumerate(every):
            if one.series is not None:
                places[one.label].append(place)
    labels = sorted(places, key=lambda label: mean_of(places[label]))
    lowest = min(score for every in found.values() for one in every for score in one.scores.values())

    def at(percent: float) -> float:
        return logit(percent, images)

    def draw(panels: Any) -> str:
        return "; ".join(
            f"at sparsity {target:.4g}: " + ", ".join(_panel(axes, every, labels, at))
            for axes, (target, every) in zip(panels, found.items(), strict=True)
        )

    def finish(panels: Any) -> str:
        told = draw(panels)
        ticks = [tick for tick in (*range(0, 90, 10), 90, 95, 98, 99, 100) if tick >= math.floor(lowest / 10) * 10]
        while len(ticks) > 7:  # the lower ones stand close
            del ticks[1]
        for axes, target in zip(panels, found, strict=True):
            axes.set_title(f"sparsity {target:.4g}", fontsize=10)
            axes.set_xticks([at(tick) for tick in ticks], [f"{tick}" for tick in ticks], fontsize=8)
            axes.set_xlim(at(ticks[0]) - 0.2, at(100) + 0.3)
            axes.set_xlabel("test top-1 (%)")
        panels[0].set_yticks(range(len(labels)), labels)
        panels[0].set_ylim(len(labels) - 0.4, -0.6)
        return told

    title = f"Ranking: {task.title}"
    return drawn(name, title, finish, 1.4 + 0.24 * len(labels), panels=len(found), note=note)


def _panel(axes: Any, every: Sequence[Standing], labels: Sequence[str], at: Any) -> list[str]:
    told = []
    for one in every:
        told.append(f"{one.label} {said(one.score)}" + ("" if one.rank is None else f" rank {one.rank}"))
        low, high = one.score.low, one.score.high
        if one.series is None:
            axes.axvline(
                at(one.score.mean), color=INK, linestyle=(0, (1, 1)), linewidth=1.2, label="dense, 95 % interval"
            )
            if low is not None and high is not None:
                axes.axvspan(at(low), at(high), color=FAINT, alpha=0.4, linewidth=0)
            continue
        y = labels.index(one.label)
        best = one.rank is None or one.rank.best == 1
        looks: Any = {"color": COLOURS[0] if best else COLOURS[1], "zorder": 3}
        if low is not None and high is not None:
            axes.plot([at(low), at(high)], [y, y], "-", linewidth=2, **looks)
        axes.plot(
            [at(score) for score in one.scores.values()], [y] * len(one.scores), "|", markersize=6, alpha=0.6, **looks
        )
        kind = {"label": "may be the best of its panel"} if best else {"label": "behind the best, beyond noise"}
        axes.plot(
            [at(one.score.mean)],
            [y],
            "o" if best else "D",
            markersize=6,
            markerfacecolor=looks["color"] if best else "none",
            **kind,
            **looks,
        )
    return told
