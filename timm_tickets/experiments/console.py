"""Where progress and tables go."""

from typing import Any

from rich.console import Console


class NotebookConsole(Console):
    """Standard output of a notebook: text, and in `show` one line that changes."""

    def __init__(self) -> None:
        super().__init__(force_jupyter=False, force_terminal=False)  # which its stream says it is
        self._line: Any = None

    def show(self, text: str) -> None:
        """Put this in the place of what it showed before; empty, take it away."""
        from IPython.display import display  # pyright: ignore[reportMissingImports] - it runs in one

        words = {"text/plain": text}
        if self._line is not None:
            self._line.update(words, raw=True)
        elif text:
            self._line = display(words, raw=True, display_id=True)


def console_here() -> Console:
    """Where nobody has given one: standard output."""
    console = Console()
    return NotebookConsole() if console.is_jupyter else console
