"""Commands that search, train and transfer a recipe, and print one."""

import json
from pathlib import Path
from typing import Annotated

import typer

from .app import RecipeName, Restart, Set, app, errors, loading


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
        typer.Option(help="train beside it: dense, random, native, none; the first three if not given"),
    ] = None,
    recompute_bn: Annotated[bool, typer.Option("--recompute-bn", help="batch-norm statistics of the target")] = False,
    restart: Restart = False,
) -> None:
    """Train a ticket under another task's recipe: other classes, channels or image size; controls beside it."""
    with errors():
        loading(recipe, set or ())
        from ..experiments.transfer import CONTROLS
        from ..experiments.transfer import transfer as run

        controls = CONTROLS if control is None else [name for name in control if name != "none"]
        run(recipe, ticket, set or (), controls=controls, recompute_batch_norm=recompute_bn, restart=restart)


@app.command()
def recipe(
    name: Annotated[str | None, typer.Argument(metavar="RECIPE", help="name of a shipped recipe, or a file")] = None,
    set: Set = None,
    list: Annotated[bool, typer.Option("--list", help="list the shipped recipes with their source")] = False,
    schema: Annotated[Path | None, typer.Option(help="write a JSON Schema of recipes here, for editors")] = None,
) -> None:
    """Print a recipe with every setting resolved."""
    with errors():
        from ..config.files import find_recipe, list_recipes, read_overrides, read_recipe

        if schema is None and (list or name is None):  # of what stands in the files: nobody waits for torch
            for one in list_recipes():
                print(f"{one}: {read_recipe(find_recipe(one)).get('source') or 'no source given'}")
            return
        from .answers import kept, write_text

        values = None if name is None else read_recipe(find_recipe(name))
        read_overrides(set or ())

        def resolved() -> str:
            from ..config.recipe import load_recipe

            return load_recipe(name or "", set or ()).to_yaml()

        def schema_text() -> str:
            from ..config.recipe import json_schema

            return json.dumps(json_schema(), indent=2) + "\n"

        if schema is not None:
            write_text(schema, kept("schema", schema_text))
        else:
            print(kept([values, set], resolved), end="")
