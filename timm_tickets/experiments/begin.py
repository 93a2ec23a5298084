"""What every experiment does before it trains: its data, model and folder, each refused now or not at all."""

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import rich.progress
from rich.console import Console
from torch import nn

from ..config.recipe import Recipe
from ..core.errors import SettingError
from ..core.warn import warn
from ..data.contents import differences
from ..data.datasets import Data
from ..distributed.cards import sharing, told
from ..distributed.processes import any_of, join_processes
from ..sparse.describe import describe_model
from ..storage.files import DamagedError, is_writer, read_record, write_record
from ..training.build import build_model, channels_of, check_forward, criterion_of, model_kwargs
from ..tweaks.registry import create_tweaks
from .report import say
from .run_folder import IMAGES, claim_folder
from .trackers import check_trackers


def built(recipe: Recipe, console: Console) -> tuple[Data, nn.Module]:
    """The recipe's data and model, which have to suit each other."""
    check_trackers(recipe)
    data = Data(recipe.data)
    if is_writer():
        say(console, data.told)
        if (shared := sharing()) is not None and recipe.parallel != "data":
            say(console, f"{told(shared)}: each trains runs of its own; one trains what cannot be shared out")
    model = build_model(recipe, data.num_classes)
    channels = channels_of(recipe, model)
    data.check_channels(model, channels)
    check_forward(recipe, model, (channels, *data.input_size(model)))
    device: Any = join_processes().device
    kept = data.caches.told(data.preprocessing(model), device)
    if is_writer():
        say(console, kept)
    if (size := recipe.training.batch_size) > data.count and is_writer():
        console.print(f"training.batch_size: {size:,} is more than there is; each step takes all {data.count:,} images")
    return data, model


def claim(folder: Path, recipe: Recipe, kind: str, data: Data, console: Console) -> None:
    """Make the folder this experiment's, for the images that it was begun with.

    Raises:
        SettingError: It was begun with others; or, before it is begun, an image cannot be scored.
    """
    try:
        stored = read_record(folder / IMAGES)
    except DamagedError as error:
        warn(f"{error}, so whether the images have changed cannot be told; written again, as of the images now")
        stored = None
    then = None if stored is None else stored[0]
    changed = [] if then is None else differences(then, data.record)
    begins, differs = any_of([then is None and is_writer(), bool(changed)])  # the folder may be the writer's alone
    if differs:
        raise SettingError(
            f"{folder} was begun with other images:\n  "
            + ("\n  ".join(changed) or "as another process has found")
            + "\nput them back as they were, choose another output=, or begin again with --restart"
        )
    if begins:
        data.check_scored(partial(say, console) if is_writer() else lambda text: None)
    claim_folder(folder, recipe, kind)
    if begins and is_writer():
        write_record(folder / IMAGES, data.record)
    filled(data, console)


def filled(data: Data, console: Console) -> None:
    """Decode the images that are kept, with a bar where it takes long."""

    def track(batches: Iterable[Any], count: int) -> Iterable[Any]:
        if not is_writer() or not console.is_terminal:
            return batches
        return rich.progress.track(batches, "decoding images", count, console=console, transient=True)

    data.caches.fill(track)


def check_tweaks(recipe: Recipe, model: nn.Module) -> None:
    """Refuse now, and not after the search, tweaks that the model or the training's criterion cannot have."""
    tweaks = create_tweaks(model, recipe.retrain.tweaks)
    try:
        tweaks.criterion(criterion_of(recipe.training))
    finally:
        tweaks.remove_()


def origin_of(recipe: Recipe, data: Data, model: Any) -> dict[str, Any]:
    """What a ticket says of where it comes from."""
    described = describe_model(model) | {"kwargs": model_kwargs(recipe, data.num_classes)}
    return {"model": described, "recipe": {"name": recipe.name, "hash": recipe.hash, "dataset": recipe.data.dataset}}
