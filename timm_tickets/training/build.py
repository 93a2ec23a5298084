"""What a recipe's model and training part make: the timm model, and the criterion."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import timm
import torch
from accelerate.utils import set_seed
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import nn

from ..config.recipe import Recipe
from ..core.errors import SettingError


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
        raise SettingError(f"{what} cannot be built as the recipe says: {type(error).__name__}: {error}") from error


def build_model(recipe: Recipe, num_classes: int) -> nn.Module:
    """The recipe's timm model, its random start drawn from the recipe's seed.

    Raises:
        SettingError: timm cannot build it.
    """
    settings = recipe.model
    if settings.num_classes is not None and settings.num_classes < num_classes:
        raise SettingError(f"model.num_classes: {settings.num_classes} is too few; the data has {num_classes} classes")
    set_seed(recipe.seed)
    with building(f"model: {settings.model!r}"):
        return timm.create_model(
            settings.model,
            pretrained=settings.pretrained,
            checkpoint_path=settings.initial_checkpoint,
            **model_kwargs(recipe, num_classes),
        )


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


def criterion_of(t: Any) -> nn.Module:
    """The criterion of the training settings."""
    soft = mixes(t)
    if t.bce_loss:
        return BinaryCrossEntropy(smoothing=0.0 if soft else t.smoothing)
    if soft:
        return SoftTargetCrossEntropy()
    return LabelSmoothingCrossEntropy(t.smoothing) if t.smoothing else nn.CrossEntropyLoss()
