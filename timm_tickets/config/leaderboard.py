"""Leaderboards: a recipe with entries, sparsities and seeds, and the searches that they are.

Every key is the recipe's but `seeds`, `sparsities` and `entries`; an entry is what it changes in that recipe.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from ..core.errors import SettingError, check, shown
from .files import merged, read_overrides, read_recipe, switch_
from .find import find_leaderboard
from .parts import Fraction, Part, Seed
from .recipe import Recipe, recipe_of

DENSE = "dense"
_OWN = ("seeds", "sparsities", "entries")
_GIVEN = {"seed": "seeds", "pruner.sparsity": "sparsities", "pruner.name": "entries", "label": "entries"}
_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ,.'+=_-]{0,39}")
_MOST = 10_000  # searches


class Entry(Part):
    """A line of a leaderboard: what it changes in the recipe."""

    pruner: dict[str, Any]
    """its registered name and its settings, but for the sparsity"""
    training: dict[str, Any] = Field(default={})
    """how its runs train, where that differs"""
    retrain: dict[str, Any] = Field(default={})
    """how its ticket is trained, where that differs"""
    controls: tuple[str, ...] | None = None
    """what is trained beside its tickets; the recipe's controls where not given"""
    start: Literal["dense"] | None = None
    """dense: start from the weights of the dense network of the same seed, once that is trained"""


class Lines(Part):
    """What makes a recipe a leaderboard."""

    entries: Annotated[dict[str, dict[str, Any]], Field(min_length=1)]
    """each line's label, and what it changes in the recipe"""
    sparsities: Annotated[tuple[Fraction, ...], Field(min_length=1)]
    """each entry is searched at each of these"""
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)]
    """each entry is searched with each of these seeds"""


@dataclass(frozen=True, eq=False)
class Cell:
    """One experiment of a leaderboard.

    Attributes:
        label: Its entry's; `DENSE` for the dense network.
        sparsity: Of its ticket; 0 for the dense network.
        recipe: All settings, its run folder and seed among them.
        after: The cell that has to be finished before this one can begin.
    """

    label: str
    sparsity: float
    recipe: Recipe
    after: "Cell | None" = None

    @property
    def folder(self) -> Path:
        return self.recipe.folder

    @property
    def name(self) -> str:
        at = f" at {self.sparsity:g}" if self.sparsity else ""
        return f"{self.label}{at}, seed {self.recipe.seed}"


@dataclass(frozen=True, eq=False)
class Leaderboard:
    """A leaderboard's lines over the settings that all of them share.

    Attributes:
        lines: Entries, sparsities and seeds, as the file has them.
        entries: Each by its label.
        settings: The recipe's, as files have them.
        given: What was set for this call: it holds over every entry.
    """

    lines: Lines
    entries: dict[str, Entry]
    settings: dict[str, Any]
    given: dict[str, Any]

    @property
    def folder(self) -> Path:
        """The folder of all run folders: ``output`` as given, else ``output/<name>``."""
        return self._base.folder

    @cached_property
    def _base(self) -> Recipe:
        return recipe_of(merged(self.settings, self.given, "--set"))

    @cached_property
    def cells(self) -> list[Cell]:
        """Seed by seed, so that what is there at any moment can be compared; of each seed the dense network first."""
        return [cell for seed in self.lines.seeds for cell in self._of_seed(seed)]

    def _of_seed(self, seed: int) -> Iterator[Cell]:
        as_long = {"controls": [], "retrain": {"epochs": self._base.retrain.epochs}}  # and no tweaks
        folder = self.folder / DENSE / f"seed_{seed}"
        dense = Cell(DENSE, 0.0, self._recipe(DENSE, folder, {"seed": seed}, as_long))
        yield dense
        for label, entry in self.entries.items():
            own: dict[str, Any] = {"pruner": entry.pruner, "training": entry.training, "retrain": entry.retrain}
            wanted = self._base.controls if entry.controls is None else entry.controls
            beside = {"controls": [name for name in wanted if name != DENSE]}  # which is trained once a seed
            if entry.start is not None:
                weights = dense.folder / "round_00" / "model.safetensors"
                own["model"] = {"initial_checkpoint": str(weights)}
            for sparsity in self.lines.sparsities:
                own["pruner"] = {**entry.pruner, "sparsity": sparsity}
                where = self.folder / _slug(label) / f"{sparsity:g}" / f"seed_{seed}"
                recipe = self._recipe(label, where, {**own, "seed": seed}, beside)
                yield Cell(label, sparsity, recipe, None if entry.start is None else dense)

    def _recipe(self, label: str, folder: Path, own: dict[str, Any], last: Mapping[str, Any]) -> Recipe:
        """The settings of all, over them an entry's, over them what is set for this call, over them the last."""
        values = merged(self.settings, {}, "")  # a copy: switch_ changes the parts
        values = {key: dict(value) if isinstance(value, dict) else value for key, value in values.items()}
        switch_(values, own)
        wrong = f"entries.{label}"
        values = merged(merged(values, own, wrong), self.given, "--set")
        values |= {"name": _slug(label), "output": str(folder), "label": label, **last}
        try:
            return recipe_of(values)
        except SettingError as error:
            raise SettingError(f"{wrong}: {error}") from None


def load_leaderboard(
    leaderboard: str | Path, overrides: Sequence[str] = (), output: str | Path | None = None
) -> Leaderboard:
    """Read a leaderboard, and check every setting of every search in it.

    Args:
        leaderboard: Name of a shipped one, or the path of a YAML file.
        overrides: Settings like ``training.epochs=4``, which hold over all entries, or ``seeds=[0,1]``.
        output: The folder of all run folders, where it is not the file's.

    Raises:
        SettingError: There is no such leaderboard, it is not YAML, or a setting is wrong.
    """
    values, given = read_recipe(find_leaderboard(leaderboard)), read_overrides(overrides)
    if missing := [key for key in _OWN if key not in values]:
        raise SettingError(
            f"{shown(str(leaderboard))} is no leaderboard: it has no {', '.join(missing)}; see `timm-tickets recipe "
            "--list` for those that are"
        )
    own = {key: values.pop(key) for key in _OWN}
    own = merged(own, {key: given.pop(key) for key in _OWN if key in given}, "--set")
    lines = check(Lines, own)
    entries = {label: check(Entry, values, f"entries.{label}") for label, values in _labelled(lines.entries)}
    _check(lines, entries, given)
    if output is not None:
        given["output"] = str(output)
    found = Leaderboard(lines, entries, values, given)
    count = len(lines.seeds) * (1 + len(lines.entries) * len(lines.sparsities))
    if count > _MOST:
        raise SettingError(f"entries: {count:,} searches are more than {_MOST:,}; leave some out")
    _ = found.cells
    return found


def _labelled(entries: Mapping[str, dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The same; labels are refused that are none, or that share a folder."""
    folders = {DENSE: "the dense network", "report": "the report"}
    for label, values in entries.items():
        if not _LABEL.fullmatch(label):
            raise SettingError(
                f"entries: '{shown(label)}' is not valid; a label has up to 40 letters, digits, blanks and ,.'+=_-, "
                "and begins with a letter or a digit"
            )
        if (slug := _slug(label)) in folders:
            raise SettingError(f"entries: '{label}' has the folder of {folders[slug]}; choose another label")
        folders[slug] = label
        yield label, values


def _check(lines: Lines, entries: Mapping[str, Entry], given: Mapping[str, Any]) -> None:
    """Refuse numbers that stand twice, and what is not an entry's or a call's to set."""
    for key in ("seeds", "sparsities"):
        values = getattr(lines, key)
        if len({*values}) < len(values):
            raise SettingError(f"{key}: {', '.join(map(str, values))} has one twice; give each once")
    if 0.0 in lines.sparsities:
        raise SettingError("sparsities: 0 is the dense network, which is trained in any case; leave it out")
    for label, entry in entries.items():
        if "name" not in entry.pruner:
            raise SettingError(f"entries.{label}.pruner.name: is not set; give a registered name (`timm-tickets list`)")
        if "sparsity" in entry.pruner:
            raise SettingError(f"entries.{label}.pruner.sparsity: is the leaderboard's; set sparsities instead")
    for key, mine in _GIVEN.items():
        part, _, name = key.rpartition(".")
        where = given.get(part, {}) if part else given
        if isinstance(where, dict) and name in where:
            raise SettingError(f"--set: {key} is the leaderboard's; set {mine} instead")


def _slug(label: str) -> str:
    """The folder of an entry."""
    return re.sub(r"[^A-Za-z0-9.=+-]+", "_", label)
