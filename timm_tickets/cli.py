"""The command line: each command is one function of the package. torch is imported only when a command needs it."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help="name of a shipped recipe, or a YAML file")]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="override, e.g. pruner.sparsity=0.9")]
Restart = Annotated[bool, typer.Option("--restart", help="delete the folder's earlier results and begin again")]


@app.callback()
def _about() -> None:
    """Lottery tickets for any timm model."""


@contextmanager
def _errors() -> Iterator[None]:
    """Turn what a user can mend into one message on standard error, without a traceback."""
    from .settings import SettingError, TrainingError
    from .ticket import TicketError

    try:
        yield
    except KeyboardInterrupt:
        print("stopped; the same command continues", file=sys.stderr)
        raise typer.Exit(130) from None
    except (SettingError, TicketError, TrainingError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from None


@app.command("list")
def list_(pattern: Annotated[str, typer.Argument(help="wildcard on the names")] = "*") -> None:
    """Show the registered pruners and retraining tweaks, and their settings."""
    with _errors():
        from .method import Method
        from .registry import get_method, get_tweak, list_pruners, list_tweaks

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
def search(recipe: RecipeName, set: Set = None, restart: Restart = False) -> None:
    """Search a ticket as a recipe says, and train it; continue where an earlier call stopped."""
    with _errors():
        from .experiment import search as run

        run(recipe, set or (), restart=restart)


@app.command()
def train(
    recipe: RecipeName,
    ticket: Annotated[Path | None, typer.Option(help="ticket to train; the dense network where not given")] = None,
    set: Set = None,
    restart: Restart = False,
) -> None:
    """Train a ticket under a recipe's data and training."""
    with _errors():
        from .experiment import train as run

        run(recipe, ticket, set or (), restart=restart)


@app.command()
def info(file: Annotated[Path, typer.Argument(metavar="FILE", help="a .ticket file")]) -> None:
    """Show what a ticket is: architecture, pruner, sparsity by layer, metrics, size."""
    with _errors():
        from .masks import kept, layer_sparsities, total
        from .ticket import load_ticket

        ticket = load_ticket(file)
        console = Console()
        values = sum(value.nbytes for value in ticket.values.values())
        facts = {
            **{key: ticket.metadata.get(key) for key in ("model", "pruner", "recipe", "metrics", "versions")},
            "sparsity": f"{ticket.sparsity:.6f}: {kept(ticket.masks):,} of {total(ticket.masks):,} weights kept",
            "size": f"{file.stat().st_size:,} bytes; the dense state is {values:,} bytes",
            "fingerprint": ticket.fingerprint,
        }
        for key, value in facts.items():
            text = value if isinstance(value, str) else json.dumps(value)
            console.print(f"[bold]{key}[/bold]: ", end="")
            console.print(text, markup=False, highlight=False, soft_wrap=True)
        table = Table(box=None, header_style="bold")
        table.add_column("layer")
        for title in ("shape", "kept", "sparsity"):
            table.add_column(title, justify="right")
        for name, layer in layer_sparsities(ticket.masks).items():
            mask = ticket.masks[name]
            table.add_row(Text(name), "x".join(map(str, mask.shape)), f"{int(mask.sum()):,}", f"{layer:.4f}")
        console.print(table)


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

        from .prunable import build_to_inspect, inspect_model

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
        from .files import write_json
        from .recipe import json_schema, list_recipes, load_recipe

        if schema is not None:
            write_json(schema, json_schema())
        elif list or name is None:
            for one in list_recipes():
                print(f"{one}: {load_recipe(one).source or 'no source given'}")
        else:
            print(load_recipe(name, set or ()).to_yaml(), end="")


def main() -> None:
    app()
