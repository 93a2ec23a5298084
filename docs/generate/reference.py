"""Pages of the public names, by area: mkdocstrings fills them in from the docstrings."""

import ast
import re
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "timm_tickets"
AREAS = {
    "pruning": "Pruners and runs",
    "tickets": "Tickets",
    "core": "Masks and errors",
    "sparse": "Models",
    "tweaks": "Retraining tweaks",
    "config": "Recipes",
    "experiments": "Searches",
    "deploy": "Export",
    "reports": "Reports",
    "leaderboards": "Leaderboards",
    "integrations": "timm and torch-pruning",
}
FIRST = (  # on its page, before what it needs and what is like it
    *("create_pruner", "Pruner", "Training", "Run", "load_ticket", "Ticket", "create_tweaks", "Tweaks"),
    *("load_recipe", "search", "wrap", "TicketTask", "export", "inspect_model", "Subnet"),
)


def _place(name: str) -> int:
    last = name.rpartition(".")[2]
    return FIRST.index(last) if last in FIRST else len(FIRST)


def pages() -> dict[str, str]:
    """The text of each page by place; every public name is on one of them."""
    stub = ast.parse((PACKAGE / "__init__.pyi").read_text("utf-8"))
    found: dict[str, list[str]] = {area: [] for area in AREAS}
    modules = []
    for node in stub.body:
        if isinstance(node, ast.ImportFrom) and node.module:
            area = node.module.partition(".")[0]
            if area not in found:
                raise ValueError(
                    f"docs/generate/reference.py: no title for {area!r}, of which names are public; add it to AREAS"
                )
            found[area] += [f"timm_tickets.{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules += [alias.name for alias in node.names]
    out = {}
    for area, names in found.items():
        if not names:
            continue
        told = "\n\n".join(f"::: {name}" for name in sorted(names, key=_place))
        out[f"reference/{area}.md"] = f"# {AREAS[area]}\n\nAll of it is imported from `timm_tickets`.\n\n{told}\n"
    for module in modules:  # a name for one of the package's own
        (of,) = re.findall(r"from \.([\w.]+) import \*", (PACKAGE / f"{module}.py").read_text("utf-8"))
        whole = f"::: timm_tickets.{of}\n    options: {{show_root_heading: false, show_root_toc_entry: false}}\n"
        out[f"reference/{module}.md"] = f"# timm_tickets.{module}\n\n{whole}"
    return out
