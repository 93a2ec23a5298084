"""The command that runs a training script, unedited, under a ticket or a pruner."""

from pathlib import Path
from typing import Annotated

import typer

from .app import app, errors


@app.command(context_settings={"allow_interspersed_args": False})
def run(
    script: Annotated[Path, typer.Argument(metavar="SCRIPT", help="timm's train.py, or one like it")],
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="...", help="the script's own: all that follows its name")
    ] = None,
    ticket: Annotated[str | None, typer.Option(help="ticket to train")] = None,
    pruner: Annotated[str | None, typer.Option(help="pruner to search with; its epochs are the script's")] = None,
    set: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="setting of the pruner, e.g. sparsity=0.8")
    ] = None,
    folder: Annotated[
        Path | None, typer.Option(help="write the search down here; imp and colt want it, for they take several calls")
    ] = None,
    start: Annotated[
        str | None,
        typer.Option(
            help="whose weights a ticket's training starts from: ticket, model (--initial-checkpoint), or "
            "transfer (the ticket's, on another head)"
        ),
    ] = None,
) -> None:
    """Run timm's train.py, without a line changed, so that it trains a ticket or searches one."""
    from ..core.errors import SettingError, TicketError, TrainingError

    with errors():
        from ..config.files import read_overrides
        from ..integrations.launcher import Launcher

        launcher = Launcher(ticket, pruner, read_overrides(set or ()), folder, start)  # pyright: ignore[reportArgumentType]
    try:
        launcher.run(script, arguments or [])
    except (SettingError, TicketError, TrainingError):  # ours; what the script itself raises is shown as it is
        with errors():
            raise
