"""Commands that show what there is to prune with, and what would be pruned in an architecture."""

from fnmatch import fnmatchcase
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .app import app, errors, print_settings


@app.command("list")
def list_(
    pattern: Annotated[str, typer.Argument(metavar="NAME", help="a pruner or tweak, or a wildcard on the names")] = "*",
) -> None:
    """Show the pruners and retraining tweaks; of one, by its name, what it is for, its cost and its settings."""
    with errors():
        from ..core.errors import SettingError, unknown

        kinds = {"pruner": _lines("pruner", "methods"), "retraining tweak": _lines("tweak", "tweaks")}
        found = {
            kind: {name: line for name, line in lines.items() if fnmatchcase(name, pattern)}
            for kind, lines in kinds.items()
        }
        console = Console()
        match [(kind, name) for kind, lines in found.items() for name in lines]:
            case []:
                raise SettingError(
                    unknown("pruner or tweak", pattern, [name for lines in kinds.values() for name in lines])
                )
            case [(kind, name)]:
                _show(console, kind, name)
                return
        table = Table.grid(padding=(0, 2))
        for kind, lines in found.items():
            if lines:
                table.add_row(Text(f"{kind}s", style="bold"))
            for name, line in lines.items():
                table.add_row(Text(f"  {name}"), Text(line))
        console.print(table)
        console.print("\n`timm-tickets list NAME` shows what one is for, what it costs and its settings.")


def _lines(kind: str, package: str) -> dict[str, str]:
    """Names of pruners or tweaks, sorted, and each in a line; torch is waited for only by another package's."""
    from ..core.registry import read_lines, strangers
    from ..core.settings import about

    if not strangers(kind):
        return read_lines(kind, f"timm_tickets.{package}")
    from ..pruning.registry import get_method, list_pruners
    from ..tweaks.registry import get_tweak, list_tweaks

    names, get = (list_pruners, get_method) if kind == "pruner" else (list_tweaks, get_tweak)
    return {name: about(get(name)) for name in names()}


def _show(console: Console, kind: str, name: str) -> None:
    """What there is to know of one pruner or tweak."""
    from ..core.settings import card, explained, schema_of
    from ..pruning.method import Method
    from ..pruning.registry import get_method
    from ..tweaks.registry import get_tweak

    cls = get_method(name) if kind == "pruner" else get_tweak(name)
    console.print(Text.assemble((name, "bold"), f", a {kind}\n"))
    for label, text in card(cls):
        console.print(Text.assemble((label, "bold"), text))
    own, shared = list(explained(schema_of(cls))), []
    if kind == "pruner":
        every = list(explained(schema_of(Method)))
        own, shared = [one for one in own if one not in every], [one for one in own if one in every]
    for title, settings in ((f"settings of {name}", own), ("settings of every pruner", shared)):
        if settings:
            console.print(Text(f"\n{title}", style="bold"))
            print_settings(console, settings)


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

        from ..config.files import read_overrides
        from ..sparse.prunable import build_to_inspect, inspect_model

        arguments = read_overrides(set or ())
        wanted = include or ("*",), exclude or (), classifier
        if granularity != "weight":
            _show_units(arch, granularity, wanted, arguments)
            return

        parts = inspect_model(build_to_inspect(arch, arguments), *wanted)
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
    groups = find_groups(build_to_inspect(arch, arguments, "cpu"), *wanted, removable=True)
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
