"""How figures are drawn: legible on light and dark, in print, and without telling colours apart."""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .statistics import Interval

# Okabe and Ito's, without yellow, which white swallows.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
INK, FAINT = "#101112", "#b0b1b2"  # in the page, what they stand for follows the reader's choice of light or dark
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "timm-tickets",
    "text.parse_math": False,  # a folder's name may have a $
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.4,
    "legend.frameon": False,
    "legend.fontsize": 9,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
}


@dataclass(frozen=True)
class Figure:
    """A picture.

    Attributes:
        name: Of its files, without a suffix.
        title: A line.
        alt: What it shows, in numbers.
        inline: An SVG for the page, in the page's colours.
        svg: The same as a file of its own, on white.
        png: The same for what reads no SVG.
        wide: Whether it has several panels side by side.
    """

    name: str
    title: str
    alt: str
    inline: str
    svg: bytes
    png: bytes
    wide: bool = False


def drawn(name: str, title: str, draw: Any, height: float = 3.7, panels: int = 0, note: str = "") -> Figure:
    """Draw once, and write it for the page, as an SVG and as a PNG.

    Args:
        name: Of its files.
        title: A line.
        draw: Given the axes, draws on them and says in words what is to be seen.
        height: In inches.
        panels: How many axes stand side by side, of which `draw` is given a list; 0 for one, given as it is.
        note: A line above.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    with matplotlib.rc_context(_STYLE):
        canvas = Canvas(figsize=(5.4 if panels < 2 else 8.6, min(height, 14)), layout="constrained")
        FigureCanvasAgg(canvas)
        axes: Any = canvas.subplots(1, max(1, panels), sharey=True, squeeze=False)[0]
        alt = f"{title}. {draw([*axes] if panels else axes[0])}"
        found = {}
        for one in axes:
            found |= {label: handle for handle, label in zip(*one.get_legend_handles_labels(), strict=True)}
        if found:
            columns = min(len(found), 3 if panels > 1 else 2)
            canvas.legend(found.values(), found, loc="outside lower center", ncols=columns)
        if note:
            canvas.suptitle(note, fontsize=9)

        out = io.StringIO(), io.BytesIO()
        told: Any = {"metadata": dict.fromkeys(("Date", "Creator", "Format", "Type"))}
        canvas.savefig(out[0], format="svg", transparent=True, **told)
        canvas.savefig(out[1], format="png", dpi=150)
    svg = out[0].getvalue()
    white = re.sub(r"(<svg [^>]*>)", r'\1<rect width="100%" height="100%" fill="white"/>', svg, count=1)
    return Figure(name, title, alt, _themed(svg, name), white.encode(), out[1].getvalue(), panels > 1)


def _themed(svg: str, name: str) -> str:
    """An SVG as a part of a page: without a prologue, its names its own, its colours the page's."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg).replace("xlink:href", "href")
    for number, colour in enumerate(COLOURS):
        svg = svg.replace(colour, f"var(--c{number})")
    svg = svg.replace(INK, "var(--ink)").replace(FAINT, "var(--faint)")
    return re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true">', svg, count=1)


def bars(axes: Any, x: Sequence[float], means: Sequence[Interval], colour: str) -> None:
    for place, one in zip(x, means, strict=True):
        if one.low is not None and one.high is not None:
            axes.errorbar([place], [one.mean], [[one.mean - one.low], [one.high - one.mean]], color=colour, capsize=3)


def said(one: Interval) -> str:
    if one.low is None:
        return f"{one.mean:.2f} % ({one.count} seed{'s' * (one.count > 1)}, no interval)"
    return f"{one.mean:.2f} % (95 % interval {one.low:.2f} to {one.high:.2f}, {one.count} seeds)"
