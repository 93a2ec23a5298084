"""Pages of the notebooks in docs/notebooks, as they lie there: a test runs them, and this does not."""

import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / "notebooks"


def pages() -> dict[str, str]:
    """The text of each page by place; the notebook itself lies beside it."""
    found = sorted(
        FOLDER.glob("*.ipynb"), key=lambda one: (one.stem != "prune_your_model", one.stem)
    )  # the first first
    return {f"notebooks/{one.stem}.md": page(json.loads(one.read_text("utf-8")), one.name) for one in found}


def page(notebook: dict[str, Any], name: str) -> str:
    """A notebook as Markdown: its words, its code, and what that has printed or drawn."""
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
        elif cell["cell_type"] == "code" and source.strip():
            parts.append(f"```python\n{source}\n```")
            parts += filter(None, map(_output, cell.get("outputs", ())))
    title, *rest = parts
    return "\n\n".join([title, f"The notebook: [{name}]({name}).", *rest]) + "\n"


def _output(output: dict[str, Any]) -> str:
    data = output.get("data", {})
    if "image/png" in data:
        return f'<img alt="what the cell draws" src="data:image/png;base64,{"".join(data["image/png"]).strip()}">'
    if "text/markdown" in data:
        return "".join(data["text/markdown"])
    text = "".join(output.get("text", data.get("text/plain", ""))).strip("\n")
    return f"```text\n{text}\n```" if text else ""
