"""The keys of a recipe: their JSON Schema, for editors, and the same in words, for the terminal."""

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from ..core.errors import SettingError, unknown
from ..core.settings import Setting, about, explained, schema_of
from ..pruning.registry import get_method, list_pruners
from ..tweaks.registry import get_tweak, list_tweaks
from .recipe import Recipe


def json_schema() -> dict[str, Any]:
    """JSON Schema of recipes, with the settings of each registered pruner and tweak.

    A recipe that extends another one may leave out what it does not change.
    """
    schema = Recipe.model_json_schema()
    pruners = []
    for name in list_pruners():
        one = _closed(get_method(name))
        one["properties"] = {"name": {"const": name, "description": one["description"]}} | one["properties"]
        del one["required"]
        pruners.append(one)
    properties = schema["properties"]
    properties["pruner"] = {"anyOf": pruners, "description": properties["pruner"]["description"]}
    tweaks = schema["$defs"]["RetrainSettings"]["properties"]["tweaks"]
    tweaks["anyOf"] = [
        {"type": "object", "properties": {name: _closed(get_tweak(name)) for name in list_tweaks()}}
        | {"additionalProperties": False},
        {"type": "array", "items": {"enum": list_tweaks()}},
    ]
    del tweaks["type"], tweaks["additionalProperties"]
    properties["extends"] = {
        "type": "string",
        "description": "shipped recipe, or file in this one's folder, whose settings hold where this one has none",
    }
    parts = {name: {"required": schema["$defs"][f"{name.title()}Settings"].pop("required")} for name in ("model",)}
    parts["pruner"] = {"required": ["name", "sparsity"]}
    schema["if"] = {"not": {"required": ["extends"]}}
    required = [name for name in schema.pop("required") if name != "name"]  # a file has one of its own
    schema["then"] = {"required": required, "properties": parts}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _closed(cls: Any) -> dict[str, Any]:
    """Schema of a class whose name stands beside: its docstring in a line, and no other settings."""
    return schema_of(cls) | {"additionalProperties": False, "description": about(cls)}


def explain(key: str) -> list[Setting]:
    """What recipe keys mean: one, such as ``training.lr``; those of a part, such as ``training``; or by wildcard.

    Raises:
        SettingError: There is none; the message names the closest.
    """
    schema = json_schema()
    told: dict[Setting, list[str]] = {}
    for one, pruner in _keys(schema, schema):
        told.setdefault(one, []).append(pruner)
    for ways in ((key, f"{key}.*"), (f"*.{key}",)):
        if found := [one for one in told if any(fnmatchcase(one.name, way) for way in ways)]:
            return [_of(one, told[one]) for one in found]
    raise SettingError(unknown("recipe key", key, {one.name for one in told}))


def _of(one: Setting, pruners: Sequence[str]) -> Setting:
    """A key with the pruners that it is a setting of, where not all of them have it alike."""
    if not all(pruners) or len(pruners) == len(list_pruners()) or one.name == "pruner.name":
        return one
    return one._replace(about=f"{', '.join(pruners)}: {one.about}")


def _keys(
    schema: Mapping[str, Any], node: Mapping[str, Any], at: str = "", of: str = ""
) -> Iterator[tuple[Setting, str]]:
    """Every key in a part of a recipe, dotted, and the pruner that it is a setting of, if any."""
    for one in explained(node):
        default = "" if at + one.name in ("name", "extends") else one.default  # a file has a name of its own
        yield one._replace(name=at + one.name, default=default), of
        child = node["properties"][one.name]
        for inner in (child, *child.get("anyOf", ())):
            inner = schema["$defs"].get(inner.get("$ref", "").rpartition("/")[2], inner)
            pruner = inner.get("properties", {}).get("name", {}).get("const", of) if at + one.name == "pruner" else of
            if "properties" in inner:
                yield from _keys(schema, inner, f"{at}{one.name}.", pruner)
