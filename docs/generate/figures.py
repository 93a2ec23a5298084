"""What was measured of each method on digits, from one table, and a small curve of it."""

import re
from pathlib import Path
from typing import NamedTuple

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
TABLE = "leaderboard_digits.md"  # the one place that methods' figures come from; digits_table.md has that form too
MEMORY = "memory.md"
_WIDE, _HIGH, _LEFT, _RIGHT, _TOP, _BOTTOM = 600, 250, 46, 150, 14, 36


class Row(NamedTuple):
    """A row of the table, by sparsity: accuracy in percent, the ends of its spread, both in words, trainings spent."""

    accuracy: dict[str, float]
    low: dict[str, float]
    high: dict[str, float]
    words: dict[str, str]
    spent: dict[str, str]

    def add(self, sparsity: str, accuracy: float, low: float, high: float, words: str, spent: str) -> None:
        for column, value in zip(self, (accuracy, low, high, words, spent), strict=True):
            column[sparsity] = value


def tables(name: str) -> list[list[list[str]]]:
    """The tables of a page of results, each a list of rows of cells; the rows under the title are left out."""
    found, rows = [], []
    for line in [*(RESULTS / name).read_text("utf-8").splitlines(), ""]:
        if line.startswith("|"):
            # A report's table has a backslash before what Markdown would take for its own.
            rows.append([re.sub(r"\\(.)", r"\1", cell.strip()) for cell in line.strip().strip("|").split("|")])
        elif rows:
            found.append([rows[0], *rows[2:]])
            rows = []
    return found


def measured() -> dict[str, Row]:
    """Every row of the table by its name; of a ranking, the first columns are those of `reports.ranking.RANKING`."""
    (titles, *rows), *_ = tables(TABLE)
    out: dict[str, Row] = {}
    for cells in rows:
        if titles[0] == "sparsity":
            sparsity, _, name, mean, interval, spent, *_ = cells
            ends = [float(x) for x in re.findall(r"\d+\.?\d*", interval)] or [float(mean)] * 2
            row = out.setdefault(name, Row({}, {}, {}, {}, {}))
            row.add(sparsity, float(mean), *ends, f"{mean} ({interval})", spent)
            continue
        row = out[cells[0]] = Row({}, {}, {}, {}, {})
        for title, cell, spent in zip(titles[1::2], cells[1::2], cells[2::2], strict=True):
            mean, spread = (float(x) for x in cell.split("±"))
            row.add(title, mean, mean - spread, mean + spread, cell, spent.removesuffix(".0"))
    return out


def spread() -> str:
    """What stands beside each mean."""
    return "95 % interval" if tables(TABLE)[0][0][0] == "sparsity" else "standard deviation"


def conditions() -> str:
    """When the table was made, with which versions, on what."""
    return next(line for line in (RESULTS / TABLE).read_text("utf-8").splitlines() if re.match(r"20\d\d-", line))


def rows_of(name: str) -> dict[str, Row]:
    """A method's rows: its own first, then its variants, such as ``imp, one shot``."""
    return {title: row for title, row in measured().items() if re.match(rf"{re.escape(name)}($|,| at | in )", title)}


def memory() -> dict[str, tuple[str, str]]:
    """Bytes a prunable weight at the peak of a search, on the device and on the host, by method."""
    (_, *rows), *_ = tables(MEMORY)
    return {row[0]: (row[2], row[5]) for row in rows}


def curve(name: str, drawn: dict[str, Row]) -> str:
    """Accuracy against sparsity as inline SVG: the method, the dense network and the random mask beside it."""
    sparsities = list(next(iter(drawn.values())).accuracy)
    lows = [row.low[s] for row in drawn.values() for s in sparsities]
    low = max(0.0, 5 * (min(lows) // 5))
    across = [_LEFT + 24 + i * (_WIDE - _LEFT - _RIGHT - 48) / (len(sparsities) - 1) for i in range(len(sparsities))]

    def y(percent: float) -> float:
        return _TOP + (100 - min(max(percent, low), 100)) / (100 - low) * (_HIGH - _TOP - _BOTTOM)

    parts = []
    step = next(step for step in (1, 2, 5, 10, 20) if (100 - low) / step <= 6)
    for tick in range(100, int(low) - 1, -step):
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDE - _RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick}</text>')
    for x, sparsity in zip(across, sparsities, strict=True):
        parts.append(f'<text x="{x:.1f}" y="{_HIGH - 14}" text-anchor="middle">{sparsity}</text>')
    ends = []
    for title, row in drawn.items():
        kind = "own" if title == name else "dense" if title == "dense" else "control"
        points = [(x, row.accuracy[s], row.low[s], row.high[s]) for x, s in zip(across, sparsities, strict=True)]
        path = " ".join(f"{x:.1f},{y(mean):.1f}" for x, mean, _, _ in points)
        parts.append(f'<polyline class="{kind}" points="{path}"/>')
        if kind != "dense":
            for x, mean, least, most in points:
                ends_at = f'y1="{y(least):.1f}" y2="{y(most):.1f}"'
                parts.append(f'<line class="{kind}" x1="{x:.1f}" x2="{x:.1f}" {ends_at}/>')
                parts.append(f'<circle class="{kind}" cx="{x:.1f}" cy="{y(mean):.1f}" r="3.5"/>')
        ends.append((y(points[-1][1]), title, kind))
    below = 0.0
    for height, title, kind in sorted(ends):  # names at the lines' ends, none over another
        below = max(height + 4, below + 21)
        short = title if len(title) < 18 else title.replace("_", "_\u200b").split("_")[0] + " ..."
        parts.append(f'<text class="{kind}" x="{across[-1] + 12:.1f}" y="{below:.1f}">{short}</text>')
    told = "; ".join(
        f"{title} " + ", ".join(f"{row.accuracy[s]} at {s}" for s in sparsities) for title, row in drawn.items()
    )
    label = f"Test top-1 in percent against sparsity on digits: {told}"
    box = f'viewBox="0 0 {_WIDE} {_HIGH}" role="img" aria-label="{label}"'
    return f'<div class="curve"><svg {box}>{"".join(parts)}</svg></div>'
