"""Checking settings, and saying what is wrong with one: its name, what was found, what is valid, what to do."""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

T = TypeVar("T")


class SettingError(ValueError):
    """A setting that is unknown, missing or out of range."""


class TrainingError(RuntimeError):
    """A training that went wrong, such as a loss that is not finite; finished runs are kept."""


class TicketError(ValueError):
    """A ticket that cannot be read or written, or that does not fit the model it is put on."""


def shown(text: Any, limit: int = 120) -> str:
    """What a file or another machine says, fit to stand in a message: escaped as `repr` does, and cut.

    Args:
        text: A string, or anything that `repr` shows.
        limit: Characters, at most; what is cut is counted.

    >>> print(shown("a\\x1b[2J\\n" + 2_000 * "b", limit=20))
    a\\x1b[2J\\nbbbbbbbbbb... (1,990 more)
    """
    try:
        text = text if isinstance(text, str) else repr(text)
    except ValueError:  # Python writes no integers of more than 4,300 digits
        text = "a number of too many digits"
    out = ""
    for used, character in enumerate(text):
        part = character if character.isprintable() else character.encode("unicode_escape").decode()
        if len(out) + len(part) > limit:
            return f"{out}... ({len(text) - used:,} more)"
        out += part
    return out


def unknown(kind: str, found: str, valid: Iterable[str]) -> str:
    """The sentence for a name that does not exist, with the closest that do.

    >>> unknown("pruner", "impp", ["imp", "random"])
    "pruner: 'impp' is unknown; did you mean 'imp'? Valid: imp, random"
    """
    found = shown(found)
    valid = sorted(valid)
    close = get_close_matches(found, valid, n=3, cutoff=0.5)
    listed = ", ".join(valid) if len(valid) <= 60 else f"{len(valid)} names"
    hint = f"did you mean {' or '.join(map(repr, close))}? " if close else ""
    return f"{kind}: '{found}' is unknown; {hint}Valid: {listed}"


def check(schema: type[T], values: Mapping[str, Any], where: str = "") -> T:
    """Build a pydantic model or dataclass from plain values.

    Args:
        schema: The class to build.
        values: Settings by name; nested mappings for nested models.
        where: Put before the names in messages, such as ``pruner``.

    Raises:
        SettingError: One line for each wrong setting.
    """
    try:
        return TypeAdapter(schema).validate_python(dict(values))
    except ValidationError as error:
        wrong = error.errors()
        more = [f"and {len(wrong) - 20} more wrong settings"] if len(wrong) > 20 else []
        raise SettingError("\n".join([_sentence(schema, one, where) for one in wrong[:20]] + more)) from None


def _sentence(schema: Any, error: Any, where: str) -> str:
    location = [str(part) for part in error["loc"]]
    name = ".".join([*([where] if where else []), *map(shown, location)])
    if error["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        for part in location[:-1]:
            schema = _fields(schema)[part]
        return unknown(name.rpartition(".")[0] or "setting", location[-1], _fields(schema))
    if error["type"] == "missing":
        return f"{name}: is not set and has no default; set it"
    reason = error["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    if error["type"] == "value_error":
        reason = "\n".join(shown(line, 1500) for line in reason.split("\n"))  # its author need not have cut it
        return f"{name}: {reason}" if name else reason
    found = error["input"]
    told = f"'{shown(found)}'" if isinstance(found, str) else shown(found)
    return f"{name}: {told} is not valid; it must be {reason}"


def _fields(schema: Any) -> dict[str, Any]:
    found = getattr(schema, "model_fields", None) or getattr(schema, "__pydantic_fields__", {})
    return {name: info.annotation for name, info in found.items()}
