"""Settings: classes whose annotated fields are what they can be told, checked by pydantic, and said in words.

The words come from the fields: ``Field(description=...)`` is the one place where a setting is explained.
"""

import inspect
import json
import re
import sys
from abc import ABCMeta
from collections.abc import Iterator, Mapping
from textwrap import wrap
from typing import Any, NamedTuple, TypeVar

from pydantic import Field, TypeAdapter
from pydantic.dataclasses import dataclass
from pydantic.json_schema import GenerateJsonSchema
from typing_extensions import dataclass_transform

C = TypeVar("C", bound=type)
_ARGS = "\n\nArgs:\n"
_LABEL = r"`?\w+`?(?: \([^)]*\))?: "


class Settings(ABCMeta):
    """Metaclass: ``help`` and completion show a class of settings without what pydantic and dataclasses keep in it."""

    def __dir__(cls) -> list[str]:
        return [name for name in super().__dir__() if not name.startswith("__")]


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(Field,))
def settings(cls: C) -> C:
    """Class decorator: a frozen dataclass of checked settings, its signature and docstring made from them."""
    doc = inspect.cleandoc(cls.__doc__ or "")  # before a dataclass without one is given its signature
    made: Any = dataclass(frozen=True, kw_only=True, config={"extra": "forbid"})(cls)
    if made.__pydantic_complete__:  # not where an annotation names what is defined further down
        parameters = [_parameter(name, info) for name, info in made.__pydantic_fields__.items()]
        made.__signature__ = inspect.Signature(parameters)
        told = [_line(one, parameter) for one, parameter in zip(explained(schema_of(made)), parameters, strict=True)]
        made.__doc__ = doc + (_ARGS + "\n".join(told) if told else "")
    return made


def _parameter(name: str, info: Any) -> inspect.Parameter:
    default = inspect.Parameter.empty if info.is_required() else info.get_default(call_default_factory=True)
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=info.annotation, default=default)


def _line(one: "Setting", parameter: inspect.Parameter) -> str:
    """A setting as a docstring has it, in Python's words."""
    default = "required" if parameter.default is parameter.empty else f"default {parameter.default!r}"
    kind = one.kind.replace("true | false", "bool").replace("null", "None")
    text = " ".join(filter(None, (f"{one.name}:", one.about, f"({kind}; {default})")))
    return "\n".join(wrap(text, 100, initial_indent=" " * 4, subsequent_indent=" " * 8))


class Setting(NamedTuple):
    """A setting in words: its name, what it may be, its default, and what it means, as a recipe has them."""

    name: str
    kind: str
    default: str
    about: str


class _Lenient(GenerateJsonSchema):
    """What has no JSON Schema may be anything: a setting of another package's need not be plain data."""

    ignored_warning_kinds = {"skipped-choice", "non-serializable-default"}  # noqa: RUF012 - as its base has it

    def handle_invalid_for_json_schema(self, schema: Any, error_info: str) -> dict[str, Any]:
        return {}


def schema_of(cls: Any) -> dict[str, Any]:
    """JSON Schema of a class of settings."""
    return TypeAdapter(cls).json_schema(schema_generator=_Lenient)


def explained(schema: Mapping[str, Any]) -> Iterator[Setting]:
    """The settings of a JSON Schema in words."""
    for name, one in schema.get("properties", {}).items():
        default = f"default {yaml_like(one['default'])}" if "default" in one else "required"
        whole = {"$ref", "const", "properties"} & one.keys()  # a part, whose keys have defaults of their own; a choice
        yield Setting(name, kind_of(one), "" if whole else default, one.get("description", "").replace("\n", " "))


def yaml_like(value: Any) -> str:
    """A default as one writes it in a recipe: text bare, anything else as JSON."""
    return value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)


def kind_of(one: Mapping[str, Any]) -> str:
    """What a setting may be, from its JSON Schema: type, range and choices.

    >>> kind_of({"anyOf": [{"type": "number", "minimum": 0.0, "exclusiveMaximum": 1}, {"type": "null"}]})
    'number in [0, 1) | null'
    """
    if "enum" in one or "const" in one:
        return " | ".join(map(yaml_like, one.get("enum", [one.get("const")])))
    if "anyOf" in one:
        return " | ".join(dict.fromkeys(map(kind_of, one["anyOf"])))
    if "$ref" in one:
        return "part"
    kind = one.get("type")
    if kind == "array":
        if "prefixItems" in one:
            return f"list of {kind_of(one['prefixItems'][0])}, exactly {len(one['prefixItems'])}"
        least = f", at least {one['minItems']}" if one.get("minItems") else ""
        items = kind_of(one.get("items", {}))
        return f"list of {f'({items})' if ' | ' in items else items}{least}"
    plain = {"boolean": "true | false", "string": "text", "object": "settings by name", None: "anything"}
    if one.get("format") == "path":
        return "path"
    return plain.get(kind) or f"{kind}{_range(one)}"


def _range(one: Mapping[str, Any]) -> str:
    ends = one.get("minimum", one.get("exclusiveMinimum")), one.get("maximum", one.get("exclusiveMaximum"))
    low, high = (int(end) if isinstance(end, float) and end.is_integer() else end for end in ends)  # 0.0: pydantic 2.9
    if low is None and high is None:
        return ""
    if high is None:
        return f" {'>=' if 'minimum' in one else '>'} {low}"
    if low is None:
        return f" {'<=' if 'maximum' in one else '<'} {high}"
    return f" in {'[' if 'minimum' in one else '('}{low}, {high}{']' if 'maximum' in one else ')'}"


def about(cls: Any) -> str:
    """A class in a line."""
    return (cls.__doc__ or "").partition(_ARGS)[0].strip().partition("\n")[0]


def card(cls: Any) -> list[tuple[str, str]]:
    """What a class's docstring says of it, and the source that its module names: paragraphs, each with its label.

    A paragraph begins after an empty line, or with a label, such as ``Cost:``; some have none.
    """
    text = inspect.cleandoc(cls.__doc__ or "").partition(_ARGS)[0]
    source = re.search(r"^Source: .*", inspect.cleandoc(sys.modules[cls.__module__].__doc__ or ""), re.M | re.S)
    text += f"\n\n{source[0]}" if source else ""
    found = [" ".join(one.split()) for one in re.split(rf"\n\n|\n(?={_LABEL})", text) if one.strip()]
    return [(label[0] if (label := re.match(_LABEL, one)) else "", re.sub(f"^{_LABEL}", "", one)) for one in found]
