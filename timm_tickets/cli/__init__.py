"""The command line: each command is one function of the package. torch is imported only when a command needs it."""

from . import recipes, scripts, tickets, reports, deploy, models  # isort: skip  # in the order of --help
from .app import app

__all__ = ["app", "deploy", "main", "models", "recipes", "reports", "scripts", "tickets"]


def main() -> None:
    app(prog_name="timm-tickets")  # under `python -m` too, whose name nobody types
