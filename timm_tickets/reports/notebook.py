"""The report where one works: what a notebook shows of run folders, before or instead of a page."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..core.errors import SettingError, shown
from .figures import Figure
from .page import Section, Table, composed, markdown, write


@dataclass(frozen=True)
class Picture:
    """A figure; its words are what it shows, in numbers."""

    figure: Figure

    def __repr__(self) -> str:
        return self.figure.alt

    def _repr_png_(self) -> bytes:
        return self.figure.png


@dataclass(frozen=True, repr=False)
class Report:
    """What run folders say: a notebook shows verdicts and tickets as tables, ``print`` a sentence for each.

    Attributes:
        sections: A part for each network and set of test images.
        files: The page and its figures by name, as `save` writes them.
        left: A sentence on everything that was left out.
    """

    sections: list[Section]
    files: Mapping[str, bytes]
    left: list[str]

    @property
    def verdicts(self) -> list[str]:
        """One sentence on each ticket and control, no more than the data support."""
        return [f"{row[0]}: {row[1]}" for section in self.sections for row in section.verdicts.rows]

    @property
    def figures(self) -> Mapping[str, Picture]:
        """By name: ``accuracy``, ``trainings``, ``curves``, ...; of the second section ``2_accuracy`` and so on."""
        found = {one.name: Picture(one) for section in self.sections for one in section.figures}
        return {name.removeprefix("1_"): picture for name, picture in found.items()}

    def save(self, output: str | Path = "report") -> Path:
        """Write the page, its Markdown and its figures, as ``timm-tickets report`` does; the page's path.

        Raises:
            SettingError: The output holds somebody else's report.
            OSError: It cannot be written.
        """
        return write(self.files, Path(output))[0]

    def __repr__(self) -> str:
        return "\n".join([*self.verdicts, *self.left]) or "no ticket has been trained"

    def _repr_markdown_(self) -> str:
        told = []
        for section in self.sections:
            told += [f"**{markdown(section.title)}**", markdown(section.about)]
            told += [_table(one) for one in (section.verdicts, section.tickets) if one.rows]
        return "\n\n".join([*told, *map(markdown, self.left)])


def report(*folders: str | Path, margin: float = 0.5) -> Report:
    """Read run folders, and say what their data support; nothing is written.

    Args:
        folders: Of searches, trainings and transfers, finished or not; or folders above them.
        margin: Points below the dense network that still count as matching it.

    Raises:
        SettingError: One is no folder or holds no experiment, or the margin is none.
    """
    paths = tuple(map(Path, folders))
    for path in paths:
        if not path.is_dir():
            raise SettingError(f"folders: {shown(str(path))} is no folder; give one that a search has left")
    return Report(*composed(paths, margin))


def _table(one: Table) -> str:
    rows = [one.heads, [":--"] * len(one.heads), *one.rows]
    return "\n".join(f"| {' | '.join(row if number == 1 else map(markdown, row))} |" for number, row in enumerate(rows))
