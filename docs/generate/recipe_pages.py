"""Pages about recipes: every key, from the schema, and every recipe that is shipped."""

from cards import RECIPES, settings_table, text

import timm_tickets as tt
from timm_tickets.config.files import read_recipe
from timm_tickets.config.find import find_leaderboard
from timm_tickets.config.recipe import Recipe
from timm_tickets.config.schema import explain
from timm_tickets.core.settings import explained, schema_of

_PARTS = ("model", "data", "training", "retrain")


def _keys() -> str:
    top = {one.name: one for one in explained(schema_of(Recipe))}
    parts = [
        "# Every key of a recipe",
        "Made from the schema, as `timm-tickets recipe --explain KEY` has it and `timm-tickets recipe --schema FILE` "
        "writes it for an editor. A key that is not here is refused, and the closest one named.",
        "## The recipe",
        settings_table([one for one in explain("*") if "." not in one.name]),
    ]
    for part in _PARTS:
        keys = [one for one in explain(part) if one.name != part]
        parts += [f"## {part}", text(top[part].about) + ".", settings_table(keys)]
    parts += [
        "## pruner",
        f"{text(top['pruner'].about)}. [Every pruner's settings](methods/index.md#settings-of-every-pruner); "
        "a method's own stand on its page.",
    ]
    return "\n\n".join(parts) + "\n"


def _shipped() -> str:
    parts = [
        "# The shipped recipes",
        "`timm-tickets recipe NAME` prints one with every setting; `--list` lists them. Those "
        "named `METHOD_DATASET_NETWORK` hold a paper's settings ([reproducing the papers](papers.md)).",
    ]
    sets = {
        "digits": "Digits",
        "torch/cifar10": "CIFAR-10",
        "torch/cifar100": "CIFAR-100",
        "folder": "ImageNet, or any folder",
    }
    for dataset, title in sets.items():
        rows = []
        for name, one in RECIPES.items():
            if one.data.dataset == dataset:
                pruner = "" if name.startswith("dense_") else f"`{one.pruner['name']}` to {one.pruner['sparsity']:g}, "
                rows.append(f"- `{name}`: {pruner}{text(one.model.model)}; {text(one.source or '')}")
        parts += [f"## {title}", "\n".join(rows)]
    boards = [f"- `{one}`: {text(read_recipe(find_leaderboard(one))['source'])}" for one in tt.list_leaderboards()]
    parts += [
        "## Leaderboards",
        "`timm-tickets leaderboard NAME` runs [one](leaderboard.md).",
        "\n".join(boards),
    ]
    if left := {one.data.dataset for one in RECIPES.values()} - set(sets):
        raise ValueError(
            f"docs/generate/recipe_pages.py: no title for the data sets {sorted(left)}; add them to `sets`"
        )
    return "\n\n".join(parts) + "\n"


def pages() -> dict[str, str]:
    """The text of both pages by place."""
    return {"recipe_keys.md": _keys(), "recipe_list.md": _shipped()}
