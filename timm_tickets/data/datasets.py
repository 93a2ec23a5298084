"""Data: a recipe's splits through timm's transforms, and the loaders over them."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from PIL import ImageMode
from timm.data import create_transform, resolve_data_config
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset

from ..core.errors import SettingError
from ..distributed.processes import rank, world_size
from .cache import cache_of, whole
from .contents import check_apart, contents, record
from .digits import Digits
from .images import ImageError, Images, Unreadable, original
from .placing import Caches
from .splits import label_names, open_splits
from .subset import Shuffled, labels_of
from .transforms import Transformed, train_transform

# So many images take long to read.
_MANY = 10_000


class Data:
    """The recipe's three splits: training, validation (held out from training where it has no split), test.

    Args:
        settings: The recipe's ``data`` part.

    Attributes:
        num_classes: From the settings, else counted in the training labels.
        record: What is in the splits, by role and class: what tells whether they have changed.
        unreadable: The training images that could not be decoded; None where they lie in no files.
        caches: The images that are decoded once.

    Raises:
        SettingError: A split is not there, is another's too, or has other classes.
    """

    def __init__(self, settings: Any):
        from sklearn.model_selection import train_test_split

        self.settings = settings
        self._splits = open_splits(settings)
        found = [contents(split) for split in self._splits]
        check_apart(self._splits, found)
        self.record = record(self._splits, found)
        train, test = self._splits[0].data, self._splits[-1].data
        labels = labels_of(train)
        classes = int(labels.max()) + 1
        if labels.min() < 0:
            raise SettingError(f"data.train_split: {self._splits[0].where} has images without a label")
        self.num_classes = settings.num_classes or classes
        if self.num_classes < classes:
            raise SettingError(f"data.num_classes: {self.num_classes} is too few; the labels go up to {classes - 1}")
        self._test, self._train, self._val = test, train, self._splits[1].data
        if settings.val_split is None:
            try:
                kept, held = train_test_split(
                    np.arange(len(labels)),
                    test_size=settings.val_fraction,
                    stratify=labels.numpy(),
                    random_state=settings.split_seed,
                )
            except ValueError as error:
                raise SettingError(
                    f"data.val_fraction: {settings.val_fraction} of {len(labels)} images in {classes} classes cannot "
                    f"be held out evenly: {error}; choose another fraction, or name a data.val_split"
                ) from error
            self._train, self._val = Subset(train, np.sort(kept).tolist()), Subset(train, np.sort(held).tolist())
        self.unreadable = None
        if isinstance(self._splits[0].whole, Images):
            self.unreadable = Unreadable(labels_of(self._train), partial(_name, self._train), settings.unreadable)
        splits = {"train": (self._train, self.unreadable), "val": (self._val, None), "test": (self._test, None)}
        self.caches = Caches(settings, splits)

    @property
    def count(self) -> int:
        """Images to train on."""
        return len(self._train)

    @property
    def told(self) -> str:
        """In a sentence, what is read for what."""
        where = {split.role: split.where for split in self._splits}
        held = " held out" if "val" not in where else ""
        places = [f" ({where[role]})" if role in where else "" for role in ("train", "val", "test")]
        return (
            f"data: {len(self._train):,} images to train on{places[0]}, {len(self._val):,}{held} to validate on"
            f"{places[1]}, {len(self._test):,} to test on{places[2]}"
        )

    def check_channels(self, model: nn.Module, channels: int) -> None:
        """Refuse, before the first batch does, images that have not as many channels as the model takes.

        Raises:
            SettingError: They have not.
        """
        train = self._splits[0].whole
        mode = train.mode if isinstance(train, Images) else train[0][0].mode
        found = None if mode is None else len(ImageMode.getmode(mode).bands)
        if found not in (None, channels):
            ours = isinstance(train, Images | Digits)
            mend = f"data.input_img_mode={'L' if channels == 1 else 'RGB'}, or " if ours and channels in (1, 3) else ""
            raise SettingError(
                f"data.input_img_mode: the images' mode {mode} has {found} channels, and the model takes {channels}; "
                f"set {mend}model.in_chans={found}"
            )
        given = {name: getattr(self.settings, name) for name in ("mean", "std")}
        _check_lengths({name: value for name, value in given.items() if value and len(value) > 1}, channels)
        if self.settings.in_chans not in (None, channels):
            raise SettingError(
                f"data.in_chans: images of {self.settings.in_chans} channels cannot be had, as the model takes "
                f"{channels}; leave it out, so that it follows model.in_chans"
            )
        config = self.preprocessing(model)
        _check_lengths({name: config[name] for name in given}, channels)

    def check_scored(self, say: Callable[[str], None]) -> None:
        """Read every validation and test image once: for one that cannot be read no other may stand.

        Every process has to ask; they share the images.

        Args:
            say: Told beforehand where that takes long.

        Raises:
            SettingError: In all of them, where there are such images.
        """
        if not isinstance(self._splits[0].whole, Images):
            return
        images = _Tried(ConcatDataset([self._val, self._test]))
        if len(images) > _MANY:
            say(f"reading the {len(images):,} images to validate and test on once, as each will have to be scored")
        mine = Subset(images, range(rank(), len(images), world_size()))
        loader = DataLoader(mine, 32, num_workers=self.settings.workers, collate_fn=list, generator=torch.Generator())
        found = [text for texts in loader for text in texts if text]
        if world_size() > 1:
            found = gather_object(found)
        if found:
            raise SettingError(
                f"data: {len(found):,} of {len(images):,} images to validate and test on cannot be scored, and no "
                "other may stand for them; mend or remove\n  "
                + "\n  ".join(sorted(found)[:8])
                + (f"\n  and {len(found) - 8:,} more" if len(found) > 8 else "")
            )

    def train_set(self, model: nn.Module) -> Dataset[Any]:
        """The training images one by one, augmented as the settings say."""
        return Transformed(self._train, train_transform(self.settings, self.preprocessing(model)), self.unreadable)

    def val_set(self, model: nn.Module) -> Dataset[Any]:
        return Transformed(self._val, create_transform(**self.preprocessing(model)))

    def test_set(self, model: nn.Module) -> Dataset[Any]:
        return Transformed(self._test, create_transform(**self.preprocessing(model)))

    def sets(self, model: nn.Module, device: torch.device) -> list[Dataset[Any]]:
        """The images to train, validate and test on: those that are kept in batches, the others one by one.

        Args:
            model: Whose preprocessing they get.
            device: Where batches go.

        Raises:
            SettingError: They cannot be kept where `data.cache` says.
        """
        plain = {"train": self.train_set(model), "val": self.val_set(model), "test": self.test_set(model)}
        return [*(plain | self.caches.of(self.preprocessing(model), device)).values()]

    @property
    def label_names(self) -> dict[int, str]:
        """The names of the labels, as far as there are any."""
        return label_names(self._splits[0], self.settings.classes)

    def input_size(self, model: nn.Module) -> tuple[int, int]:
        """Height and width of an image as the model gets it."""
        return self.preprocessing(model)["input_size"][1:]

    def preprocessing(self, model: nn.Module) -> dict[str, Any]:
        """What timm makes of the settings and the model: size, mean, deviation, interpolation and crop of an image."""
        s = self.settings
        names = ("img_size", "in_chans", "mean", "std", "interpolation", "crop_pct", "crop_mode")
        return resolve_data_config({name: getattr(s, name) for name in names}, model=model)


def _check_lengths(values: Mapping[str, Sequence[float]], channels: int) -> None:
    for name, one in values.items():
        if len(one) != channels:
            raise SettingError(
                f"data.{name}: has {len(one)} values ({', '.join(f'{v:g}' for v in one)}), and the model takes "
                f"{channels} channels; give one value for all of them, or one for each"
            )


class _Tried(Dataset[str]):
    """Of each image of a data set, what is wrong with it; nothing where it can be read."""

    def __init__(self, dataset: Any):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> str:
        try:
            self.dataset[index]
        except ImageError as error:
            return str(error)
        return ""


def _name(dataset: Any, index: int) -> str:
    """The file of an image of a part of a data set."""
    images, place = original(dataset, index)
    return images.name(place)


def loader_of(dataset: Dataset[Any], batch_size: int, workers: int, shuffle: bool = False) -> DataLoader[Any]:
    """A loader for training (shuffled by a seed, whole batches only, as timm does) or for evaluation.

    Workers are started afresh for each epoch: from their seed, the epoch's, every item's augmentation is drawn. What
    comes from a cache comes in batches, without them.
    """
    cached = cache_of(dataset) is not None
    return DataLoader(
        dataset,
        batch_size=min(batch_size, len(dataset)),  # pyright: ignore[reportArgumentType]
        sampler=Shuffled(dataset) if shuffle else None,
        drop_last=shuffle,
        num_workers=0 if cached else workers,
        collate_fn=whole if cached else None,
        pin_memory=torch.cuda.is_available() and not cached,
    )
