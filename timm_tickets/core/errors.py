"""Checking settings, and saying what is wrong with one: its name, what was found, what is valid, what to do."""

import re
from collections.abc import Callable, Iterable, Mapping
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


def unknown(kind: str, found: str, valid: Iterable[str], hint: str = "") -> str:
    """The sentence for a name that does not exist, with the closest that do.

    Args:
        kind: What it should name.
        found: The name.
        valid: Those that exist.
        hint: What to do, where more is known than the closest names.

    >>> unknown("pruner", "impp", ["imp", "random"])
    "pruner: 'impp' is unknown; did you mean 'imp'? Valid: imp, random"
    """
    found = shown(found)
    valid = sorted(valid)
    alike = {name.casefold(): name for name in valid}
    close = get_close_matches(found.casefold(), alike, n=3)
    if found.casefold() in alike:  # only its capitals are wrong
        close = [found.casefold()]
    if not hint and close:
        hint = f"did you mean {' or '.join(repr(alike[one]) for one in close)}?"
    listed = ", ".join(valid) if len(valid) <= 60 else f"{len(valid):,} names"
    return f"{kind}: '{found}' is unknown; {hint}{' ' if hint else ''}Valid: {listed}"


def check(
    schema: type[T], values: Mapping[str, Any], where: str = "", hint: Callable[[str], str] = lambda key: ""
) -> T:
    """Build a pydantic model or dataclass from plain values.

    Args:
        schema: The class to build.
        values: Settings by name; nested mappings for nested models.
        where: Put before the names in messages, such as ``pruner``.
        hint: Given a name that is no setting there, says what to do about it; nothing where that is not known.

    Raises:
        SettingError: One line for each wrong setting.
    """
    try:
        return TypeAdapter(schema).validate_python(dict(values))
    except ValidationError as error:
        wrong = error.errors()
        more = [f"and {len(wrong) - 20} more wrong settings"] if len(wrong) > 20 else []
        raise SettingError("\n".join([_sentence(schema, one, where, hint) for one in wrong[:20]] + more)) from None


def _sentence(schema: Any, error: Any, where: str, hint: Callable[[str], str]) -> str:
    location = [str(part) for part in error["loc"]]
    name = ".".join([*([where] if where else []), *map(shown, location)])
    if error["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        for part in location[:-1]:
            schema = _fields(schema)[part]
        return unknown(name.rpartition(".")[0] or "setting", location[-1], _fields(schema), hint(location[-1]))
    if error["type"] == "missing":
        return f"{name}: is not set and has no default; set it"
    reason = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        reason = "\n".join(shown(line, 1500) for line in reason.split("\n"))  # its author need not have cut it
        return f"{name}: {reason}" if name else reason
    found = error["input"]
    told = f"'{shown(found)}'" if isinstance(found, str) else shown(found)
    kind = re.match(
        r"(int|float|bool|string|tuple|list|dict|model|dataclass)(_\w+)?_(type|parsing|float)$", error["type"]
    )
    if kind is not None:
        reason = f"it must be {_KINDS.get(kind[1], f'a list, such as [{shown(found, 40)}]')}"
        if kind[1] in ("dict", "model", "dataclass"):
            for part in location:
                schema = _fields(schema).get(part)
            reason += f", such as {name}.{next(iter(_fields(schema)), 'name')}"
    elif reason.startswith("Input should be "):
        reason = "it must be " + reason.removeprefix("Input should be ")
    return f"{name}: {told} is not valid; {reason}{_percent(error)}"


# In words, what pydantic's types of errors expect.
_KINDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "string": "text"}
_KINDS |= dict.fromkeys(("dict", "model", "dataclass"), "settings by name")


def _percent(error: Any) -> str:
    """What a fraction would be that was given in percent, as no setting here is."""
    number = re.fullmatch(r"(\d+(?:\.\d+)?) ?%?", str(error["input"]))
    fraction = error["type"] == "float_parsing" or error.get("ctx", {}).get("lt") == 1
    if number is None or not fraction or not 1 < float(number[1]) <= 100:
        return ""
    return f"; {number[1]} % is {float(number[1]) / 100:g}"


def _fields(schema: Any) -> dict[str, Any]:
    found = getattr(schema, "model_fields", None) or getattr(schema, "__pydantic_fields__", {})
    return {name: info.annotation for name, info in found.items()}
