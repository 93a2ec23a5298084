"""Seeds: the same search once for each of several seeds, and the mean and spread of what they find."""

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..config.recipe import Recipe, load_recipe
from ..core.errors import SettingError
from ..distributed.processes import apart, place, wait_for_others
from ..storage.files import appearing, is_writer
from ..storage.tables import write_csv
from ..tickets.ticket import load_ticket
from .console import console_here
from .controls import asked_parallel, groups_apart
from .report import say
from .result import Result, hands_out
from .run_folder import RESULT, check_folder, working_in
from .search import search

SUMMARY = "seeds.csv"
_MEASURED: tuple[str, ...] = ("sparsity", "test_top1", "dense_test_top1")


def search_seeds(
    recipe: str | Path | Recipe,
    seeds: Sequence[int],
    overrides: Sequence[str] = (),
    *,
    restart: bool = False,
    console: Console | None = None,
) -> list[Result]:
    """Search a recipe's ticket once for each seed, and sum up; called again, continue where it stopped.

    Each search is what `search` does with ``seed=S``, in the folder ``seed_S`` of the recipe's output; beside these
    folders, ``seeds.csv`` has test top-1 (percent) of every ticket and its dense control, mean and standard deviation.
    Several processes share the seeds as the recipe's ``parallel`` says: by ``runs``, and by ``auto`` where there are at
    least as many seeds as groups of ``processes_per_run``, each group searches seeds of its own; else all search one
    seed after the other together.

    Args:
        recipe: Name of a shipped recipe, path, or a loaded one.
        seeds: Two seeds or more, none twice. A later call may have more of them.
        overrides: Settings like ``pruner.sparsity=0.9``.
        restart: Delete what earlier searches with these seeds left, and begin again.
        console: Where progress and tables go, of the first process's seeds alone; standard output where None.

    Returns:
        What each seed's search left, in the order of the seeds.

    Raises:
        SettingError: Wrong seeds; else as `search`.
        Stopped, TrainingError, OSError: As `search`.
    """
    seeds = tuple(seeds)
    if len(seeds) < 2 or len({*seeds}) < len(seeds) or min(seeds) < 0:
        raise SettingError(
            f"seeds: {', '.join(map(str, seeds)) or 'none'} is not valid; give two different numbers or more, from 0 "
            "on, such as 0,1,2, or set `seed` for a single one"
        )
    whole, console = load_recipe(recipe, overrides), console or console_here()
    recipes = []
    for seed in seeds:
        one = load_recipe(recipe, [*overrides, f"seed={seed}"])
        recipes.append(one.model_copy(update={"output": whole.folder / f"seed_{seed}"}))
    with working_in(whole.folder, partial(say, console)):
        if restart:  # all at once: stopped now, it is continued without asking for a restart again
            _clear(recipes, whole.folder, console)
        mine, groups = _groups(whole, len(seeds))
        told = console if place()[0] == 0 else Console(quiet=True)  # several at once would write over each other
        if len({one.pruner["seed"] for one in recipes}) == 1:
            fixed = f"pruner.seed: the recipe sets it to {whole.pruner['seed']}, whatever the seed"
            say(told, f"{fixed}; leave it out to have it follow")
        for number, one in enumerate(recipes):
            if number % groups == mine:
                say(told, f"seed {one.seed}, {number + 1} of {len(seeds)}: {one.folder}")
                with apart(whole.processes_per_run if groups > 1 else None):
                    search(one, console=told)
        wait_for_others()
        results = [_found(one) for one in recipes]
        rows = [{"seed": one.seed, **_measured(found)} for one, found in zip(recipes, results, strict=True)]
        over = {"mean": statistics.mean, "std": statistics.stdev}  # of a sample: divided by n - 1
        rows += [{"seed": name, **{key: _over(how, rows, key) for key in _MEASURED}} for name, how in over.items()]
        if is_writer():
            write_csv(rows, ("seed", *_MEASURED), whole.folder / SUMMARY)
            _print(rows, console)
    return results


def seeds_of(text: str) -> list[int]:
    """The seeds of a list such as ``0,1,2``.

    Raises:
        SettingError: Something in it is no number.

    >>> seeds_of("0,1,2")
    [0, 1, 2]
    """
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise SettingError(f"seeds: {text!r} is not valid; give numbers with commas between, such as 0,1,2") from None


def _clear(recipes: Sequence[Recipe], folder: Path, console: Console) -> None:
    for one in recipes:
        with working_in(one.folder, partial(say, console)):
            check_folder(one.folder, one, "search", restart=True)
    if is_writer():
        (folder / SUMMARY).unlink(missing_ok=True)


def _groups(recipe: Recipe, seeds: int) -> tuple[int, int]:
    """Number of this process's group, and how many groups search seeds of their own; 1 where all search together."""
    mine, groups = groups_apart(recipe)
    return (mine, groups) if hands_out(asked_parallel(recipe), seeds, groups) else (0, 1)


def _found(recipe: Recipe) -> Result:
    """What a finished search has left, whichever process has done it."""
    rows = appearing(recipe.folder / RESULT)["rows"]
    return Result(recipe.folder, load_ticket(recipe.folder / f"{recipe.name}.ticket"), rows)


def _measured(found: Result) -> dict[str, float | None]:
    metadata = found.ticket.metadata
    dense = metadata.get("dense", {}).get("test_top1")
    values = (found.ticket.sparsity, metadata["metrics"]["test_top1"], dense)
    return dict(zip(_MEASURED, values, strict=True))


def _over(how: Callable[[list[Any]], float], rows: list[dict[str, Any]], key: str) -> float | None:
    """One number for all seeds; None where one of them has none, as a search without a dense control."""
    values = [row[key] for row in rows]
    return None if None in values else how(values)


def _print(rows: list[dict[str, Any]], console: Console) -> None:
    table = Table(box=None, header_style="bold")
    for title in ("seed", "sparsity", "test top-1", "dense"):
        table.add_column(title, justify="left" if title == "seed" else "right", no_wrap=True)
    for row in rows:
        sparsity, *scores = (row[key] for key in _MEASURED)
        table.add_row(
            str(row["seed"]), f"{sparsity:.4f}", *("" if score is None else f"{score:.2f}" for score in scores)
        )
    console.print(table)
