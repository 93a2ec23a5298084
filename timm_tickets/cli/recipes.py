"""Commands that search, train and transfer a recipe, and print one."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .app import RecipeName, Restart, Set, app, errors, loading, print_settings, say_loading


@app.command()
def search(
    recipe: RecipeName,
    set: Set = None,
    seeds: Annotated[
        str | None,
        typer.Option(metavar="0,1,2", help="search once for each of these seeds, in folders seed_0 ... of the output"),
    ] = None,
    restart: Restart = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="only say how many runs and steps, how much time and disk it takes")
    ] = False,
) -> None:
    """Search a ticket as a recipe says, and train it; continue where an earlier call stopped."""
    with errors():
        loading(recipe, set or ())
        if dry_run:
            from ..experiments.dry_run import dry_run as estimate

            estimate(recipe, set or ())
            if seeds is not None:
                print(f"this is one seed's search; --seeds {seeds} searches once for each")
            return
        if seeds is not None:
            from ..experiments.seeds import search_seeds, seeds_of

            search_seeds(recipe, seeds_of(seeds), set or (), restart=restart)
            return
        from ..experiments.search import search as run

        run(recipe, set or (), restart=restart)


@app.command()
def train(
    recipe: RecipeName,
    ticket: Annotated[str | None, typer.Option(help="ticket to train; the dense network where not given")] = None,
    set: Set = None,
    restart: Restart = False,
) -> None:
    """Train a ticket under a recipe's data and training."""
    with errors():
        loading(recipe, set or ())
        from ..experiments.train import train as run

        run(recipe, ticket, set or (), restart=restart)


@app.command()
def transfer(
    ticket: Annotated[str, typer.Argument(metavar="TICKET", help="ticket found on another data set")],
    recipe: RecipeName,
    set: Set = None,
    control: Annotated[
        list[str] | None,
        typer.Option(
            help="train beside it: native, one of the recipe's controls, none; the recipe's, or dense, shuffled_layers "
            "and native, if not given"
        ),
    ] = None,
    recompute_bn: Annotated[bool, typer.Option("--recompute-bn", help="batch-norm statistics of the target")] = False,
    restart: Restart = False,
) -> None:
    """Train a ticket under another task's recipe: other classes, channels or image size; controls beside it."""
    with errors():
        loading(recipe, set or ())
        from ..experiments.transfer import transfer as run

        controls = None if control is None else [name for name in control if name != "none"]
        run(recipe, ticket, set or (), controls=controls, recompute_batch_norm=recompute_bn, restart=restart)


@app.command()
def leaderboard(
    leaderboard: Annotated[
        str, typer.Argument(metavar="LEADERBOARD", help="name of a shipped leaderboard, or a YAML file")
    ],
    set: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="setting of all entries, e.g. training.epochs=4; or seeds=[0,1]"
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="folder of all run folders and the report; output/<name> if not given")
    ] = None,
) -> None:
    """Search many entries at several sparsities and seeds, and report what beats what; any number of calls share it."""
    with errors():
        from ..config.files import read_overrides, read_recipe
        from ..config.find import find_leaderboard

        read_recipe(find_leaderboard(leaderboard))
        read_overrides(set or ())
        say_loading(leaderboard)
        from ..leaderboards.work import leaderboard as run

        run(leaderboard, set or (), output=output)


@app.command()
def recipe(
    name: Annotated[str | None, typer.Argument(metavar="RECIPE", help="name of a shipped recipe, or a file")] = None,
    set: Set = None,
    list: Annotated[bool, typer.Option("--list", help="list the shipped recipes with their source")] = False,
    explain: Annotated[
        str | None,
        typer.Option(metavar="KEY", help="say what a key means, such as training.lr; a part (training); a wildcard"),
    ] = None,
    schema: Annotated[Path | None, typer.Option(help="write a JSON Schema of recipes here, for editors")] = None,
) -> None:
    """Print a recipe with every setting resolved; or say what a key of recipes means."""
    with errors():
        from ..config.files import read_overrides, read_recipe
        from ..config.find import find_leaderboard, find_recipe, list_leaderboards, list_recipes

        if schema is None and explain is None and (list or name is None):  # only what stands in the files: no torch
            for one in [*map(find_recipe, list_recipes()), *map(find_leaderboard, list_leaderboards())]:
                print(f"{one.stem}: {read_recipe(one).get('source') or 'no source given'}")
            return
        if name is not None:  # what is wrong at first sight is said without torch
            read_recipe(find_recipe(name))
        read_overrides(set or ())
        from ..config.recipe import load_recipe
        from ..config.schema import explain as explained
        from ..config.schema import json_schema
        from ..storage.files import write_json

        if explain is not None:
            print_settings(Console(), explained(explain))
        elif schema is not None:
            write_json(schema, json_schema())
        else:
            print(load_recipe(name or "", set or ()).to_yaml(), end="")
