"""Pages of methods and tweaks: from their docstrings and settings, from knowledge.py, and from what was measured."""

import re
from collections.abc import Iterable, Mapping

from figures import TABLE, Row, conditions, curve, measured, memory, rows_of, spread
from knowledge import GOALS, KINDS
from knowledge import METHODS as KNOWN

import timm_tickets as tt
from timm_tickets.core.errors import SettingError
from timm_tickets.core.settings import Setting, about, card, explained, schema_of

_ON_CHANNELS = "digits_imp_channels"


def _of_this_package(names: Iterable[str], get) -> list[str]:
    """Not those that the entry points of other installed packages bring."""
    return [name for name in names if get(name).__module__.startswith("timm_tickets.")]


METHODS = _of_this_package(tt.list_pruners(), tt.get_method)
TWEAKS = _of_this_package(tt.list_tweaks(), tt.get_tweak)
RECIPES = {name: tt.load_recipe(name) for name in tt.list_recipes()}


def complete(names: Iterable[str]) -> None:
    """Refuse to build a site that is silent about a pruner, or tells of one that is gone."""
    if wrong := sorted({*names} ^ {*KNOWN}):
        raise SettingError(
            f"docs/generate/knowledge.py: METHODS and the registered pruners differ by {wrong}; add or remove them"
        )


complete(METHODS)


def settings_table(settings: Iterable[Setting]) -> str:
    """Settings as a table of Markdown."""
    rows = ["| setting | default | meaning |", "|---|---|---|"]
    for one in settings:
        default = one.default.removeprefix("default ")
        default = f"`{default}`" if one.default.startswith("default ") else default
        kind = one.kind.replace("|", "\\|")
        rows.append(f"| `{one.name}` | {default} | {text(one.about)} ({kind}) |")
    return "\n".join(rows)


def text(words: str) -> str:
    """A docstring's words as Markdown has them."""
    words = re.sub(r"``([^`]*)``", r"`\1`", words).replace("|", "\\|")
    words = re.sub(r"(?<![`\w])((?:\d\d[01]\d)\.\d{4,5})", r"[\1](https://arxiv.org/abs/\1)", words)
    outside = re.split(r"(`[^`]*`|\]\([^)]*\))", words)
    plain = (re.sub(r"([*_])", r"\\\1", part).replace("<", "&lt;") for part in outside[::2])
    return "".join(next(plain) if i % 2 == 0 else part for i, part in enumerate(outside))


def _card(cls) -> str:
    """What a docstring says, but for its first line, which is the page's first: a paragraph each, labels in bold."""
    told = []
    for i, (label, words) in enumerate(card(cls)):
        if i:
            told.append(f"**{text(label.rstrip(': '))}**: {text(words)}" if label else text(words))
        elif rest := words.removeprefix(about(cls)).strip():
            told.append(text(rest))
    return "\n\n".join(told)


def _own(name: str) -> list[Setting]:
    every = {one.name: one for one in explained(schema_of(tt.Method))}
    return [one for one in explained(schema_of(tt.get_method(name))) if every.get(one.name) != one]


def commands(name: str) -> list[str]:
    """Commands that show a method and search by it on the embedded digits; the search's recipe is loaded here."""
    if f"digits_{name}" in RECIPES:
        recipe, given = f"digits_{name}", []
    else:
        recipe, given = _ON_CHANNELS, [f"pruner.name={name}"]
    start = tt.load_recipe(recipe, given).model.initial_checkpoint
    before = [f"timm-tickets search {start.parts[1]}"] if start else []  # output/NAME/... is what that one leaves
    more = "".join(f" --set {one}" for one in [*given, *([f"name=digits_{name}"] if given else [])])
    search = f"timm-tickets search {recipe}{more}"
    return [f"timm-tickets list {name}", *before, f"{search} --dry-run", search]


def method_page(name: str) -> str:
    """All there is to know of a method on one page."""
    cls, (_, when, otherwise) = tt.get_method(name), KNOWN[name]
    parts = [
        f"# {name}",
        text(about(cls)),
        "## When",
        f"**Take it when** {_lower(when)}",
        f"**Take another when** {_lower(otherwise)}",
    ]
    parts += ["## What it does", _card(cls), "## On digits", _figures(name), "## Try it"]
    parts += [
        "```sh\n" + "\n".join(commands(name)) + "\n```",
        f'In code: `timm_tickets.create_pruner("{name}", model, sparsity=0.9)`, then [your loop](../your_loop.md).',
        "## Settings",
    ]
    own = _own(name)
    parts.append(settings_table(own) if own else "None of its own.")
    parts.append("And [those of every pruner](index.md#settings-of-every-pruner).")
    shipped = [one for one, recipe in RECIPES.items() if recipe.pruner["name"] == name and not one.startswith("dense_")]
    if shipped:
        parts += ["## Recipes", "\n".join(f"- `{one}`: {text(RECIPES[one].source or '')}" for one in shipped)]
    parts.append(f"The code: `{cls.__module__.replace('.', '/')}.py`.")
    return "\n\n".join(parts) + "\n"


def _lower(words: str) -> str:
    return words[0].lower() + words[1:]


def _cell(row: Row, sparsity: str) -> str:
    return row.words[sparsity].replace(" ", "\u00a0")


def _rows(shown: Mapping[str, Row]) -> str:
    """Rows of what was measured as a table of Markdown."""
    sparsities = list(next(iter(shown.values())).accuracy)
    titles = "".join(f" {s} | spent |" for s in sparsities)
    table = [f"| test top-1 at sparsity |{titles}", "|---|" + "---|---|" * len(sparsities)]
    for title, row in shown.items():
        table.append(f"| {text(title)} |" + "".join(f" {_cell(row, s)} | {row.spent[s]} |" for s in sparsities))
    return "\n".join(table)


def _figures(name: str) -> str:
    """What was measured: a curve and its figures, and what it holds in memory."""
    rows, every, parts = rows_of(name), measured(), []
    if rows:
        beside = {title: every[title] for title in ("dense", "random") if title in every and title != name}
        first = next(iter(rows.values()))
        parts.append(curve(name, {name: first, **beside}))
        parts.append(_rows({**rows, **beside}))
        parts.append(
            f"{text(conditions())}; mean and {spread()}. *Spent*: dense trainings, the ticket's own included. "
            f"Differences smaller than the spread say nothing: see `{TABLE}`."
        )
    else:
        parts.append(
            "It is not in the table of all methods on single weights; whole channels were measured in `structured.md`."
        )
    if name in (held := memory()):
        device, host = held[name]
        parts.append(
            f"Memory at the peak of a search: {device} bytes a prunable weight on the device, of which plain training "
            f"has {held['plain training'][0]}, and {host} on the host (`memory.md`, counted on CPUs)."
        )
    return "\n\n".join(parts)


def method_nav() -> list:
    """Methods in the navigation, by kind."""
    groups = [
        {title.partition(":")[0]: [f"methods/{n}.md" for n in METHODS if KNOWN[n][0] == kind]}
        for kind, title in KINDS.items()
    ]
    return ["methods/index.md", *groups]


def method_pages() -> dict[str, str]:
    """The text of each method's page, and of the page about all of them, by place."""
    parts = ["# Methods", "`timm-tickets list` shows them in the terminal. [Choosing](../choosing.md) compares them."]
    for kind, title in KINDS.items():
        names = [name for name in METHODS if KNOWN[name][0] == kind]
        parts.append(
            f"## {title}\n\n| method | what it does |\n|---|---|\n"
            + "\n".join(f"| `{n}` | {text(about(tt.get_method(n)))} |" for n in names)
        )
    parts += ["## Settings of every pruner", settings_table(explained(schema_of(tt.Method)))]
    index = {"methods/index.md": "\n\n".join(parts) + "\n"}
    return index | {f"methods/{name}.md": method_page(name) for name in METHODS}


def tweak_pages() -> dict[str, str]:
    """The text of each tweak's page, by place."""
    out = {}
    for name in TWEAKS:
        cls = tt.get_tweak(name)
        command = f"timm-tickets search digits_imp --set retrain.tweaks=[{name}] --set output=output/{name}"
        tt.load_recipe("digits_imp", [f"retrain.tweaks=[{name}]"])
        parts = [
            f"# {name}",
            text(about(cls)),
            _card(cls),
            "## Try it",
            f"```sh\ntimm-tickets list {name}\n{command}\n```",
        ]
        parts.append(
            f'In code: `timm_tickets.create_tweaks(model, ["{name}"])`, '
            "see [your loop](../your_loop.md#retraining-tweaks)."
        )
        parts.append("On IMP tickets of digits none of the tweaks helped (`tweaks_digits.md`).")
        parts += [
            "## Settings",
            settings_table(explained(schema_of(cls))),
            f"The code: `{cls.__module__.replace('.', '/')}.py`.",
        ]
        out[f"tweaks/{name}.md"] = "\n\n".join(parts) + "\n"
    return out


def by_goal() -> str:
    rows = ["| you want | take | because | recipe on digits |", "|---|---|---|---|"]
    for goal, take, why, recipe in GOALS:
        tt.load_recipe(recipe.split("`")[-1])
        rows.append(f"| {goal} | {take} | {why} | `{recipe}` |")
    return "\n".join(rows)


def by_budget() -> str:
    """Methods by the trainings they spent, the cheapest first, with what they reached and hold."""
    every, held = measured(), memory()
    own = {name: every[name_in] for name in METHODS for name_in in list(rows_of(name))[:1]}
    sparsities = list(every["dense"].accuracy)
    middle = sparsities[len(sparsities) // 2]
    rows = [
        f"| method | trainings to {sparsities[0]} | to {sparsities[-1]} | top-1 at {middle} | bytes a weight |",
        "|---|---|---|---|---|",
    ]
    for name in sorted(own, key=lambda name: (float(own[name].spent[middle].split()[0]), name)):
        row = own[name]
        spent = f"{row.spent[sparsities[0]]} | {row.spent[sparsities[-1]]}"
        rows.append(f"| `{name}` | {spent} | {_cell(row, middle)} | {' + '.join(held[name])} |")
    return "\n".join(rows) + f"\n\n({text(conditions())}.)"


def all_rows() -> str:
    return f"{_rows(measured())}\n\n({text(conditions())}; `{TABLE}` has more.)"


TABLES = {"made: all rows": all_rows, "made: by goal": by_goal, "made: by budget": by_budget}
