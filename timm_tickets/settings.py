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


def unknown(kind: str, found: str, valid: Iterable[str]) -> str:
    """The sentence for a name that does not exist, with the closest that do.

    >>> unknown("pruner", "impp", ["imp", "random"])
    "pruner: 'impp' is unknown; did you mean 'imp'? Valid: imp, random"
    """
    valid = sorted(valid)
    close = get_close_matches(found, valid, n=3, cutoff=0.5)
    listed = ", ".join(valid) if len(valid) <= 60 else f"{len(valid)} names"
    hint = f"did you mean {' or '.join(map(repr, close))}? " if close else ""
    return f"{kind}: {found!r} is unknown; {hint}Valid: {listed}"


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
        raise SettingError("\n".join(_sentence(schema, one, where) for one in error.errors())) from None


def _sentence(schema: Any, error: Any, where: str) -> str:
    location = [str(part) for part in error["loc"]]
    name = ".".join([*([where] if where else []), *location])
    if error["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        for part in location[:-1]:
            schema = _fields(schema)[part]
        return unknown(name.rpartition(".")[0] or "setting", location[-1], _fields(schema))
    if error["type"] == "missing":
        return f"{name}: is not set and has no default; set it"
    reason = error["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    if error["type"] == "value_error":
        return f"{name}: {reason}" if name else reason
    return f"{name}: {error['input']!r} is not valid; it must be {reason}"


def _fields(schema: Any) -> dict[str, Any]:
    found = getattr(schema, "model_fields", None) or getattr(schema, "__pydantic_fields__", {})
    return {name: info.annotation for name, info in found.items()}
