"""Where recipes are, and how one file is read over another one that it extends."""

from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from .settings import SettingError, unknown


def recipes_folder() -> Path:
    """The shipped recipes: inside the installed package, or beside it in a checkout."""
    installed = Path(__file__).parent / "recipes"
    return installed if installed.is_dir() else Path(__file__).parent.parent / "recipes"


def list_recipes() -> list[str]:
    """Sorted names of the shipped recipes."""
    return sorted(path.stem for path in recipes_folder().glob("*.yaml"))


def find_recipe(recipe: str | Path, beside: Path | None = None) -> Path:
    """The file of a recipe: a path, relative to the folder of the one that names it if any does, or a shipped one.

    Raises:
        SettingError: There is none; the message names the closest.
    """
    path = Path(recipe) if beside is None else beside / recipe
    if path.suffix not in (".yaml", ".yml") and not path.exists():
        path = recipes_folder() / f"{recipe}.yaml"
    if not path.is_file():
        kind = "recipe" if beside is None else "extends"
        raise SettingError(unknown(kind, str(recipe), list_recipes()) + ", or the path of a .yaml file")
    return path


def read_recipe(path: Path, within: tuple[Path, ...] = ()) -> Any:
    """A recipe file over the one that it extends, if any.

    Args:
        path: The file.
        within: The files that extend it, the first one first.

    Raises:
        SettingError: It is not YAML, or it extends what is not there, or itself.
    """
    path = path.resolve()
    if path in within:
        chain = " -> ".join(one.name for one in (*within, path))
        raise SettingError(f"extends: {chain} goes round in a circle; let one of them extend nothing")
    try:
        values: Any = OmegaConf.load(path)
    except (yaml.YAMLError, UnicodeDecodeError, OmegaConfBaseException, OSError) as error:
        raise SettingError(f"{path} is not a recipe: {error}") from None
    if not OmegaConf.is_dict(values):
        raise SettingError(f"{path} is not a recipe: it must hold settings by name, such as 'model:' and 'pruner:'")
    if "extends" not in values:
        return values
    base = values.pop("extends")
    if not isinstance(base, str) or not base:
        raise SettingError(f"extends: {base!r} in {path} is not valid; it must be the name or the path of one recipe")
    found = read_recipe(find_recipe(base, path.parent), (*within, path))
    try:
        switch_(found, values)
        return OmegaConf.merge(found, values)
    except (OmegaConfBaseException, TypeError) as error:
        raise SettingError(f"{path} over {base} is not a recipe: {error}") from None


def switch_(values: Any, given: Any) -> None:
    """Where an override or an extending recipe names another pruner or architecture, drop what was only the first's."""
    from .method import Method

    old, new = (str(OmegaConf.select(one, "model.model")).partition(".")[0] for one in (values, given))
    if new not in ("None", old) and OmegaConf.is_dict(values.get("model")):
        values.model.pop("model_kwargs", None)

    if OmegaConf.is_list(OmegaConf.select(given, "retrain.tweaks")) and OmegaConf.is_dict(values.get("retrain")):
        values.retrain.pop("tweaks", None)  # a list names all of them

    new = OmegaConf.select(given, "pruner.name")
    if new is None or not OmegaConf.is_dict(values.get("pruner")) or new == OmegaConf.select(values, "pruner.name"):
        return
    common = {"name", *Method.__dataclass_fields__}
    values.pruner = {key: value for key, value in values.pruner.items() if key in common}
