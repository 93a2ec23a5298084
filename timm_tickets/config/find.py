"""Where recipes and leaderboards are."""

from difflib import get_close_matches
from pathlib import Path

from ..core.errors import SettingError, shown, unknown

_LEADERBOARD = "leaderboard_"  # begins the name of each shipped leaderboard; they lie among the recipes


def recipes_folder() -> Path:
    """The shipped recipes: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).parents[1]
    installed = package / "recipes"
    return installed if installed.is_dir() else package.parent / "recipes"


def list_recipes() -> list[str]:
    """Sorted names of the shipped recipes."""
    return [name for name in _shipped() if not name.startswith(_LEADERBOARD)]


def list_leaderboards() -> list[str]:
    """Sorted names of the shipped leaderboards."""
    return [name for name in _shipped() if name.startswith(_LEADERBOARD)]


def _shipped() -> list[str]:
    return sorted(path.stem for path in recipes_folder().glob("*.yaml"))


def find_recipe(recipe: str | Path, beside: Path | None = None) -> Path:
    """The file of a recipe: a shipped one by its name, or a path.

    Args:
        recipe: Its name or path.
        beside: The folder of the recipe that extends it, where one does: the file has to lie there or below.

    Raises:
        SettingError: There is none, and the message names the closest; or it lies elsewhere.
    """
    path = Path(recipe) if beside is None else beside / recipe
    try:
        if str(recipe) in list_recipes() and not (beside is None and path.is_file()):
            return recipes_folder() / f"{recipe}.yaml"
        if beside is None and path.is_file():
            return path
        path = path.resolve()  # where it is, whatever links lead there
        outside = beside is not None and not path.is_relative_to(beside.resolve())
        if beside is not None and not outside and path.suffix in (".yaml", ".yml") and path.is_file():
            return path
    except (OSError, RuntimeError, ValueError):  # a name that no file can have, or links that go round
        outside = False
    if outside:
        raise SettingError(
            f"extends: '{shown(str(recipe))}' lies outside the folder of the recipe that names it; put the file beside "
            "that recipe, or name a shipped one"
        )
    if beside is not None:
        raise SettingError(
            unknown("extends", str(recipe), list_recipes()) + ", or the path of a .yaml file beside this one"
        )
    raise SettingError(f"recipe: {_not_there(str(recipe))}, or the path of a YAML file")


def _not_there(recipe: str) -> str:
    """What is wrong with the name or path of a recipe that is not there, and what is near it."""
    if recipe in list_leaderboards():
        return f"'{recipe}' is a leaderboard: `timm-tickets leaderboard {recipe}` searches it; a recipe is asked for"
    path, shipped = Path(recipe), "give one that `timm-tickets recipe --list` shows"
    try:
        folder = path if path.is_dir() else path.parent
        beside = sorted(str(one) for one in folder.glob("*.y*ml") if one.is_file())
    except (OSError, ValueError):
        folder, beside = None, []
    if folder == path:
        inside = f", with {', '.join(map(shown, beside[:8]))} in it" if beside else " without a YAML file in it"
        return f"'{shown(recipe)}' is a folder{inside}; {shipped}"
    names = {one.casefold(): one for one in [*list_recipes(), *beside]}
    near = recipe.removesuffix(path.suffix).casefold()
    close = [one for one in (near, f"{near}.yaml", f"{near}.yml") if one in names]
    close = close or get_close_matches(recipe.casefold(), names, n=3)
    hint = f"did you mean {' or '.join(repr(shown(names[one])) for one in close)}? Or {shipped}" if close else shipped
    is_path = path.suffix in (".yaml", ".yml") or len(path.parts) > 1
    return f"there is no file '{shown(recipe)}'; {hint}" if is_path else f"'{shown(recipe)}' is unknown; {hint}"


def find_leaderboard(leaderboard: str | Path) -> Path:
    """The file of a leaderboard: a shipped one by its name, or a path.

    Raises:
        SettingError: There is none.
    """
    try:
        if Path(leaderboard).is_file():
            return Path(leaderboard)
    except (OSError, ValueError):  # a name that no file can have
        pass
    if str(leaderboard) in list_leaderboards():
        return recipes_folder() / f"{leaderboard}.yaml"
    raise SettingError(unknown("leaderboard", str(leaderboard), list_leaderboards()) + ", or the path of a YAML file")
