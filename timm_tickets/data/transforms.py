"""A recipe's transforms of one image at a time, timm's and torchvision's, and views of a data set through them."""

import random
from typing import Any

import numpy as np
import torch
from timm.data import create_transform
from timm.data.transforms import str_to_interp_mode
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import transforms
from torchvision.transforms.functional import pil_to_tensor

from ..core.seeds import seed_from
from .images import ImageError, Undecodable, Unreadable
from .subset import labels_of


def train_transform(settings: Any, config: dict[str, Any]) -> Any:
    """The augmentation of training images.

    Args:
        settings: The recipe's ``data`` part.
        config: What `timm.data.resolve_data_config` found.
    """
    s, config = settings, training_config(settings, config)
    if s.crop_padding is not None:
        return padded_crop(config, s.crop_padding, s.hflip, s.rotation)
    names = ("no_aug", "train_crop_mode", "scale", "ratio", "hflip", "vflip", "color_jitter")
    augmentation = {name: getattr(s, name) for name in names}
    more = {"auto_augment": s.aa, "re_prob": s.reprob, "re_mode": s.remode, "re_count": s.recount}
    return create_transform(**config, **augmentation, **more, is_training=True)


def training_config(settings: Any, config: dict[str, Any]) -> dict[str, Any]:
    """The same with the interpolation of training images."""
    return config | ({"interpolation": settings.train_interpolation} if settings.train_interpolation else {})


def beginning(settings: Any, config: dict[str, Any], train: bool) -> Any:
    """What is done to every image alike before anything is drawn for it; it gives uint8 (channels, height, width)."""
    if not train:
        return create_transform(**config, normalize=False)
    config = training_config(settings, config)
    if settings.crop_padding is not None:
        return transforms.Compose([_to_size(config), pil_to_tensor])
    if settings.no_aug:
        return create_transform(**config, normalize=False, no_aug=True, is_training=True)
    return pil_to_tensor


def _to_size(config: dict[str, Any]) -> Any:
    name = config["interpolation"]
    interpolation: Any = str_to_interp_mode("bilinear" if name == "random" else name)
    return transforms.Resize(config["input_size"][1:], interpolation)


def padded_crop(config: dict[str, Any], padding: int, hflip: float = 0.0, rotation: float = 0.0) -> Any:
    """The augmentation of papers on CIFAR: crop the zero-padded image at random, flip and turn it, normalise.

    An image of another size than the model's is resized first. Everything random is drawn from torch's global
    generator, which the trainer seeds for each epoch.

    Args:
        config: What `timm.data.resolve_data_config` found: ``input_size`` (channels, height, width), ``mean``, ``std``,
            ``interpolation``.
        padding: Pixels of zeros on each side.
        hflip: Probability of a horizontal flip, in [0, 1].
        rotation: Most degrees to turn by either way; what comes in at the corners is zero.

    Returns:
        A function of a PIL image; it gives a float tensor (channels, height, width).
    """
    size = config["input_size"][1:]
    steps = [_to_size(config), transforms.RandomCrop(size, padding), transforms.RandomHorizontalFlip(hflip)]
    if rotation:
        steps.append(transforms.RandomRotation(rotation))
    return transforms.Compose([*steps, transforms.ToTensor(), transforms.Normalize(config["mean"], config["std"])])


class Transformed(Dataset[Any]):
    """A view of a data set through a transform: training and validation share images but not augmentation."""

    def __init__(self, dataset: Any, transform: Any, unreadable: Unreadable | None = None):
        self.dataset = dataset
        self.transform = transform
        self.unreadable = unreadable

    @property
    def targets(self) -> Tensor:
        return labels_of(self.dataset)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        seed_item_(index)
        image, target = self._item(index)
        return self.transform(image), target

    def _item(self, index: int) -> tuple[Any, int]:
        while True:
            try:
                return self.dataset[index][:2]
            except ImageError as error:
                if self.unreadable is None or not isinstance(error, Undecodable):
                    raise ImageError(
                        f"{error}. Finished runs are kept; put it back as it was, and the same command continues"
                    ) from None
                index = self.unreadable.instead_of(index)


def seed_item_(index: int) -> None:
    """In a loader's worker, make what augments an item depend on the epoch and the item alone.

    A worker's own seed would make it depend on which items the worker had before, and so on where an epoch was gone on
    with, and on the number of workers.
    """
    worker = torch.utils.data.get_worker_info()
    if worker is None:
        return
    seed = seed_from(worker.seed - worker.id, index)  # the part that all workers of an epoch share
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
