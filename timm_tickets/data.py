"""Data: timm data sets and transforms for the trainer, and the embedded digits."""

import random
from typing import Any

import numpy as np
import torch
from timm.data import create_dataset, create_transform, resolve_data_config
from timm.data.transforms import str_to_interp_mode
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision import transforms

from .seeds import seed_from
from .settings import SettingError, unknown
from .subset import Shuffled, labels_of


class Digits(Dataset[tuple[Any, int]]):
    """scikit-learn's 1,797 handwritten digits as RGB images of 32 x 32: real data that needs no network.

    Source: Alpaydin & Kaynak 1998, UCI Optical Recognition of Handwritten Digits; enlarged from 8 x 8 bilinearly.

    Args:
        split: ``train`` or ``test``. A fixed, stratified fifth (360 images) is the test set.
        transform: Applied to each PIL image.
        mode: PIL's mode of the images: RGB, or L for one channel.
    """

    def __init__(self, split: str, transform: Any = None, mode: str = "RGB"):
        from PIL import Image
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        if split not in ("train", "test"):
            raise SettingError(unknown("split of the digits", split, ("train", "test")))
        bunch: Any = load_digits()
        train, test = train_test_split(
            np.arange(len(bunch.target)), test_size=0.2, stratify=bunch.target, random_state=0
        )
        chosen = np.sort(train if split == "train" else test)
        pixels = np.round(bunch.images[chosen] * (255 / 16)).astype(np.uint8)
        small = [Image.fromarray(image) for image in pixels]
        self.images = [image.resize((32, 32), Image.Resampling.BILINEAR).convert(mode) for image in small]
        self.targets = bunch.target[chosen].tolist()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = self.images[index]
        return (image if self.transform is None else self.transform(image)), self.targets[index]


def split_dataset(settings: Any, split: str) -> Any:
    """One split of the recipe's data set, without a transform: the embedded ``digits`` or any of timm's.

    Raises:
        SettingError: It cannot be opened, or has none of the classes that were asked for.
    """
    whole = _open(settings, split)
    return whole if settings.classes is None else _Classes(whole, settings.classes)


def _open(settings: Any, split: str) -> Any:
    if settings.dataset == "digits":
        return Digits(split, mode=settings.input_img_mode or "RGB")
    try:
        return create_dataset(
            settings.dataset,
            root=settings.data_dir,
            split=split,
            download=settings.dataset_download,
            class_map=settings.class_map,
            input_img_mode=settings.input_img_mode,
        )
    except (RuntimeError, ValueError, OSError, AssertionError, ImportError, TypeError, KeyError) as error:
        raise SettingError(
            f"data: timm cannot open split {split!r} of {settings.dataset!r} in data_dir {settings.data_dir!r}: "
            f"{error}; check data.dataset, data.data_dir and the split names, or set data.dataset_download=true"
        ) from error


class _Classes(Dataset[Any]):
    """The images of some classes, whose labels become their places in the list."""

    def __init__(self, dataset: Any, classes: tuple[int, ...]):
        labels = labels_of(dataset)
        missing = sorted(set(classes) - set(labels.tolist()))
        if missing or len(set(classes)) < len(classes):
            raise SettingError(
                f"data.classes: {list(classes)} is not valid; the data has classes {int(labels.min())} to "
                f"{int(labels.max())}, each to be named once"
            )
        place = {label: index for index, label in enumerate(classes)}
        self.dataset = dataset
        self.indices = [index for index, label in enumerate(labels.tolist()) if label in place]
        self.targets = [place[int(labels[index])] for index in self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.dataset[self.indices[index]][0], self.targets[index]


class Data:
    """The recipe's three splits: training, validation (held out from training), test.

    Args:
        settings: The recipe's ``data`` part.

    Attributes:
        num_classes: From the settings, else counted in the training labels.
    """

    def __init__(self, settings: Any):
        from sklearn.model_selection import train_test_split

        self.settings = settings
        train = split_dataset(settings, settings.train_split)
        labels = labels_of(train)
        classes = int(labels.max()) + 1
        self.num_classes = settings.num_classes or classes
        if self.num_classes < classes:
            raise SettingError(f"data.num_classes: {self.num_classes} is too few; the labels go up to {classes - 1}")
        self._test = split_dataset(settings, settings.test_split)
        if settings.val_split is not None:
            self._train, self._val = train, split_dataset(settings, settings.val_split)
            return
        try:
            kept, held = train_test_split(
                np.arange(len(labels)),
                test_size=settings.val_fraction,
                stratify=labels.numpy(),
                random_state=settings.split_seed,
            )
        except ValueError as error:
            raise SettingError(
                f"data.val_fraction: {settings.val_fraction} of {len(labels)} images in {classes} classes cannot be "
                f"held out evenly: {error}; choose another fraction, or name a data.val_split"
            ) from error
        self._train, self._val = Subset(train, np.sort(kept).tolist()), Subset(train, np.sort(held).tolist())

    def train_set(self, model: nn.Module) -> Dataset[Any]:
        """The training images, augmented as the settings say."""
        s = self.settings
        names = ("no_aug", "train_crop_mode", "scale", "ratio", "hflip", "vflip", "color_jitter")
        augmentation = {name: getattr(s, name) for name in names}
        more = {"auto_augment": s.aa, "re_prob": s.reprob, "re_mode": s.remode, "re_count": s.recount}
        config = self._config(model)
        if s.train_interpolation:
            config["interpolation"] = s.train_interpolation
        if s.crop_padding is not None:
            return _Transformed(self._train, padded_crop(config, s.crop_padding, s.hflip, s.rotation))
        return _Transformed(self._train, create_transform(**config, **augmentation, **more, is_training=True))

    def val_set(self, model: nn.Module) -> Dataset[Any]:
        return _Transformed(self._val, create_transform(**self._config(model)))

    def test_set(self, model: nn.Module) -> Dataset[Any]:
        return _Transformed(self._test, create_transform(**self._config(model)))

    def _config(self, model: nn.Module) -> dict[str, Any]:
        s = self.settings
        names = ("img_size", "in_chans", "mean", "std", "interpolation", "crop_pct", "crop_mode")
        return resolve_data_config({name: getattr(s, name) for name in names}, model=model)


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
    name = config["interpolation"]
    interpolation: Any = str_to_interp_mode("bilinear" if name == "random" else name)
    steps = [
        transforms.Resize(size, interpolation),
        transforms.RandomCrop(size, padding),
        transforms.RandomHorizontalFlip(hflip),
    ]
    if rotation:
        steps.append(transforms.RandomRotation(rotation))
    return transforms.Compose([*steps, transforms.ToTensor(), transforms.Normalize(config["mean"], config["std"])])


class _Transformed(Dataset[Any]):
    """A view of a data set through a transform: training and validation share images but not augmentation."""

    def __init__(self, dataset: Any, transform: Any):
        self.dataset = dataset
        self.transform = transform

    @property
    def targets(self) -> Tensor:
        return labels_of(self.dataset)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        seed_item_(index)
        image, target = self.dataset[index][:2]
        return self.transform(image), target


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


def loader_of(dataset: Dataset[Any], batch_size: int, workers: int, shuffle: bool = False) -> DataLoader[Any]:
    """A loader for training (shuffled by a seed, whole batches only, as timm does) or for evaluation.

    Workers are started afresh for each epoch: from their seed, the epoch's, every item's augmentation is drawn.
    """
    return DataLoader(
        dataset,
        batch_size=min(batch_size, len(dataset)),  # pyright: ignore[reportArgumentType]
        sampler=Shuffled(dataset) if shuffle else None,
        drop_last=shuffle,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
    )
