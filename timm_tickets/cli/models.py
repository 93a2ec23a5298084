"""Commands that show what there is to prune with, and what would be pruned in an architecture."""

from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .app import app, errors


@app.command("list")
def list_(pattern: Annotated[str, typer.Argument(help="wildcard on the names")] = "*") -> None:
    """Show the registered pruners and retraining tweaks, and their settings."""
    with errors():
        from ..pruning.method import Method
        from ..pruning.registry import get_method, list_pruners
        from ..tweaks.registry import get_tweak, list_tweaks

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
def inspect(
    arch: Annotated[str, typer.Argument(metavar="ARCH", help="a timm architecture")],
    include: Annotated[list[str] | None, typer.Option(help="wildcard of the weights that may be pruned")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="wildcard of the weights that are left alone")] = None,
    classifier: Annotated[bool, typer.Option("--classifier", help="prune the classifier too")] = False,
    set: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="argument of timm.create_model, e.g. num_classes=10"),
    ] = None,
    granularity: Annotated[
        str, typer.Option(help="what is cut as one: channel, head, 2:4, 'block 4x4'; then what of it there is")
    ] = "weight",
) -> None:
    """Show layer by layer what would be pruned in an architecture, what would not, and why."""
    with errors():
        from collections import Counter

        from ..sparse.prunable import build_to_inspect, inspect_model

        if granularity != "weight":
            _show_units(arch, granularity, (include or ("*",), exclude or (), classifier), set or ())
            return

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


def _show_units(arch: str, granularity: str, wanted: tuple[Any, Any, bool], arguments: Any) -> None:
    """What can be cut as one in an architecture, what cannot, and why."""
    from ..core.errors import SettingError
    from ..core.patterns import parsed
    from ..sparse.prunable import build_to_inspect, prunable_names
    from ..sparse.subnet import Subnet
    from ..structure.find import find_groups
    from ..structure.units import Pattern

    try:
        found = parsed(granularity)
    except ValueError as error:
        raise SettingError(f"--granularity: {error}") from None
    console = Console()

    def show(titles: tuple[str, ...], rows: Any) -> None:
        table = Table(*titles, box=None, header_style="bold")
        for row in rows:
            table.add_row(*map(Text, row))
        console.print(table)

    if found.kind in ("n:m", "block"):
        subnet = Subnet(build_to_inspect(arch, arguments), ())
        weights = dict(subnet.model.named_parameters())
        shapes = {name: tuple(weights[name].shape) for name in prunable_names(subnet.model, *wanted)}
        fits = Pattern(found, subnet.model, shapes).names
        for title, names in ((f"cut as {granularity}", fits), ("whole", [n for n in shapes if n not in fits])):
            show((title, "shape"), [(name, "x".join(map(str, shapes[name]))) for name in names])
            console.print()
        return
    groups = find_groups(build_to_inspect(arch, arguments, "cpu"), *wanted)
    groups = groups.heads() if found.kind == "head" else groups
    rows = groups.families
    joined = [(" + ".join(n for n, _ in one.makes), " + ".join(n for n, _ in one.reads)) for one in rows]
    told = [(makes, reads, f"{one.count} {one.kind}s") for (makes, reads), one in zip(joined, rows, strict=True)]
    show(("made by", "read by", "groups"), told)
    console.print(f"\n{len(groups)} groups, with {groups.share():.1%} of the prunable weights in them.")
    console.print(f"Tried in double precision: the largest change of an output was {groups.difference:.2g} of it.\n")
    sides = {0: "rows", 1: "columns"}
    left = [(name, sides.get(dim, f"dimension {dim}"), why) for (name, dim), why in groups.left]
    show(("in no group", "which", "why"), left)
