"""The command that reports what run folders hold."""

from pathlib import Path
from typing import Annotated

import typer

from .app import app, errors


@app.command()
def report(
    folders: Annotated[
        list[Path], typer.Argument(metavar="FOLDER...", help="run folders, or folders above them; finished or not")
    ],
    output: Annotated[Path, typer.Option(help="folder that the page, its Markdown and its figures go into")] = Path(
        "report"
    ),
    margin: Annotated[
        float, typer.Option(min=0, max=100, help="points below dense that still count as matching it")
    ] = 0.5,
) -> None:
    """Write one page about searches, seeds and controls: figures, intervals, and what the data support."""
    with errors():
        from ..core.errors import SettingError, shown

        for folder in folders:  # before torch is waited for
            if not folder.is_dir():
                raise SettingError(f"folder: {shown(str(folder))} is no folder; give one that a search has left")
        print("report: loading torch and timm", flush=True)
        from ..reports.page import report as write

        files, left = write(folders, output, margin)
        for line in left[:20]:
            print(shown(line, 600))
        if len(left) > 20:
            print(f"and {len(left) - 20} more, in the report")
        print(f"{files[0]}: the page, in one file; {files[1].name} beside it, with {len(files) - 2} figures")
