"""Recipes: a YAML file that says model, data, pruner and training, in the words of timm's train.py.

Every key is checked, unknown ones are refused, and the resolved recipe (every default filled in) is what is compared
when a search is continued. What is saved with it leaves out what nobody has chosen because it follows another setting.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import PrivateAttr, field_validator, model_validator

from ..core.errors import SettingError, check, unknown
from .files import PARTS, merged, read_overrides, read_recipe, resolved, switch_
from .find import find_recipe, list_recipes, recipes_folder
from .parts import Count, DataSettings, ModelSettings, Part, RetrainSettings, Seed, TrainingSettings

__all__ = ["Control", "Recipe", "list_recipes", "load_recipe", "recipes_folder"]

Control = Literal[
    "dense",
    "random_mask",
    "shuffled_layers",
    "random_reinit",
    "equal_epochs",
    "one_shot",
    "equal_rate_imp",
    "equal_cost",
]
CONTROLS: tuple[Control, ...] = get_args(Control)
SEARCHED: tuple[Control, ...] = ("one_shot", "equal_rate_imp", "equal_cost")  # searches of their own


class Recipe(Part):
    """A whole search."""

    name: str
    """names the run folder, output/<name>; the file's name where not given"""
    output: Path | None = None
    """the run folder itself, where it is not output/<name>"""
    label: str | None = None
    """what reports call the ticket; the pruner's name, and what tells it from others, where not given"""
    source: str | None = None
    """where the settings come from: the paper and its expected number"""
    seed: Seed = 42
    """of the model's random start, the order of the images, and all else that is random but the held-out images"""
    parallel: Literal["auto", "runs", "data"] = "auto"
    """what several processes share in a search: 'runs' gives each its own runs of a round (all have to see the run
    folder), 'data' splits every batch, 'auto' does the first in rounds of several runs and the second in others"""
    processes_per_run: Count = 1
    """how many processes train a run together where runs are handed out: a divisor of the number of processes"""
    controls: tuple[Control, ...] = ("dense",)
    """what is trained beside the ticket, as the ticket is, to compare it with. dense: the whole network, where no run
    of the search is that; random_mask: as many weights, drawn from all layers together; shuffled_layers: the ticket's
    mask shuffled within each layer; random_reinit: its mask over another random start; equal_epochs: the whole network,
    as long as the ticket's weights were trained in all. Searches of their own: one_shot: IMP in one step;
    equal_rate_imp: IMP that prunes as much a round; equal_cost: gradual pruning for all epochs of search and ticket"""
    model: ModelSettings
    """the timm model to prune"""
    data: DataSettings = DataSettings()
    """the images, how they are split and augmented"""
    pruner: dict[str, Any]
    """its registered name and its settings; epochs is training.epochs where not given, seed is the recipe's"""
    training: TrainingSettings = TrainingSettings()
    """how each run trains: optimizer, schedule, loss, precision"""
    retrain: RetrainSettings = RetrainSettings()
    """how the ticket is trained at the end, where that differs"""
    _follows: tuple[str, ...] = PrivateAttr(())  # settings that nobody has chosen, because they follow other ones

    @field_validator("name")
    @classmethod
    def _one_folder(cls, value: str) -> str:
        if not value or value in (".", "..") or "/" in value or "\\" in value:
            raise ValueError(f"{value!r} cannot name a folder; use letters, digits, '-' and '_'")
        return value

    @field_validator("controls", mode="before")
    @classmethod
    def _known_controls(cls, value: Any) -> Any:
        """One or several, each once."""
        value = (value,) if isinstance(value, str) else value
        if not isinstance(value, list | tuple):
            return value
        for one in value:
            if one not in CONTROLS:
                raise ValueError(unknown("control", str(one), CONTROLS))
        return tuple(dict.fromkeys(value))

    @field_validator("data", "training", "retrain", mode="before")
    @classmethod
    def _defaults(cls, value: Any) -> Any:
        return {} if value is None else value

    @model_validator(mode="after")
    def _resolve_pruner(self) -> "Recipe":
        """Fill in the pruner's defaults and the images' channels."""
        from ..pruning.registry import checked_method

        follows = {"epochs": self.training.epochs, "seed": self.seed}
        settings = follows | self.pruner
        name = settings.pop("name", None)
        if not isinstance(name, str):
            raise SettingError("pruner.name: is not set; give a registered name (`timm-tickets list` shows them)")
        pruner = checked_method(name, settings).described()
        found = self.model_copy(update={"pruner": pruner, "data": self.data.with_channels(self.model.in_chans)})
        mine = [f"pruner.{key}" for key in follows if key not in self.pruner]
        mine += ["data.in_chans"] * (self.data.in_chans != found.data.in_chans)
        mine += ["controls"] * ("controls" not in self.model_fields_set)
        mine += ["data.input_img_mode"] * ("input_img_mode" not in self.data.model_fields_set)
        found._follows = tuple(mine)
        return found

    @property
    def folder(self) -> Path:
        """The run folder: ``output`` as given, else ``output/<name>``."""
        return self.output or Path("output") / self.name

    @property
    def chosen_controls(self) -> tuple[Control, ...] | None:
        """The controls, where somebody has chosen them: what is trained else beside a given ticket is the command's."""
        return None if "controls" in self._follows else self.controls

    @property
    def method_settings(self) -> dict[str, Any]:
        """The pruner's settings without its name."""
        return {key: value for key, value in self.pruner.items() if key != "name"}

    @property
    def ticket_epochs(self) -> int:
        """How long the ticket is trained, in the search itself where that ends trained."""
        from ..pruning.registry import get_method

        if get_method(self.pruner["name"]).ends_trained:
            return self.pruner["epochs"]
        return self.retrain.epochs or self.training.epochs

    def plain(self) -> dict[str, Any]:
        """The resolved recipe as JSON types, without what follows from other settings: read again, it still does."""
        plain = self.model_dump(mode="json")
        for setting in self._follows:
            part, _, key = setting.rpartition(".")
            del (plain[part] if part else plain)[key]
        return plain

    def compared(self) -> dict[str, Any]:
        """The part that decides the result, flat: ``{'training.lr': 0.1, ...}``.

        Where the output goes, how often checkpoints are written, what is logged and kept beside the last weights, what
        several processes share, what is trained beside the ticket, where images are kept, when a training is refused
        do not; nor, but for rounding, how a step is carried out and in what order memory holds what. Workers do: in
        them each image draws its own augmentation, without them all draw from one stream.
        """
        free = {"output", "label", "source", "parallel", "processes_per_run", "controls", "data.unreadable"}
        rounding = ("step", "deterministic", "channels_last")
        free |= {f"training.{key}" for key in ("checkpoint_interval", "keep_best", "log_with", *rounding)}
        values = _flat(self.model_dump(mode="json"))
        if values["data.cache"] != "none":
            values["data.cache"] = "auto"
        return {key: value for key, value in values.items() if key not in free}

    @property
    def hash(self) -> str:
        """SHA-256 of what decides the result."""
        return hashlib.sha256(json.dumps(self.compared(), sort_keys=True).encode()).hexdigest()

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.plain(), sort_keys=False)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            out |= _flat(value, f"{prefix}{key}.")
        else:
            out[prefix + key] = value
    return out


def load_recipe(recipe: "str | Path | Recipe", overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe.

    Args:
        recipe: Name of a shipped recipe, path of a YAML file, or a recipe already loaded.
        overrides: Settings like ``pruner.sparsity=0.9``, applied over the file's.

    Raises:
        SettingError: There is no such recipe, it is not YAML, or a setting is wrong.
    """
    values = recipe.plain() if isinstance(recipe, Recipe) else read_recipe(find_recipe(recipe))
    given = read_overrides(overrides)
    switch_(values, given)
    return recipe_of(merged(values, given, "--set"))


def recipe_of(values: Mapping[str, Any]) -> Recipe:
    """The recipe that these settings are, as a file has them.

    Raises:
        SettingError: A setting is wrong.
    """
    return check(Recipe, resolved(dict(values)), hint=_hint)


def with_pruner(recipe: Recipe, pruner: Mapping[str, Any], others: Mapping[str, Any]) -> Recipe:
    """A recipe with another pruner, of which nothing is filled in from the one before.

    Args:
        recipe: The recipe.
        pruner: Its registered name and its settings.
        others: Settings of the recipe's own, by name, in place of its.
    """
    return check(Recipe, {**{key: getattr(recipe, key) for key in Recipe.model_fields}, **others, "pruner": pruner})


# What other programs call a setting of ours.
_OTHER_NAMES = {"learning_rate": "training.lr", "optimizer": "training.opt", "scheduler": "training.sched"}
_OTHER_NAMES |= {"architecture": "model.model", "num_epochs": "training.epochs", "extend": "extends"}


def _hint(key: str) -> str:
    """Where a setting is that was looked for elsewhere."""
    from ..pruning.registry import get_method, list_pruners

    if key == "dense":
        return "it is one of the controls: controls=[] is what dense=false was, controls=[dense] is the default."
    if key in ("seeds", "sparsities", "entries"):
        return "a file with it is a leaderboard: `timm-tickets leaderboard FILE`."
    if key in ("device", "gpu", "cuda"):
        return "Accelerate takes a GPU where there is one; set ACCELERATE_USE_CPU=true in the environment for the CPU."
    parts = (Recipe.model_fields[part].annotation for part in PARTS)
    found = [f"{part}.{key}" for part, of in zip(PARTS, parts, strict=True) if key in getattr(of, "model_fields", {})]
    if any(key in getattr(get_method(one), "__pydantic_fields__", {}) for one in list_pruners()):
        found.append(f"pruner.{key}")
    found = [_OTHER_NAMES[key]] if key in _OTHER_NAMES else found
    return f"did you mean {' or '.join(found)}?" if found else ""
