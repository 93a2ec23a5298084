"""Classes by name: this package's own, found in a folder, and those of other packages, through entry points."""

import ast
import importlib
import importlib.util
import pkgutil
from fnmatch import fnmatchcase
from importlib.metadata import EntryPoints, entry_points
from pathlib import Path
from typing import Any, Generic, TypeVar

from .errors import SettingError, unknown
from .settings import settings
from .warn import warn

C = TypeVar("C")


class Registry(Generic[C]):
    """Classes by name, found when first asked for.

    Args:
        kind: What they are, in messages; ``timm_tickets.<kind>s`` is the group of their entry points.
        package: Name of the package whose modules register this package's own.
    """

    def __init__(self, kind: str, package: str):
        self.kind, self.package = kind, package
        self.classes: dict[str, type[C]] = {}
        self._loaded = False

    def add(self, name: str, cls: Any) -> Any:
        taken = self.classes.get(name)
        if taken is not None and (taken.__module__, taken.__qualname__) != (cls.__module__, cls.__qualname__):
            where = f"{taken.__module__}.{taken.__qualname__}"
            raise ValueError(f"{self.kind} {name!r} is registered already, by {where}")
        made: Any = settings(cls)
        made.name = name
        self.classes[name] = made
        return made

    def load(self) -> dict[str, type[C]]:
        if not self._loaded:
            self._loaded = True
            folders = importlib.import_module(self.package).__path__
            for module in pkgutil.walk_packages(folders, f"{self.package}."):
                importlib.import_module(module.name)
            for point in strangers(self.kind):
                try:
                    point.load()
                except Exception as error:  # another package's code: whatever it raises must not stop ours
                    warn(f"the {self.kind}s of {point.value} cannot be loaded: {error!r}")
        return self.classes

    def names(self, filter: str) -> list[str]:
        return sorted(name for name in self.load() if fnmatchcase(name, filter))

    def get(self, name: str) -> type[C]:
        if not isinstance(name, str) or name not in self.load():
            raise SettingError(unknown(self.kind, str(name), self.load()))
        return self.classes[name]


def strangers(kind: str) -> EntryPoints:
    """The entry points by which other packages bring pruners or tweaks."""
    return entry_points(group=f"timm_tickets.{kind}s")


def read_lines(kind: str, package: str) -> dict[str, str]:
    """The classes that a package of this one registers, in a line each, by sorted names: read from its files.

    Nothing is imported, for what they do needs torch, and that takes seconds.
    """
    spec = importlib.util.find_spec(package)
    folders = (spec and spec.submodule_search_locations) or ()
    paths = (path for folder in folders for path in Path(folder).rglob("*.py"))
    classes = (node for path in paths for node in ast.parse(path.read_text("utf-8")).body if type(node) is ast.ClassDef)
    return dict(
        sorted(
            (ast.literal_eval(by.args[0]), (ast.get_docstring(node) or "").partition("\n")[0])
            for node in classes
            for by in node.decorator_list
            if isinstance(by, ast.Call) and ast.unparse(by.func) == f"register_{kind}"
        )
    )
