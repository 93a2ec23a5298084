"""The command line: each command is one function of the package. torch is imported only when a command needs it."""

import json
import math
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help="name of a shipped recipe, or a YAML file")]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="override, e.g. pruner.sparsity=0.9")]
_ROWS = 1_000  # of a table; timm's deepest, resnetrs420, has 704 layers
Restart = Annotated[bool, typer.Option("--restart", help="delete the folder's earlier results and begin again")]


@app.callback()
def _about() -> None:
    """Lottery tickets for any timm model.

    Exit codes: 0 done; 2 a wrong setting, a training or a file that failed; 130 stopped by Ctrl-C; 143 stopped by
    SIGTERM, after a checkpoint. Stopped, the same command continues.
    """


@contextmanager
def _errors() -> Iterator[None]:
    """Turn what a user can mend into one message on standard error, without a traceback."""
    from .core.errors import SettingError, TicketError, TrainingError, shown
    from .distributed.sigterm import STOPPED, Stopped

    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            yield
    except KeyboardInterrupt:
        print("stopped; the same command continues", file=sys.stderr)
        raise typer.Exit(130) from None
    except Stopped:
        print("stopped by SIGTERM; the same command continues", file=sys.stderr)
        raise typer.Exit(STOPPED) from None
    except (SettingError, TicketError, TrainingError, OSError) as error:
        # Whoever raised it has cut what a stranger says; what still comes through is not to steer the terminal.
        print("error:", "\n".join(shown(line, 2000) for line in str(error).split("\n")[:60]), file=sys.stderr)
        raise typer.Exit(2) from None


def _show_warning(text: Any, kind: type[Warning], file: str, line: int, *_: Any) -> None:
    """One line on standard error; a place in the code says nothing to who typed a command."""
    shown = f"warning: {text}" if kind is UserWarning else warnings.formatwarning(text, kind, file, line).rstrip()
    print(shown, file=sys.stderr)


def _say_more(console: Console, layers: int) -> None:
    """After a table of so many layers, of which the first are shown."""
    if layers > _ROWS:
        console.print(f"and {layers - _ROWS:,} more layers")


@app.command("list")
def list_(pattern: Annotated[str, typer.Argument(help="wildcard on the names")] = "*") -> None:
    """Show the registered pruners and retraining tweaks, and their settings."""
    with _errors():
        from .pruning.method import Method
        from .pruning.registry import get_method, list_pruners
        from .tweaks.registry import get_tweak, list_tweaks

        def told(fields: Any) -> Text:
            return Text(", ".join(k if info.is_required() else f"{k}={info.default!r}" for k, info in fields))

        common: Any = Method
        common = common.__pydantic_fields__
        table = Table(box=None, header_style="bold")
        for title in ("pruner", "what it does", "settings"):
            table.add_column(title)
        for name in list_pruners(pattern):
            method: Any = get_method(name)
            own = [(key, info) for key, info in method.__pydantic_fields__.items() if key not in common]
            table.add_row(name, (method.__doc__ or "").strip().splitlines()[0], told(own))
        table.add_row("every pruner", "", told(common.items()), style="dim")
        console = Console()
        console.print(table)
        table = Table(box=None, header_style="bold")
        for title in ("retraining tweak", "what it does", "settings"):
            table.add_column(title)
        for name in list_tweaks(pattern):
            tweak: Any = get_tweak(name)
            about = (tweak.__doc__ or "").strip().splitlines()[0]
            table.add_row(name, about, told(tweak.__pydantic_fields__.items()))
        if table.row_count:
            console.print(table)


@app.command()
def search(
    recipe: RecipeName,
    set: Set = None,
    seeds: Annotated[
        str | None,
        typer.Option(metavar="0,1,2", help="search once for each of these seeds, in folders seed_0 ... of the output"),
    ] = None,
    restart: Restart = False,
) -> None:
    """Search a ticket as a recipe says, and train it; continue where an earlier call stopped."""
    with _errors():
        if seeds is not None:
            from .experiments.seeds import search_seeds, seeds_of

            search_seeds(recipe, seeds_of(seeds), set or (), restart=restart)
            return
        from .experiments.search import search as run

        run(recipe, set or (), restart=restart)


@app.command()
def train(
    recipe: RecipeName,
    ticket: Annotated[str | None, typer.Option(help="ticket to train; the dense network where not given")] = None,
    set: Set = None,
    restart: Restart = False,
) -> None:
    """Train a ticket under a recipe's data and training."""
    with _errors():
        from .experiments.train import train as run

        run(recipe, ticket, set or (), restart=restart)


@app.command()
def transfer(
    ticket: Annotated[str, typer.Argument(metavar="TICKET", help="ticket found on another data set")],
    recipe: RecipeName,
    set: Set = None,
    control: Annotated[
        list[str] | None,
        typer.Option(help="train beside it: dense, random, native, none; the first three if not given"),
    ] = None,
    recompute_bn: Annotated[bool, typer.Option("--recompute-bn", help="batch-norm statistics of the target")] = False,
    restart: Restart = False,
) -> None:
    """Train a ticket under another task's recipe: other classes, channels or image size; controls beside it."""
    with _errors():
        from .experiments.transfer import CONTROLS
        from .experiments.transfer import transfer as run

        controls = CONTROLS if control is None else [name for name in control if name != "none"]
        run(recipe, ticket, set or (), controls=controls, recompute_batch_norm=recompute_bn, restart=restart)


@app.command()
def info(
    file: Annotated[str, typer.Argument(metavar="TICKET", help="a file, hf-hub:user/name or local-dir:path")],
) -> None:
    """Show what a ticket is: architecture, pruner, sparsity by layer, metrics, and its size against the bound."""
    with _errors():
        from .core.errors import shown
        from .tickets.address import fetch
        from .tickets.reader import describe
        from .tickets.size import weigh

        path = fetch(file)
        size = weigh(path)
        # The weights a pretrained start needs may have to be fetched: looking at a file does not do that.
        metadata, fingerprint = describe(path)
        console = Console()
        kept = sum(layer.kept for layer in size.layers)
        total = sum(math.prod(layer.shape) for layer in size.layers)
        facts = {
            **{key: metadata.get(key) for key in ("model", "pruner", "recipe", "metrics", "rounding", "versions")},
            "sparsity": f"{1 - kept / total:.6f}: {kept:,} of {total:,} weights kept",
            "start": size.origin,
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
        table = Table(box=None, header_style="bold")
        table.add_column("layer")
        for title in ("shape", "kept", "sparsity", "free", "mask bits", "bound", "start bytes"):
            table.add_column(title, justify="right")
        for layer in size.layers[:_ROWS]:
            sparsity = 1 - layer.kept / math.prod(layer.shape)
            numbers = (f"{layer.free:,}", f"{layer.bits:,.0f}", f"{layer.bound:,.0f}", f"{layer.start:,}")
            shape = "x".join(map(str, layer.shape))
            table.add_row(Text(layer.name), shape, f"{layer.kept:,}", f"{sparsity:.4f}", *numbers)
        console.print(table)
        _say_more(console, len(size.layers))


@app.command()
def compare(
    files: Annotated[list[str], typer.Argument(metavar="TICKET...", help="two tickets of one model, or more")],
    plot: Annotated[Path | None, typer.Option(help="draw the overlaps as a heat map here, a PNG")] = None,
) -> None:
    """Show how much tickets share, beside what chance would share; of two tickets, by layer."""
    with _errors():
        from .core.errors import SettingError, shown
        from .core.masks import kept, layer_sparsities
        from .tickets.compare import heat_map, layer_overlaps, overlap
        from .tickets.ticket import load_ticket

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
                table.add_column(title, justify="left" if title == "layer" else "right")
            for name, found in islice(layer_overlaps(*masks).items(), _ROWS):
                densities = f"{1 - first[name]:.4f}", f"{1 - second[name]:.4f}"
                table.add_row(Text(name), *densities, *(f"{value:.4f}" for value in found.values()))
            console.print(table)
            _say_more(console, len(masks[0]))
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
    with _errors():
        from .tickets.publish import push as run

        print(run(file, to, plot, private))


@app.command()
def inspect(
    arch: Annotated[str, typer.Argument(metavar="ARCH", help="a timm architecture")],
    include: Annotated[list[str] | None, typer.Option(help="wildcard of the weights that may be pruned")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="wildcard of the weights that are left alone")] = None,
    classifier: Annotated[bool, typer.Option("--classifier", help="prune the classifier too")] = False,
    set: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="argument of timm.create_model, e.g. num_classes=10"),
    ] = None,
) -> None:
    """Show layer by layer what would be pruned in an architecture, what would not, and why."""
    with _errors():
        from collections import Counter

        from .sparse.prunable import build_to_inspect, inspect_model

        parts = inspect_model(build_to_inspect(arch, set or ()), include or ("*",), exclude or (), classifier)
        whole = sum(part.size for part in parts)
        console = Console()

        def show(title: str, rows: list[tuple[str, str, str, int]]) -> None:
            table = Table(box=None, header_style="bold")
            table.add_column(title, overflow="fold")
            table.add_column("kind" if title == "prunable" else "why not")
            for name in ("shape", "weights", "of all"):
                table.add_column(name, justify="right")
            for name, kind, shape, size in rows:
                table.add_row(Text(name), kind, shape, f"{size:,}", f"{size / whole:.2%}")
            console.print(table)

        prunable = [part for part in parts if not part.why_not]
        shown = [(part.name, part.kind, "x".join(map(str, part.shape)), part.size) for part in prunable]
        count = sum(part.size for part in prunable)
        show("prunable", [*shown, (f"{len(prunable)} layers", "", "", count)])
        console.print()
        left, vectors = [], Counter()
        for part in parts:
            if part.why_not and part.kind == "vector" and part.why_not != "classifier":
                vectors[part.why_not] += part.size
            elif part.why_not:
                why = part.why_not if part.why_not == "classifier" else f"{part.kind}: {part.why_not}"
                left.append((part.name, why, "x".join(map(str, part.shape)), part.size))
        left += [("biases, scales and other vectors", why, "", size) for why, size in vectors.items()]
        show("left alone", [*left, (f"{len(parts) - len(prunable)} parameters", "", "", whole - count)])


@app.command()
def recipe(
    name: Annotated[str | None, typer.Argument(metavar="RECIPE", help="name of a shipped recipe, or a file")] = None,
    set: Set = None,
    list: Annotated[bool, typer.Option("--list", help="list the shipped recipes with their source")] = False,
    schema: Annotated[Path | None, typer.Option(help="write a JSON Schema of recipes here, for editors")] = None,
) -> None:
    """Print a recipe with every setting resolved."""
    with _errors():
        from .config.files import list_recipes
        from .config.recipe import json_schema, load_recipe
        from .storage.files import write_json

        if schema is not None:
            write_json(schema, json_schema())
        elif list or name is None:
            for one in list_recipes():
                print(f"{one}: {load_recipe(one).source or 'no source given'}")
        else:
            print(load_recipe(name, set or ()).to_yaml(), end="")


def main() -> None:
    app()
