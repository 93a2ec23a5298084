"""How a recipe's file is read, over another one that it extends. A stranger's file is only data.

It is bounded before it is parsed: YAML libraries build a tree by recursion, and crash on one that is deep enough.
"""

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from ..core.errors import SettingError, shown
from .find import find_recipe

MOST_BYTES = 1 << 20
# The fields of `Method`, which cannot be asked without torch.
OF_EVERY_PRUNER = (
    *("sparsity", "epochs", "seed", "include", "exclude", "classifier", "collapse"),
    *("granularity", "sparsity_of", "round_to", "min_channels"),
)
PARTS = ("model", "data", "pruner", "training", "retrain")
_MOST_NODES = 10_000  # keys and values, what aliases repeat counted as often
_MOST_CHARACTERS = 10_000  # of one of them: YAML reads 1:1:1 as a number, in quadratic time
_DEEPEST = 20
_LARGEST = 2**64
# What PyYAML says of frequent mistakes, and what to do about each.
_HINTS = {
    "cannot start any token": "indent with spaces, not with tabs, and quote text that begins with @, ` or %",
    "alphabetic or numeric character": "quote a wildcard: '*.conv*'",
    "undefined alias": "quote a wildcard: '*.conv*'",
    "duplicate key": "name each setting once",
    "mapping values are not allowed": "indent what belongs together alike, and quote text that has a colon in it",
}
_REFERENCE = re.compile(r"\$\{([\w-]+(?:\.[\w-]+)*)\}")
_WILDCARD = re.compile(r"(^\s*|[\[,]\s*)(\*[^\s,\[\]{}'\"]*)(?=\s*(?:$|[,\]]))")
_NUMBER = re.compile(r"[-+]?\d[\w:]{1000,}")
_RESOLVER = re.compile(r"\$\{\s*([^{}:]*?)\s*:")
# What steers a terminal, or turns the text around it.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def read_recipe(path: Path, within: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A recipe file over the one that it extends, if any; references to other settings as they are.

    Args:
        path: The file.
        within: The files that extend it, the first one first.

    Raises:
        SettingError: It is not YAML, too large, or it extends what is not there, or itself. Nothing of what stands in
            it is repeated but names of settings.
    """
    path = path.resolve()
    if path in within:
        chain = " -> ".join(shown(one.name) for one in (*within, path))
        raise SettingError(f"extends: {chain} goes round in a circle; let one of them extend nothing")
    try:
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
        text = data.decode()
    except UnicodeDecodeError:
        hint = f"; a ticket goes behind the recipe: `train RECIPE --ticket {path.name}`" * (path.suffix == ".ticket")
        raise SettingError(f"{path} is not a recipe: it is no text in UTF-8{hint}") from None
    except OSError as error:
        raise SettingError(f"{path} is not a recipe: {error}") from None
    if len(data) > MOST_BYTES:
        raise SettingError(f"{path} is not a recipe: it has more than {MOST_BYTES:,} bytes")
    values = _parsed(text, f"{path} is not a recipe")
    if not values:
        raise SettingError(f"{path} is not a recipe: it is empty; `timm-tickets recipe digits_imp` prints one to edit")
    # A part with nothing below it says nothing: what the file extends holds there, or the defaults.
    values = {key: value for key, value in values.items() if value is not None or key not in PARTS}
    values.setdefault("name", path.stem)  # and not that of the recipe it extends, whose folder has another result
    if "extends" not in values:
        return values
    base = values.pop("extends")
    if not isinstance(base, str) or not base:
        raise SettingError(f"extends: {shown(base)} in {path} is not valid; it must be the name or path of one recipe")
    found = read_recipe(find_recipe(base, path.parent), (*within, path))
    switch_(found, values)
    return merged(found, values, f"{path} over {shown(base)} is not a recipe")


def read_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """Settings like ``pruner.sparsity=0.9``, as a recipe has them.

    Raises:
        SettingError: One is not written so, or its value is not YAML.
    """
    quoted = []
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key or key.count(".") + key.count("[") > _DEEPEST:
            raise SettingError(f"--set: '{shown(override)}' is not valid; write key=value, such as pruner.sparsity=0.9")
        wrong = f"--set: '{shown(override)}' is not valid"
        # YAML reads a leading * as a reference, to which there is nothing in one value: it is a wildcard.
        value = _WILDCARD.sub(r"\1'\2'", value)
        with _reading(wrong):
            _check_events(value, wrong)
        quoted.append(f"{key}={value}")
    wrong = f"--set: '{shown(' '.join(overrides))}' is not valid"
    with _reading(wrong):
        return _plain(OmegaConf.to_container(OmegaConf.from_dotlist(quoted)), wrong)


def merged(base: dict[str, Any], over: dict[str, Any], wrong: str) -> dict[str, Any]:
    """Settings over other ones: parts are joined name by name, anything else is replaced.

    Args:
        base: What holds where ``over`` says nothing.
        over: What holds.
        wrong: Begins the message where a part meets what is none.

    Raises:
        SettingError: A list would replace a part.
    """
    out = dict(base)
    for key, value in over.items():
        old = out.get(key)
        if isinstance(old, dict) and isinstance(value, list):
            raise SettingError(f"{wrong}: {shown(key)} holds settings by name, and not a list")
        out[key] = merged(old, value, wrong) if isinstance(old, dict) and isinstance(value, dict) else value
    return out


def resolved(values: dict[str, Any]) -> dict[str, Any]:
    """The settings, each reference such as ``${training.epochs}`` replaced by the setting it names.

    Raises:
        SettingError: It names none, or one that is not a plain value.
    """

    def target(name: str) -> Any:
        found: Any = values
        for key in name.split("."):
            found = found.get(key, values) if isinstance(found, dict) else values
        if isinstance(found, dict | list) or (isinstance(found, str) and "${" in found):
            raise SettingError(
                f"${{{shown(name)}}}: a reference names one setting that has a value of its own, such as "
                "${training.epochs}; this one does not"
            )
        return found

    def walk(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: walk(one) for key, one in value.items()}
        if isinstance(value, list):
            return [walk(one) for one in value]
        if not isinstance(value, str) or "${" not in value:
            return value
        if whole := _REFERENCE.fullmatch(value):
            return target(whole[1])
        text = _REFERENCE.sub(lambda match: str(target(match[1])), value)
        if len(text) > _MOST_CHARACTERS:
            raise SettingError(f"'{shown(value)}' grows to more than {_MOST_CHARACTERS:,} characters")
        return text

    return walk(values)


def switch_(values: dict[str, Any], given: dict[str, Any]) -> None:
    """Where an override or an extending recipe names another pruner or architecture, drop what was only the first's."""
    old, new = (str(_part(one, "model").get("model")).partition(".")[0] for one in (values, given))
    if new not in ("None", old):
        _part(values, "model").pop("model_kwargs", None)

    if isinstance(_part(given, "retrain").get("tweaks"), list):
        _part(values, "retrain").pop("tweaks", None)  # a list names all of them

    new = _part(given, "pruner").get("name")
    pruner = _part(values, "pruner")
    if new is None or new == pruner.get("name"):
        return
    for key in pruner.keys() - {"name", *OF_EVERY_PRUNER}:
        del pruner[key]


def _part(values: dict[str, Any], name: str) -> dict[str, Any]:
    found = values.get(name)
    return found if isinstance(found, dict) else {}


def _parsed(text: str, wrong: str) -> dict[str, Any]:
    """The settings by name that a text in YAML holds; ``wrong`` begins each message."""
    with _reading(wrong):
        _check_events(text, wrong, "it must hold settings by name, such as 'model:' and 'pruner:'")
        found = OmegaConf.load(io.StringIO(text), max_yaml_expanded_nodes=_MOST_NODES)
        return _plain(OmegaConf.to_container(found), wrong)


@contextmanager
def _reading(wrong: str) -> Iterator[None]:
    """Turn what PyYAML and OmegaConf raise, which may be anything, into a `SettingError` that quotes nothing."""
    try:
        yield
    except SettingError:
        raise
    except Exception as error:
        told: str = getattr(error, "problem", None) or "it is not YAML, or has a value that cannot be read"
        # Up to what it quotes from the file: who reads the message need not be allowed to read the file.
        told = re.split(r"\s*['\"](?!.['\"])|(?<=duplicate key) |\. See", told)[0]
        told += next((f"; {hint}" for words, hint in _HINTS.items() if words in told), "")
        raise SettingError(f"{wrong}: {_place(getattr(error, 'problem_mark', None))}{told}") from None


def _place(mark: Any) -> str:
    return "" if mark is None else f"line {mark.line + 1}, column {mark.column + 1}: "


def _check_events(text: str, wrong: str, by_name: str = "") -> None:
    """Refuse what is out of bounds, without building anything of it.

    Args:
        text: The YAML.
        wrong: Begins each message.
        by_name: The message where it is not settings by name; empty where it may be anything.
    """
    depth = nodes = 0
    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        nodes += isinstance(event, yaml.NodeEvent)
        why = ""
        if nodes == 1 and by_name and not isinstance(event, yaml.MappingStartEvent):
            why = by_name
        elif nodes > _MOST_NODES or depth > _DEEPEST:
            why = f"it has more than {_MOST_NODES:,} keys and values, or they are more than {_DEEPEST} deep"
        elif isinstance(event, yaml.ScalarEvent):
            if len(event.value) > _MOST_CHARACTERS:
                why = f"a value has more than {_MOST_CHARACTERS:,} characters"
            elif event.implicit[0] and _NUMBER.fullmatch(event.value):
                why = "a number has more than 1,000 digits"
            elif _CONTROL.search(event.value):
                why = "a value has a control character"
            elif "${" in _REFERENCE.sub("", event.value):
                named = _RESOLVER.search(event.value)
                why = "recipes may refer to other settings, such as ${training.epochs}" + (
                    f", but not to resolvers, such as '{shown(named[1])}'" if named else ", by their names only"
                )
        if why:
            raise SettingError(f"{wrong}: {_place(event.start_mark)}{why}")


def _plain(values: Any, wrong: str) -> dict[str, Any]:
    """The same, found to be of JSON's types with numbers that can be written down."""
    todo = [values]
    while todo:
        value = todo.pop()
        if isinstance(value, dict):
            if not all(isinstance(key, str) for key in value):
                raise SettingError(f"{wrong}: {shown(next(k for k in value if not isinstance(k, str)))} is not a name")
            todo += value.values()
        elif isinstance(value, list):
            todo += value
        elif not isinstance(value, str | bool | int | float | None):
            raise SettingError(f"{wrong}: a {type(value).__name__} is not plain data")
        elif isinstance(value, int) and abs(value) >= _LARGEST:
            raise SettingError(f"{wrong}: {shown(value, 20)} is too large; numbers end at 2^64 - 1")
    return values
