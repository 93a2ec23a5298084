"""What people see of an experiment: progress, tables, the plot."""

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from ..config.recipe import CONTROLS
from ..pruning.run_files import RECORD
from ..pruning.training import Training
from ..storage.files import is_writer, replacing
from ..storage.tables import write_csv
from ..training.epoch_log import COLUMNS as EPOCH_COLUMNS
from ..training.epoch_log import EPOCHS, rows_of
from .console import NotebookConsole
from .trackers import Trackers

COLUMNS: tuple[str, ...] = (
    "name",
    "round",
    "part",
    "sparsity",
    "layer_min",
    "layer_max",
    "val_top1_best",
    "val_top1",
    "val_top1_soft",
    "test_top1",
    "epochs",
    "steps",
    "seconds",
)


def say(console: Console, text: str) -> None:
    """Print a sentence: between its words on a terminal, which would break within them; as one line elsewhere."""
    console.print(text, highlight=False, markup=False, soft_wrap=not console.is_terminal)


class RichProgress:
    """Bars for the whole search, the run and the epoch, with the time left; a line for each finished run.

    Args:
        console: Where to show them. Bars are drawn on terminals that can redraw a line; in a pipe, a file or with
            TERM=dumb, each epoch is a line instead; in a notebook one line follows the epochs.
        trainings: How many trainings there will be, None where nobody knows.
        trackers: Told of every epoch too; they begin and end with this.
    """

    def __init__(self, console: Console, trainings: int | None, trackers: Trackers | None = None):
        self.console, self.trackers = console, trackers
        self._tells = is_writer()  # later the first of each group writes, but still only the first of all tells
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not (console.is_interactive and self._tells),
        )
        self.trainings = trainings
        self._search = self._bars.add_task("search (epochs)", total=None)
        self._epoch = self._bars.add_task("steps", total=None)
        self._done = 0

    def __enter__(self) -> "RichProgress":
        if self.trackers is not None:
            self.trackers.__enter__()
        self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self._bars.stop()
        if isinstance(self.console, NotebookConsole) and self._tells:
            self.console.show("")
        if self.trackers is not None:
            self.trackers.__exit__(kind, error, trace)

    def say(self, text: str) -> None:
        if self._tells:
            say(self.console, text)

    def replayed(self, names: Sequence[str], folder: Path) -> None:
        """Say once which finished runs were read from the folder instead of trained."""
        if names and not self._done:
            self.say(f"continuing {folder}: {len(names)} finished runs skipped ({names[0]} to {names[-1]})")
            self._done = len(names)

    def begin(self, run: Training, steps: int) -> None:
        self.epochs, self.steps = run.schedule_epochs, steps
        total = None if self.trainings is None else self.trainings * run.schedule_epochs
        self._name = f"{run.name}, sparsity {run.sparsity:.3f}"
        self._bars.update(self._search, total=total, completed=self._done * run.schedule_epochs)
        self._bars.update(self._epoch, description=self._name, total=steps, completed=0)

    def step(self) -> None:
        self._bars.advance(self._epoch)

    def epoch(self, row: dict[str, Any]) -> None:
        if self.trackers is not None:
            self.trackers.log(row)
        self._bars.update(self._search, completed=self._done * self.epochs + row["epoch"])
        text = f"{self._name}, epoch {row['epoch']}/{self.epochs}, val {row['val_top1']:.2f}"
        self._bars.update(self._epoch, description=text, completed=0)
        if isinstance(self.console, NotebookConsole):
            if self._tells:
                self.console.show(f"{text}, {row['seconds']:.1f} s an epoch")
        elif not self.console.is_interactive:
            self.say(
                f"{row['run']}  epoch {row['epoch']:{len(str(self.epochs))}d}/{self.epochs}  "
                f"loss {row['train_loss']:.4f}  val {row['val_top1']:6.2f}  lr {row['lr']:.3g}  {row['seconds']:.1f} s"
            )

    def end(self, run: Training) -> None:
        self._done += 1
        m = run.metrics
        if run.reads_only:
            self.say(f"{run.name}  read the gradients of {run.batches} batches")
            return
        seconds = f"{m['seconds']:.{0 if m['seconds'] >= 100 else 1}f} s"  # the line has room in 80 columns
        self.say(
            f"{run.name}  sparsity {run.sparsity:.4f}  val {m['val_top1']:6.2f} ({_beside(m)})  "
            f"test {m['test_top1']:6.2f}  {seconds}"
        )


def _beside(metrics: dict[str, Any]) -> str:
    soft, epoch = metrics.get("val_top1_soft"), metrics.get("val_epoch_best")
    at = "" if epoch is None else f", epoch {epoch}"
    return f"best {metrics['val_top1_best']:.2f}{at}" if soft is None else f"soft {soft:.2f}"


def counted(epochs: int) -> str:
    return f"{epochs} epoch" + "s" * (epochs != 1)


def row(record: dict[str, Any]) -> dict[str, Any]:
    """A run's record as one row of the summary."""
    return {key: (record | record["metrics"]).get(key) for key in COLUMNS}


def write_summary(records: Sequence[dict[str, Any]], folder: Path) -> None:
    """Write summary.csv, one row a training, and epochs.csv, one row an epoch of these: each has its own already.

    Args:
        records: The trainings; of searches within the folder their tickets', whose epochs are in their own.
        folder: The run folder.
    """
    write_csv([row(record) for record in records], COLUMNS, folder / "summary.csv")
    here = (folder / record["name"] for record in records)
    epochs = [row for one in here if (one / RECORD).exists() for row in rows_of(one)]
    write_csv(epochs, EPOCH_COLUMNS, folder / EPOCHS)


def print_table(records: Sequence[dict[str, Any]], console: Console, why: str = "") -> None:
    """Print the table of a search; with the epochs, where not all were trained equally long.

    Args:
        records: The trainings.
        console: Where to.
        why: Said below it, such as why no dense network stands in it.
    """
    if not is_writer():
        return
    rows = [row(record) for record in records]
    epochs = len({one["epochs"] for one in rows}) > 1
    long = max(len(one["name"]) for one in rows) > len("round_00")  # parts of rounds
    table = Table(box=None, header_style="bold", pad_edge=not epochs, padding=(0, 1, 0, 0) if long else (0, 1))
    last = ("layers", "val best", "val last", "test top-1", *["epochs"] * epochs, "s")  # 80 characters hold no more
    if not epochs and not long:
        last = ("layers min..max", "val best", "val last", "test top-1", "seconds")
    for title in ("round", "sparsity", *last):
        table.add_column(title, justify="left" if title == "round" else "right", no_wrap=True)
    for one in rows:
        table.add_row(
            one["name"],
            f"{one['sparsity']:.4f}",
            f"{one['layer_min']:.3f}..{one['layer_max']:.3f}",
            *(f"{one[key]:.2f}" for key in ("val_top1_best", "val_top1", "test_top1")),
            *([str(one["epochs"])] if epochs else []),
            f"{one['seconds']:.1f}",
        )
    console.print(table)
    if soft := [f"{one['name']} {one['val_top1_soft']:.2f}" for one in rows if one["val_top1_soft"] is not None]:
        text = (
            f"the masks of soft networks, cut hard, have these scores; the soft networks' own: {', '.join(soft)} (val)"
        )
        say(console, text)
    if why:
        say(console, why)


def plot(records: Sequence[dict[str, Any]], path: Path, title: str, dense: dict[str, Any] | None) -> None:
    """Draw `figure` into a PNG."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        figure(records, title, dense).savefig(file, format="png")


def figure(records: Sequence[dict[str, Any]], title: str, dense: dict[str, Any] | None) -> Any:
    """Accuracy against sparsity, a matplotlib figure.

    A curve joins what was trained as long as the ticket, the last record; others are hollow points beside it. Its
    controls are points of their own.

    Args:
        records: The trainings.
        title: Above it.
        dense: The record of the dense network that was trained as long as the ticket: a line.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Runs on some of the classes or images are another task; and nobody has trained a soft network's hard mask yet.
    plain = [row(one) for one in records if one["all_images"] and one["metrics"].get("val_top1_soft") is None]
    beside = [one for one in plain if one["name"] in CONTROLS and one["sparsity"]]
    rows = sorted((one for one in plain if one not in beside), key=lambda one: one["sparsity"])
    figure = Figure(figsize=(6.4, 4.2), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    lengths = sorted({one["epochs"] for one in rows}, key=lambda epochs: epochs != records[-1]["epochs"])
    for epochs in lengths:
        told = f", after {counted(epochs)}" if len(lengths) > 1 else ""
        shown = [one for one in rows if one["epochs"] == epochs]
        for key, label, colour, marker, line in (
            ("test_top1", "test", "C0", "o", "-"),
            ("val_top1", "validation", "C1", "s", ":"),
        ):
            looks: Any = {"linestyle": line} if epochs == lengths[0] else {"linestyle": "", "markerfacecolor": "none"}
            x, y = ([1 - one["sparsity"] for one in shown], [one[key] for one in shown])
            axes.plot(x, y, color=colour, marker=marker, markersize=4, label=label + told, **looks)
    if dense is not None:
        axes.axhline(row(dense)["test_top1"], color="black", linestyle="--", linewidth=1, label="dense, test")
    for marker, one in zip("xP^vD*", beside, strict=False):
        at = 1 - one["sparsity"], one["test_top1"]
        axes.plot(*at, color="C0", marker=marker, markersize=6, linestyle="", label=f"{one['name']}, test")
    density = [1 - one["sparsity"] for one in rows]
    axes.set_xscale("log")
    axes.invert_xaxis()
    axes.set_xticks(density, [f"{1 - d:.3g}" for d in density], rotation=60, fontsize=7)
    axes.minorticks_off()
    axes.set_xlabel("sparsity (log scale of what remains)")
    axes.set_ylabel("top-1 (%)")
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure
