"""What a recipe's model and training part make: the timm model, and the criterion."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
from accelerate.utils import set_seed
from timm.data import Mixup
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.models import load_checkpoint
from torch import nn

from ..config.recipe import Recipe, list_recipes
from ..core.errors import SettingError, shown


@contextmanager
def building(what: str) -> Iterator[None]:
    """Turn what timm, torch or Accelerate raise for a setting they do not accept into a `SettingError`.

    These libraries check some settings only when used, each with an exception of its own.
    """
    try:
        yield
    except SettingError:
        raise
    except (RuntimeError, TypeError, ValueError, OSError, AssertionError, LookupError, ImportError) as error:
        told = shown(str(error) or "it does not say why", 1500)
        raise SettingError(f"{what} cannot be built as the recipe says: {type(error).__name__}: {told}") from error


def build_model(recipe: Recipe, num_classes: int) -> nn.Module:
    """The recipe's timm model, its random start drawn from the recipe's seed.

    Raises:
        SettingError: timm cannot build it.
    """
    settings = recipe.model
    if settings.num_classes is not None and settings.num_classes < num_classes:
        raise SettingError(f"model.num_classes: {settings.num_classes} is too few; the data has {num_classes} classes")
    set_seed(recipe.seed)
    arguments = model_kwargs(recipe, num_classes)
    with building(f"model: {settings.model!r}"):
        model = timm.create_model(settings.model, pretrained=settings.pretrained, **arguments)
    if settings.initial_checkpoint is not None:
        _load_(model, settings.initial_checkpoint, arguments)
    return model


def _load_(model: nn.Module, path: Path, arguments: dict[str, Any]) -> None:
    """Load the weights that the recipe starts from, all of them.

    Raises:
        SettingError: They are not there, or are not this model's.
    """
    if path.is_dir():
        raise SettingError(f"model.initial_checkpoint: {str(path)!r} is a folder; name the file in it")
    if not path.is_file():
        # What a search or a training of a shipped recipe leaves, in the folder that it takes where none is given.
        *_, folder, _, _ = "", "", "", *path.parts
        source = folder.removesuffix("_train_dense")
        command = f"timm-tickets {'search' if source == folder else 'train'} {source}"
        first = f"run `{command}` first, in the same working directory" if source in list_recipes() else "give a file"
        raise SettingError(
            f"model.initial_checkpoint: there is no file {str(path)!r} in {Path.cwd()}; {first}, or set "
            "model.initial_checkpoint to trained weights of this model"
        )
    try:
        load_checkpoint(model, str(path))
    except Exception as error:  # timm's, torch's, pickle's and safetensors' own
        told = shown(" ".join(str(error).split()), 300) if isinstance(error, RuntimeError) else type(error).__name__
        raise SettingError(
            f"model.initial_checkpoint: {str(path)!r} is no state dict of this model with {arguments['num_classes']} "
            f"classes: {told}; give one of the same architecture, classes and channels"
        ) from error


def check_forward(recipe: Recipe, model: nn.Module, size: Sequence[int]) -> None:
    """Refuse, before anything is written, images of a size that the model does not take.

    Args:
        recipe: The recipe.
        model: Its model.
        size: Channels, height and width of an image.

    Raises:
        SettingError: One image does not go through.
    """
    first, was = next(model.parameters()), model.training
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            model.eval()(torch.zeros(1, *size, device=first.device, dtype=first.dtype))
    except (RuntimeError, ValueError, AssertionError, IndexError, TypeError) as error:
        own = getattr(model, "pretrained_cfg", {}).get("input_size", ())
        raise SettingError(
            f"data.img_size: images of {' x '.join(map(str, size[1:]))} pixels do not go through {recipe.model.model}: "
            f"{shown(str(error) or type(error).__name__, 600)}; set another data.img_size"
            + (f", such as {own[-1]}, which timm gives for it" if own else "")
        ) from error
    finally:
        model.train(was)


def model_kwargs(recipe: Recipe, num_classes: int) -> dict[str, Any]:
    """The keyword arguments that build the recipe's architecture again."""
    settings = recipe.model
    names = {"in_chans": settings.in_chans, "drop_rate": settings.drop, "drop_path_rate": settings.drop_path}
    names |= {"global_pool": settings.gp}
    given = {key: value for key, value in names.items() if value is not None}
    # Models with a fixed input size are built for it; the others take no such argument.
    config: Any = timm.get_pretrained_cfg(settings.model, allow_unregistered=True)
    if recipe.data.img_size is not None and config is not None and config.fixed_input_size:
        given["img_size"] = recipe.data.img_size
    return {"num_classes": settings.num_classes or num_classes, **given, **settings.model_kwargs}


def channels_of(recipe: Recipe, model: nn.Module) -> int:
    """How many channels the recipe's model takes."""
    given = model_kwargs(recipe, 1).get("in_chans")
    return given or getattr(model, "pretrained_cfg", {}).get("input_size", (3,))[0]


@torch.no_grad()
def check_batch(t: Any, model: nn.Module, count: int, size: Sequence[int]) -> None:
    """Refuse, before the first step does, a training whose steps have too few images for mixup or batch normalisation.

    Args:
        t: The training settings.
        model: The model, of which an image's size at each normalisation is found.
        count: Images of a step in one process.
        size: Channels, height and width of an image.

    Raises:
        SettingError: One image a step, and it is too few.
    """
    if count > 1:
        return
    told = (
        f"training.batch_size: {t.batch_size} and the images of this run leave one to a step of each process; %s. Set "
        "at least two for each process, and train on more images where there are fewer"
    )
    if mixes(t):
        raise SettingError(told % "mixup and cutmix pair them")

    def see(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if inputs[0].numel() == inputs[0].shape[1]:
            raise SettingError(told % "batch normalisation would see one value a channel")

    kinds = nn.modules.batchnorm._BatchNorm
    found = [one for one in model.modules() if isinstance(one, kinds) and not isinstance(one, nn.SyncBatchNorm)]
    hooks = [one.register_forward_pre_hook(see) for one in found]
    was = model.training
    try:
        if hooks:
            first = next(model.parameters())
            model.eval()(torch.zeros(1, *size, device=first.device, dtype=first.dtype))
    finally:
        model.train(was)
        for hook in hooks:
            hook.remove()


def mixes(t: Any) -> bool:
    """Whether the training settings ask for mixup or cutmix, which make targets soft."""
    return t.mixup > 0 or t.cutmix > 0 or t.cutmix_minmax is not None


def mixup_of(t: Any, num_classes: int) -> Mixup | None:
    """timm's mixup and cutmix of the training settings, None where there are none."""
    if not mixes(t):
        return None
    return Mixup(
        mixup_alpha=t.mixup,
        cutmix_alpha=t.cutmix,
        cutmix_minmax=t.cutmix_minmax,
        prob=t.mixup_prob,
        switch_prob=t.mixup_switch_prob,
        mode=t.mixup_mode,
        label_smoothing=t.smoothing,
        num_classes=num_classes,
    )


def criterion_of(t: Any) -> nn.Module:
    """The criterion of the training settings."""
    soft = mixes(t)
    if t.bce_loss:
        return BinaryCrossEntropy(smoothing=0.0 if soft else t.smoothing)
    if soft:
        return SoftTargetCrossEntropy()
    return LabelSmoothingCrossEntropy(t.smoothing) if t.smoothing else nn.CrossEntropyLoss()
