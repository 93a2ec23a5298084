"""What an experiment leaves at the top of its folder for others: the trained model as plain timm loads it, and words.

``timm.create_model("local-dir:FOLDER", pretrained=True)`` reads config.json and model.safetensors.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
from packaging.version import Version
from rich.console import Console
from rich.table import Table
from rich.text import Text
from timm.models import model_entrypoint
from torch import nn

from ..config.recipe import Recipe
from ..data.datasets import Data
from ..pruning.run_files import RECORD
from ..storage.files import DamagedError, is_writer, sha256, write_json, write_same
from ..training.best import BEST, told_of
from ..training.build import channels_of, model_kwargs
from ..training.epoch_log import EPOCHS
from .report import say
from .run_folder import CONFIG, MODEL

# Of a pretrained_cfg: where other weights are, and what would stand in for our own preprocessing.
_NOT_OURS = {
    *("url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source", "tag", "architecture", "custom_load"),
    *("test_input_size", "test_crop_pct", "test_pool_size", "min_input_size", "label_offset", "label_names"),
    *("label_descriptions", "license", "origin_url", "paper_name", "paper_ids", "description", "notes"),
}


def write_model(folder: Path, name: str, recipe: Recipe, data: Data, model: nn.Module, best: str) -> dict[str, str]:
    """Put a training's last weights at the top of the folder, with what timm has to know beside them.

    They are the file of the training under a second name, and take no second place on the disk where that has hard
    links. Where an average of the weights was scored, it is the average.

    Args:
        folder: The run folder.
        name: Of the training.
        recipe: The recipe.
        data: Its data.
        model: Its model, for its architecture.
        best: Name of the training whose best epoch is kept, where the recipe asks for that.

    Returns:
        SHA-256 of the files by their names.

    Raises:
        OSError: One cannot be read or written.
    """
    source = folder / name / ("model_ema.safetensors" if _averaged(folder / name, recipe) else MODEL)
    if not source.is_file():
        raise DamagedError(f"{source} is missing; delete {folder / name / RECORD}, and the same command makes it again")
    write_same(source, folder / MODEL)
    write_json(folder / CONFIG, config_of(recipe, data, model))
    (folder / BEST).unlink(missing_ok=True)
    if recipe.training.keep_best and (folder / best / BEST).is_file():
        write_same(folder / best / BEST, folder / BEST)
    return {one: sha256(folder / one) for one in (MODEL, CONFIG, BEST) if (folder / one).exists()}


def _averaged(run: Path, recipe: Recipe) -> bool:
    """Whether an average of the weights was scored: not where a ticket was final, and was not trained."""
    return recipe.training.model_ema and (run / EPOCHS).exists()


def config_of(recipe: Recipe, data: Data, model: nn.Module) -> dict[str, Any]:
    """What timm builds the model and its preprocessing from: the form of its own ``config.json``."""
    kwargs = model_kwargs(recipe, data.num_classes)
    classes = kwargs["num_classes"]
    theirs: Any = model.pretrained_cfg
    size = (channels_of(recipe, model), *data.input_size(model))
    told = {**data.preprocessing(model), "input_size": size, "num_classes": classes, "custom_load": False}
    known = {key: value for key, value in theirs.items() if value is not None and key not in _NOT_OURS}
    if tuple(theirs.get("input_size", size)) != size:
        known["pool_size"] = None
    names = data.label_names
    return {
        "architecture": theirs["architecture"],
        "num_classes": classes,
        "num_features": getattr(model, "num_features", None),
        **({"label_names": [names.get(label, str(label)) for label in range(classes)]} if names else {}),
        "model_args": {key: value for key, value in kwargs.items() if key not in ("drop_rate", "drop_path_rate")},
        "pretrained_cfg": known | told,
    }


def tell_files(folder: Path, recipe: Recipe, rows: Sequence[dict[str, Any]], name: str, console: Console) -> None:
    """Say what each file is, which weights the model has, and how plain timm loads it.

    Args:
        folder: The run folder.
        recipe: The recipe.
        rows: The trainings.
        name: Of the one whose model it is.
        console: Where to.
    """
    if not is_writer() or not (folder / MODEL).exists():
        return
    names = [row["name"] for row in rows]
    row = rows[names.index(name)]
    metrics, epoch = row["metrics"], row["metrics"].get("val_epoch_best")
    weights = "average of the weights" if _averaged(folder / name, recipe) else "weights"
    best = ", the best on validation too" if epoch == row["epochs"] else ""
    found = {
        MODEL: f"the trained model: {name}, {weights} after the last epoch{best} (val {metrics['val_top1']:.2f}, "
        f"test {metrics['test_top1']:.2f})",
        CONFIG: "its architecture, classes and preprocessing",
    }
    if (folder / BEST).exists():
        told = told_of(folder / BEST)
        score = f"val {float(told['val_top1']):.2f}; not tested"
        found[BEST] = f"its weights after epoch {told['epoch']}, the best on validation ({score})"
    ticket = folder / f"{recipe.name}.ticket"
    if ticket.exists():
        size = f"{ticket.stat().st_size:,} bytes"
        found[ticket.name] = f"the ticket: masks and starting weights (sparsity {row['sparsity']:.4f}, {size})"
    found["summary.csv"] = "every training, a row each"
    found[EPOCHS] = "every epoch of every training"
    found["accuracy.png"] = "accuracy against sparsity"
    folders = f"{names[0]}/" if len(names) == 1 else f"{names[0]}/ to {names[-1]}/"
    found[folders] = "each training: its ticket, weights and log"
    say(console, f"in {folder}:")
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(overflow="fold", max_width=32)
    table.add_column(overflow="fold")
    for file, what in found.items():
        if file == folders or (folder / file).exists():
            table.add_row(Text(file), what)
    console.print(table, highlight=False)
    if BEST not in found and epoch is not None and epoch != row["epochs"]:
        say(
            console,
            f"the best epoch on validation was {epoch} of {row['epochs']} (val {metrics['val_top1_best']:.2f}); "
            "training.keep_best=true keeps its weights",
        )
    if recipe.pruner.get("granularity") in ("channel", "head"):
        say(console, f"the smaller model, without what was pruned: timm-tickets compact {folder}")
    if BEST in found and Version(timm.__version__) < Version("1.0.29"):
        say(console, f"timm {timm.__version__} loads no folder with two weight files: move {BEST} elsewhere first")
    say(console, "in Python, with plain timm:")
    ours = model_entrypoint(recipe.model.model.partition(".")[0]).__module__.startswith("timm_tickets.")
    ours = "import timm, timm_tickets  # which has the architecture" if ours else "import timm"
    for line in (ours, f'model = timm.create_model("local-dir:{folder}", pretrained=True)'):
        console.print(f"  {line}", soft_wrap=True, highlight=False, markup=False)
