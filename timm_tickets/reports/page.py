"""The report: one HTML file that asks for nothing outside, and the same in Markdown with its figures beside it."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jinja2

from ..core.errors import SettingError, TicketError, shown
from ..experiments.report import counted
from ..storage.files import is_writer, read_bytes, write_bytes
from . import figures, masks
from .figures import Figure
from .masks import TicketFile, costs, ticket_file
from .ranking import RANKING, ranking_figure, ranking_rows, ranking_words, standings
from .read import Experiment, read_all
from .statistics import percent
from .tasks import Series, Task, tasks
from .verdicts import verdicts

NAME = "report"
_MARK = b"timm-tickets report"  # in what was written here, and may be written again
_ROWS = 500  # of a table


@dataclass(frozen=True)
class Table:
    """Words in rows; the first column names the row."""

    heads: tuple[str, ...]
    rows: list[list[str]]


@dataclass
class Section:
    """What is said of one task."""

    title: str
    about: str
    ranking: Table
    ranked: list[str]
    verdicts: Table
    tickets: Table
    figures: list[Figure] = field(default_factory=list)


def report(folders: Sequence[Path], output: Path, margin: float = 0.5) -> tuple[list[Path], list[str]]:
    """Write a report about run folders.

    Args:
        folders: Of searches, trainings and transfers, finished or not; or folders above them.
        output: The folder that it goes into.
        margin: Points below the dense network that still count as matching it.

    Returns:
        The files, the page first; and a sentence on everything that was left out.

    Raises:
        SettingError: A folder holds no experiment, the margin is none, or the output holds somebody else's report.
        OSError: It cannot be written.
    """
    _check_free(output)
    _, files, left = composed(folders, margin)
    return write(files, output), left


def _check_free(output: Path) -> None:
    for name in (f"{NAME}.html", f"{NAME}.md"):
        if _MARK not in (read_bytes(output / name, most=4_000) or _MARK):
            raise SettingError(
                f"output: {shown(str(output / name), 300)} was not written by this command; choose another"
            )


def write(files: Mapping[str, bytes], output: Path) -> list[Path]:
    """Put what `composed` has made into a folder, the page first; raises as `report`."""
    _check_free(output)
    if is_writer():
        for name, data in files.items():
            write_bytes(output / name, data)
    return [output / name for name in files]


def composed(folders: Sequence[Path], margin: float) -> tuple[list[Section], dict[str, bytes], list[str]]:
    """What is said of each task, the files of the report by name, and what was left out; for the rest see `report`."""
    if not 0 <= margin <= 100:
        raise SettingError(f"margin: {margin:g} is not valid; give points of accuracy, from 0 to 100")
    found, left = read_all(folders)
    sections = [_section(task, f"{number}_", margin, left) for number, task in enumerate(tasks(found), 1)]
    left += [note for one in found for note in dict.fromkeys(one.notes)]
    page = {
        "sections": sections,
        "folders": _folders(_first(found, "run folders", left)),
        "summary": _summary(found, left),
        "left": [*left[:_ROWS], *([f"and {len(left) - _ROWS:,} more"] if len(left) > _ROWS else [])],
        "written": f"{datetime.now().astimezone():%Y-%m-%d %H:%M}, timm-tickets {version('timm-tickets')}",
        "margin": f"{margin:g}",
    }
    loader = jinja2.PackageLoader(__package__ or "", "templates")
    strict: Any = {"loader": loader, "trim_blocks": True, "lstrip_blocks": True, "undefined": jinja2.StrictUndefined}
    html = jinja2.Environment(autoescape=True, **strict).get_template("report.html").render(page)
    plain = jinja2.Environment(autoescape=False, **strict)
    plain.filters["md"] = markdown
    files = {f"{NAME}.html": html.encode(), f"{NAME}.md": plain.get_template("report.md").render(page).encode()}
    for one in sections:
        for each in one.figures:
            files |= {f"{each.name}.svg": each.svg, f"{each.name}.png": each.png}
    return sections, files, left


def markdown(text: str) -> str:
    """Text as Markdown shows it literally, in a table too.

    >>> markdown("a|b <i> `c` [d](e)")
    'a\\\\|b \\\\<i\\\\> \\\\`c\\\\` \\\\[d\\\\]\\\\(e\\\\)'
    """
    return re.sub(r"([\\`*_{}\[\]()<>#|!~&$])", r"\\\1", " ".join(text.split()))


def _section(task: Task, name: str, margin: float, left: list[str]) -> Section:
    files: dict[Series, list[TicketFile]] = {}
    whole: list[list[Experiment]] = []
    for series in task.series:
        files[series] = []
        whole.append([])
        for one, _ in series.finals:
            try:
                files[series].append(ticket_file(one))
                whole[-1].append(one)
            except (TicketError, OSError) as error:
                left.append(f"{shown(str(one.folder), 300)}: its ticket is left out: {shown(str(error), 300)}")
    try:
        shared, more = masks.overlaps(whole)
    except (TicketError, OSError) as error:
        shared, more = [], 0
        left.append(f"the overlap of masks is left out: {shown(str(error), 300)}")
    if more:
        left.append(f"{task.title}: the overlap of {more:,} more pairs of masks is left out")
    places, judged = standings(task), verdicts(task, margin)
    drawn = [
        ranking_figure(task, places, f"{name}ranking", _note(task, [one for each in files.values() for one in each])),
        figures.accuracy(task, f"{name}accuracy"),
        figures.trainings(task, f"{name}trainings"),
        figures.curves(task, f"{name}curves"),
        figures.density(task, files, f"{name}density"),
        figures.overlaps(task, shared, f"{name}overlap"),
        figures.rounds(task, files, f"{name}rounds"),
    ]
    said = [
        [f"{one.series.label} at {one.series.target:.4g}", one.text[0].upper() + one.text[1:] + ".", _tests(one)]
        for one in judged
    ]
    tickets = [row for series in task.series if (row := _ticket(series, files[series]))]
    return Section(
        task.title,
        _about(task),
        Table(RANKING, _first(ranking_rows(places, judged), f"{task.title}: places", left)),
        ranking_words(places),
        Table(("ticket", "verdict", "tests"), _first(said, f"{task.title}: verdicts", left)),
        Table(_COLUMNS, _first(tickets, f"{task.title}: tickets", left)),
        [one for one in drawn if one is not None],
    )


def _first(found: Sequence[Any], what: str, left: list[str]) -> list[Any]:
    """What a table has room for; that there is more is said."""
    if len(found) > _ROWS:
        left.append(f"{what}: the first {_ROWS} of {len(found):,} are shown")
    return [*found[:_ROWS]]


_COLUMNS = (
    *("ticket", "seeds", "test top-1 (%)", "95 % interval", "epochs spent", "time", "file", "of the checkpoint"),
    *("parameters kept", "MACs kept"),
)


def _ticket(series: Series, files: Sequence[TicketFile]) -> list[str]:
    """A row on one ticket over its seeds: accuracy, cost, size."""
    finals = series.finals
    if not finals:
        return []
    score = percent([*series.scores.values()])
    spent = [one.spent for one, _ in finals if one.spent is not None and one.kind == "search"]
    found = costs(finals[0][0].recipe, files[0]) if files else None
    size, dense = (files[0].bytes, files[0].checkpoint) if files else (None, 1)
    return [
        f"{series.label} at {series.target:.4g}",
        f"{score.count}",
        f"{score.mean:.2f}",
        "none" if score.low is None else f"{score.low:.2f} to {score.high:.2f}",
        f"{sum(spent) / len(spent):.4g}" if spent else "not known",
        _time(sum(one.seconds for one, _ in finals) / len(finals)),
        "not known" if size is None else f"{size:,} bytes",
        "" if size is None else f"{size / dense:.1%}",
        "not known" if found is None else f"{found.kept_parameters:,} of {found.parameters:,}",
        "not known" if found is None else f"{found.kept_macs:,} of {found.macs:,}",
    ]


def _tests(one: Any) -> str:
    if one.found is None or one.corrected is None:
        return ""
    return f"t: p = {one.corrected:.2g} (Holm); permutation: p = {one.found.permuted:.2g}"


def _time(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 600
        else f"{seconds / 60:.0f} min"
        if seconds < 36_000
        else f"{seconds / 3600:.0f} h"
    )


def _about(task: Task) -> str:
    """How fine the test set measures, and how long the dense network was trained."""
    count, (epochs, dense) = task.test_images, task.dense
    fine = f"{count:,} test images: one of them is {100 / count:.2g} points. " if count else ""
    score = percent([*dense.values()]) if dense else None
    if score is None:
        return f"{fine}No dense network has been trained as long as a ticket here."
    width = "no interval" if score.low is None else f"95 % interval {score.low:.2f} to {score.high:.2f}"
    seeds = f"{score.count} seed{'s' * (score.count > 1)}"
    return f"{fine}The dense network: {score.mean:.2f} % after {counted(epochs)} ({width}, {seeds})."


def _note(task: Task, files: Sequence[TicketFile]) -> str:
    """What a figure that stands alone needs: when it was drawn, of how many images, with which versions."""
    versions = "; ".join(dict.fromkeys(one.versions for one in files if one.versions))
    images = f"{task.test_images:,} test images, " if task.test_images else ""
    return shown(f"{task.title}, {images}{datetime.now().astimezone():%Y-%m-%d}; {versions}", 200)


def _folders(found: Sequence[Experiment]) -> Table:
    rows = []
    for one in found:
        done = f"{len(one.trained)} training{'s' * (len(one.trained) != 1)} done"
        if one.state != "finished" and one.curves:
            name, curve = [*one.curves.items()][-1]
            done += f"; {name} at epoch {curve[-1][0]}, validation {curve[-1][1]:.2f} %"
        again = "; the same command continues" if one.state in ("killed", "stopped") else ""
        pruner = "" if one.kind == "dense" else one.recipe.pruner["name"]
        facts = (one.kind, pruner, "" if one.target is None else f"{one.target:.4g}", f"{one.seed}")
        rows.append([shown(str(one.folder), 200), one.state, *facts, done + again])
    return Table(("folder", "state", "experiment", "pruner", "sparsity", "seed", "so far"), rows)


def _summary(found: Sequence[Experiment], left: Sequence[str]) -> str:
    states = [one.state for one in found]
    counts = [f"{states.count(state)} {state}" for state in ("finished", "running", "killed", "stopped")]
    told = ", ".join(one for one in counts if not one.startswith("0 "))
    return f"{len(found)} run folder{'s' * (len(found) != 1)}: {told}" + (
        f"; what is left out is named below ({len(left)})" if left else ""
    )
