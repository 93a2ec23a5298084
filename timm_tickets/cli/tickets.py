"""Commands that look at tickets, compare and publish them."""

import json
import math
from itertools import islice
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .app import ROWS, app, errors, say_more


@app.command()
def info(
    file: Annotated[str, typer.Argument(metavar="TICKET", help="a file, hf-hub:user/name or local-dir:path")],
) -> None:
    """Show what a ticket is: architecture, pruner, sparsity by layer, metrics, and its size against the bound."""
    with errors():
        from ..core.errors import shown
        from ..tickets.address import ticket_at
        from ..tickets.reader import describe
        from ..tickets.size import weigh

        path = ticket_at(file)
        size = weigh(path)
        # The weights a pretrained start needs may have to be fetched: looking at a file does not do that.
        metadata, fingerprint = describe(path)
        console = Console()
        kept = sum(layer.kept for layer in size.layers)
        total = sum(math.prod(layer.shape) for layer in size.layers)
        epoch = metadata.get("start_epoch")
        late = f", rewound to epoch {epoch:g}: train on from there (--start-epoch {epoch:g})" if epoch else ""
        facts = {
            **{key: metadata.get(key) for key in ("model", "pruner", "recipe", "metrics", "rounding", "versions")},
            "sparsity": f"{1 - kept / total:.6f}: {kept:,} of {total:,} weights kept",
            "start": f"{size.origin}{late}",
            "size": f"{size.file:,} bytes, format {size.format}; the fp32 checkpoint is {size.checkpoint:,} bytes, "
            f"{size.checkpoint / size.file:.1f} times as large",
            "fingerprint": fingerprint,
        }
        for key, value in facts.items():
            text = value if isinstance(value, str) else json.dumps(value)
            console.print(f"[bold]{key}[/bold]: ", end="")
            # A stranger's words: nothing in them is to steer the terminal.
            console.print(shown(text, 1000), markup=False, highlight=False, soft_wrap=True)
        parts = Table(box=None, header_style="bold")
        for title in ("part", "bytes", "bound"):
            parts.add_column(title, justify="left" if title == "part" else "right")
        ratio = f"{size.bound:,.0f} (x {size.masks / size.bound:.4f})" if size.bound else "0"
        parts.add_row("masks", f"{size.masks:,}", ratio)
        parts.add_row("start", f"{size.start:,}", "")
        parts.add_row("batch-norm statistics", f"{size.statistics:,}", "")
        parts.add_row("other values", f"{size.rest:,}", "")
        parts.add_row("header", f"{size.header:,}", "")
        if size.padding:
            parts.add_row("padding", f"{size.padding:,}", "")
        least = size.bound + size.values
        parts.add_row("file", f"{size.file:,}", f"{least:,.0f} (x {size.file / least:.4f})" if least else "0")
        console.print(parts)
        table = Table(box=None, header_style="bold", padding=(0, 1, 0, 0))
        table.add_column("layer", overflow="fold", min_width=12)  # a name that is cut says nothing
        for title in ("shape", "kept", "sparsity", "free", "mask bits", "bound", "start bytes"):
            table.add_column(title, justify="right", no_wrap=title != "start bytes")
        for layer in size.layers[:ROWS]:
            sparsity = 1 - layer.kept / math.prod(layer.shape)
            numbers = (f"{layer.free:,}", f"{layer.bits:,.0f}", f"{layer.bound:,.0f}", f"{layer.start:,}")
            shape = "x".join(map(str, layer.shape))
            table.add_row(Text(layer.name), shape, f"{layer.kept:,}", f"{sparsity:.4f}", *numbers)
        console.print(table)
        say_more(console, len(size.layers))


@app.command()
def compare(
    files: Annotated[list[str], typer.Argument(metavar="TICKET...", help="two tickets of one model, or more")],
    plot: Annotated[Path | None, typer.Option(help="draw the overlaps as a heat map here, a PNG")] = None,
) -> None:
    """Show how much tickets share, beside what chance would share; of two tickets, by layer."""
    with errors():
        from ..core.errors import SettingError, shown
        from ..core.masks import kept, layer_sparsities
        from ..tickets.compare import heat_map, layer_overlaps, overlap
        from ..tickets.ticket import load_ticket

        if len(files) < 2:
            raise SettingError("compare: one ticket cannot be compared; give two or more")
        masks = [load_ticket(file).masks for file in files]
        stems = [shown(Path(file).stem) for file in files]
        names = stems if len({*stems}) == len(stems) else [f"{i} {stem}" for i, stem in enumerate(stems, 1)]
        table = Table(box=None, header_style="bold")
        for title in ("tickets", "kept", "and", "shared / either", "by chance", "shared / chance"):
            table.add_column(title, justify="left" if title == "tickets" else "right")
        for i, one in enumerate(masks):
            for j in range(i):
                found = overlap(masks[j], one)
                counts = f"{kept(masks[j]):,}", f"{kept(one):,}"
                table.add_row(Text(f"{names[j]}, {names[i]}"), *counts, *(f"{value:.4f}" for value in found.values()))
        console = Console()
        console.print(table)
        if len(masks) == 2:
            first, second = (layer_sparsities(one) for one in masks)
            table = Table(box=None, header_style="bold")
            for title in ("layer", "density", "and", "shared / either", "by chance", "shared / chance"):
                table.add_column(title, justify="left" if title == "layer" else "right", overflow="fold")
            for name, found in islice(layer_overlaps(*masks).items(), ROWS):
                densities = f"{1 - first[name]:.4f}", f"{1 - second[name]:.4f}"
                table.add_row(Text(name), *densities, *(f"{value:.4f}" for value in found.values()))
            console.print(table)
            say_more(console, len(masks[0]))
        if plot is not None:
            heat_map(names, masks, plot)


@app.command()
def push(
    file: Annotated[Path, typer.Argument(metavar="TICKET", help="the ticket to publish")],
    to: Annotated[str, typer.Argument(help="hf-hub:user/name, or local-dir:path")],
    plot: Annotated[Path | None, typer.Option(help="a PNG for the card, such as a search's accuracy.png")] = None,
    private: Annotated[bool, typer.Option(help="make the repository private")] = False,
) -> None:
    """Publish a ticket with a model card on the Hugging Face Hub, or in a folder."""
    with errors():
        from ..tickets.publish import push as run

        print(run(file, to, plot, private))
