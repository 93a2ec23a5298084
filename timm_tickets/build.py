"""What a recipe's model and training part make: the timm model, and the criterion."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import timm
from accelerate.utils import set_seed
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import nn

from .recipe import Recipe
from .settings import SettingError


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
