"""What the commands share: their options, and how they report what a user can mend."""

import os
import platform
import shutil
import sys
import tempfile
import textwrap
import traceback
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.padding import Padding
from rich.text import Text

if TYPE_CHECKING:
    from ..core.settings import Setting

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help="name of a shipped recipe, or a YAML file")]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="override, e.g. pruner.sparsity=0.9")]
ROWS = 1_000  # of a table; timm's deepest, resnetrs420, has 704 layers
Restart = Annotated[bool, typer.Option("--restart", help="delete the folder's earlier results and begin again")]


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        with_ = ", ".join(f"{name} {version(name)}" for name in ("torch", "timm", "accelerate"))
        print(f"timm-tickets {version('timm-tickets')} ({with_}, Python {platform.python_version()})")
        raise typer.Exit


@app.callback()
def _about(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version and exit")
    ] = False,
) -> None:
    """Lottery tickets for any timm model.

    Exit codes: 0, done; 2, a wrong setting, or a training or a file that failed;

    130, stopped by Ctrl-C; 143, stopped by SIGTERM, after a checkpoint;

    1, an error that nobody has foreseen. Stopped, the same command continues.
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
        print(
            _between_words("error: " + "\n".join(shown(line, 2000) for line in str(error).split("\n")[:60])),
            file=sys.stderr,
        )
        raise typer.Exit(2) from None
    except typer.Exit:
        raise
    except Exception as error:  # nothing a user can mend: reported whole, where it is not in the way
        print(_reported(error), file=sys.stderr)
        raise typer.Exit(1) from error


def _reported(error: Exception) -> str:
    """Write an error that nobody has foreseen to a file, and say so in a line; the whole of it where that fails."""
    from importlib.metadata import version

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


def _between_words(text: str) -> str:
    """A message as a terminal is to show it, which would break its lines within words; as it is in a pipe or a file."""
    if not sys.stderr.isatty():
        return text
    width = shutil.get_terminal_size().columns
    whole: Any = {"break_long_words": False, "break_on_hyphens": False}  # a path is to be copied
    return "\n".join("\n".join(textwrap.wrap(line, width, **whole)) for line in text.split("\n"))


def _show_warning(text: Any, kind: type[Warning], file: str, line: int, *_: Any) -> None:
    """One line on standard error; a place in the code says nothing to who typed a command."""
    shown = f"warning: {text}" if kind is UserWarning else warnings.formatwarning(text, kind, file, line).rstrip()
    print(_between_words(shown), file=sys.stderr)


def loading(recipe: str, overrides: Sequence[str]) -> None:
    """Refuse what can be refused without torch, then say that it is loaded: on a slow disk that takes a while.

    Raises:
        SettingError: There is no such recipe, or it or the overrides cannot be read.
    """
    from ..config.files import read_overrides, read_recipe
    from ..config.find import find_recipe

    read_recipe(find_recipe(recipe))
    read_overrides(overrides)
    say_loading(recipe)


def say_loading(what: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(f"{what}: loading torch and timm", flush=True)


def print_settings(console: Console, settings: Iterable["Setting"]) -> None:
    """Each with its type, range and choices, its default, and what it means."""
    for one in settings:
        told = "; ".join(filter(None, (one.kind, one.default)))
        console.print(Text.assemble((f"{one.name}: ", "bold"), told))
        console.print(Padding(Text(one.about), (0, 0, 0, 4)))


def say_more(console: Console, layers: int) -> None:
    """After a table of so many layers, of which the first are shown."""
    if layers > ROWS:
        console.print(f"and {layers - ROWS:,} more layers")
