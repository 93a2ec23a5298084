"""What the commands share: their options, and how they report what a user can mend."""

import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Annotated, Any

import typer
from rich.console import Console

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help="name of a shipped recipe, or a YAML file")]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="override, e.g. pruner.sparsity=0.9")]
ROWS = 1_000  # of a table; timm's deepest, resnetrs420, has 704 layers
Restart = Annotated[bool, typer.Option("--restart", help="delete the folder's earlier results and begin again")]


@app.callback()
def _about() -> None:
    """Lottery tickets for any timm model.

    Exit codes: 0 done; 1 an error that nobody has foreseen; 2 a wrong setting, a training or a file that failed; 130
    stopped by Ctrl-C; 143 stopped by SIGTERM, after a checkpoint. Stopped, the same command continues.
    """


@contextmanager
def errors() -> Iterator[None]:
    """Turn what a user can mend into one message on standard error, without a traceback."""
    from ..core.errors import SettingError, TicketError, TrainingError, shown
    from ..distributed.sigterm import STOPPED, Stopped

    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            yield
    except KeyboardInterrupt:
        print("stopped; the same command continues", file=sys.stderr)
        raise typer.Exit(130) from None
    except Stopped:
        print("stopped by SIGTERM; the same command continues", file=sys.stderr)
        raise typer.Exit(STOPPED) from None
    except (SettingError, TicketError, TrainingError, OSError) as error:
        # Whoever raised it has cut what a stranger says; what still comes through is not to steer the terminal.
        print("error:", "\n".join(shown(line, 2000) for line in str(error).split("\n")[:60]), file=sys.stderr)
        raise typer.Exit(2) from None
    except typer.Exit:
        raise
    except Exception as error:  # nothing a user can mend: reported whole, where it is not in the way
        print(_reported(error), file=sys.stderr)
        raise typer.Exit(1) from error


def _reported(error: Exception) -> str:
    """Write an error that nobody has foreseen to a file, and say so in a line; the whole of it where that fails."""
    from ..core.errors import shown

    told = "".join(traceback.format_exception(error))
    try:
        descriptor, name = tempfile.mkstemp(prefix="timm-tickets-", suffix=".txt")
        with open(descriptor, "w") as file:
            file.write(f"timm-tickets {version('timm-tickets')}: {' '.join(sys.argv)}\n{told}")
    except OSError:
        return told
    first = f"{type(error).__name__}: {shown(str(error), 300)}"
    return f"error: unexpected {first}; the whole of it, for a report, is in {name}"


def _show_warning(text: Any, kind: type[Warning], file: str, line: int, *_: Any) -> None:
    """One line on standard error; a place in the code says nothing to who typed a command."""
    shown = f"warning: {text}" if kind is UserWarning else warnings.formatwarning(text, kind, file, line).rstrip()
    print(shown, file=sys.stderr)


def say_more(console: Console, layers: int) -> None:
    """After a table of so many layers, of which the first are shown."""
    if layers > ROWS:
        console.print(f"and {layers - ROWS:,} more layers")
