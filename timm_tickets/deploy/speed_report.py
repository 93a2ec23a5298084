"""What a measurement says: a table of 80 columns, and in plain words what is faster than the dense model."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.table import Table
from rich.text import Text

from .speed import Speed

_SURE = 1.05  # as many times as fast, at least, is called faster; with three of four rounds on the same side of 1


@dataclass(frozen=True)
class Ratio:
    """How many times as fast one model was as another: the median over the rounds, and the quartiles."""

    low: float
    middle: float
    high: float

    @classmethod
    def of(cls, base: Sequence[float], other: Sequence[float]) -> "Ratio":
        """Of the seconds that both took, a round each.

        >>> Ratio.of([4.0, 4.0, 6.0], [2.0, 2.0, 2.0])
        Ratio(low=2.0, middle=2.0, high=3.0)
        """
        ratios = [before / after for before, after in zip(base, other, strict=True)]
        return cls(*(statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3))

    @property
    def faster(self) -> bool:
        return self.middle >= _SURE and self.low > 1

    @property
    def slower(self) -> bool:
        return self.middle <= 1 / _SURE and self.high < 1


def verdict(speed: Speed) -> list[str]:
    """In plain words: of each engine, what is faster than the dense model in it and what is not; then the fastest."""
    out = []
    batch = f"{speed.batch} images"
    rows = {(row.engine, row.variant): row for row in speed.rows}
    won = False
    for engine in dict.fromkeys(row.engine for row in speed.rows):
        dense = rows.get((engine, "dense"))
        told = []
        for row in speed.rows:
            if dense is None or row.engine != engine or row is dense:
                continue
            pair = Ratio.of(dense.latency, row.latency), Ratio.of(dense.batch, row.batch)
            won |= any(ratio.faster for ratio in pair)
            times = f"{pair[0].middle:.2f} times as fast as dense with 1 image, {pair[1].middle:.2f} with {batch}"
            told.append(f"{row.variant} {times} ({_word(pair)})")
        if told:
            out.append(f"{engine}: {'; '.join(told)}.")
    if not won and any(row.variant == "compacted" for row in speed.rows):
        out.append(
            "NOTHING GOT FASTER, even without the channels that are taken out: on this machine a network of this size "
            "takes its time elsewhere, or too few of its MACs are gone."
        )
    elif not won:
        out.append(
            "NOTHING GOT FASTER: zeros are multiplied by like any other weight. What makes a ticket faster is taking "
            "channels out: search with pruner.granularity=channel, then compact (docs/faster.md)."
        )
    base = rows.get(("torch", "dense"))
    quick = min(speed.rows, key=lambda row: statistics.median(row.batch))
    if base is not None and quick is not base and (ratio := Ratio.of(base.batch, quick.batch)).faster:
        out.append(
            f"The fastest with {batch} is {quick.engine} {quick.variant}: {ratio.middle:.2f} times torch's dense."
        )
    return out


def _word(pair: Iterable[Ratio]) -> str:
    pair = [*pair]
    if any(ratio.faster for ratio in pair):
        return "faster" if not any(ratio.slower for ratio in pair) else "faster in one, slower in the other"
    return "slower" if any(ratio.slower for ratio in pair) else "not faster"


def table(speed: Speed) -> Table:
    """A row each, under the engine that runs it."""
    out = Table(box=None, header_style="bold", padding=(0, 1, 0, 0))
    out.add_column("\n")
    titles = (
        "1 image\nms",
        f"{speed.batch} images\nimages/s",
        "memory\nMB",
        "file\nMB",
        "params\nM",
        "MACs\nM",
        "top-1\n%",
    )
    for title in titles:
        out.add_column(title, justify="right", no_wrap=True)
    engine = None
    for row in speed.rows:
        if row.engine != engine:
            out.add_row(Text(engine := row.engine, style="bold"))
        out.add_row(
            f"  {row.variant}",
            _spread([1000 * seconds for seconds in row.latency]),
            _spread([speed.batch / seconds for seconds in row.batch]),
            "-" if row.memory is None else f"{row.memory:,.0f}",
            _short(row.file / 1e6),
            _short(row.parameters / 1e6),
            "-" if row.macs is None else _short(row.macs / 1e6),
            "-" if row.top1 is None else f"{row.top1:.2f}",
        )
    return out


def conditions(speed: Speed) -> list[str]:
    """What was measured, and how."""
    size = " x ".join(map(str, speed.source.images.input_size))
    rounds, threads = len(speed.rows[0].latency), f"{speed.threads} thread" + "s" * (speed.threads > 1)
    others = dict.fromkeys(row.variant for row in speed.rows if row.variant != "dense")
    return [
        f"{speed.source.built.architecture}, images of {size}, float32, {threads}"
        + (f"; {speed.sparsity:.1%} of the weights in layers with zeros are zero." if speed.sparsity else "."),
        f"{', '.join(others)}: {speed.source.told}. dense: {speed.dense}.",
        f"Medians of {rounds} rounds, all models in turn in each, and half the distance of the quartiles. Memory: of a "
        "process that holds the model and runs a batch, over that without. MACs: as torch counts them, zeros too.",
        *speed.notes,
    ]


def _spread(values: Sequence[float]) -> str:
    """A median, and half the distance of the quartiles in percent of it."""
    middle = statistics.median(values)
    if len(values) < 2:
        return _short(middle)
    low, _, high = statistics.quantiles(values, n=4)
    return f"{_short(middle)} ±{50 * (high - low) / middle:.0f}%"


def _short(value: float) -> str:
    """Three digits.

    >>> [_short(value) for value in (0.0123, 1.234, 12.34, 1234.5)]
    ['0.012', '1.23', '12.3', '1,234']
    """
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 1 else f"{value:.3f}"
