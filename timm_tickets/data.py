"""Data: timm data sets and transforms for the trainer, the embedded digits, and subsets by class."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from accelerate import PartialState
from accelerate.data_loader import DataLoaderShard, prepare_data_loader
from timm.data import create_dataset, create_transform, resolve_data_config
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    Subset,
)

from .settings import SettingError, unknown

_read_labels: WeakKeyDictionary[Any, Tensor] = WeakKeyDictionary()


def labels_of(dataset: Any) -> Tensor:
    """The class of every item, int64, without decoding images where the data set says them.

    Looks at ``targets`` (torchvision), ``samples`` (image folders, timm's readers) and ``tensors`` (TensorDataset, the
    last one); otherwise reads every item once and remembers.
    """
    if isinstance(dataset, Subset):
        return labels_of(dataset.dataset)[torch.as_tensor(dataset.indices, dtype=torch.int64)]
    if isinstance(dataset, ConcatDataset):
        return torch.cat([labels_of(part) for part in dataset.datasets])
    found: Any = getattr(dataset, "targets", None)
    if found is None:
        samples = getattr(dataset, "samples", getattr(getattr(dataset, "reader", None), "samples", None))
        if samples is not None:
            found = [sample[1] for sample in samples]
        elif tensors := getattr(dataset, "tensors", None):
            found = tensors[-1]
    if found is not None:
        change = getattr(dataset, "target_transform", None)
        return torch.as_tensor([change(target) for target in found] if change else found, dtype=torch.int64)
    if dataset not in _read_labels:
        _read_labels[dataset] = torch.tensor([int(dataset[i][1]) for i in range(len(dataset))])
    return _read_labels[dataset]


@dataclass(frozen=True)
class Selection:
    """Which items a run trains on; those of all the conditions together.

    Attributes:
        classes: Only these classes.
        part: ``(i, n)``: the i-th of n parts of all items, drawn by the seed.
        batches: Only so many batches of a loader, drawn by the seed.
        seed: Of what is drawn.
    """

    classes: Sequence[int] | None = None
    part: tuple[int, int] | None = None
    batches: int | None = None
    seed: int = 0

    @property
    def everything(self) -> bool:
        return self.classes is None and self.part is None and self.batches is None

    def indices(self, dataset: Any, batch_size: int | None) -> list[int]:
        """The selected items, in their order."""
        chosen = torch.ones(len(dataset), dtype=torch.bool)
        if self.classes is not None:
            chosen &= torch.isin(labels_of(dataset), torch.as_tensor(self.classes))
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(self.seed))
        if self.part is not None:
            number, parts = self.part
            mine = torch.zeros_like(chosen)
            mine[order[number::parts]] = True
            chosen &= mine
        if self.batches is not None and batch_size is not None:
            few = order[chosen[order]][: self.batches * batch_size]
            chosen = torch.zeros_like(chosen)
            chosen[few] = True
        found = chosen.nonzero().flatten().tolist()
        if not found:
            raise ValueError(f"subset: none of the {len(dataset)} items is of the run's classes {self.classes}")
        return found


def subset_of(data: Any, selection: Selection) -> Any:
    """The selected items, labels unchanged, in their order; ``data`` itself where everything is selected.

    Args:
        data: A map-style data set, a ``DataLoader`` over one, or timm's prefetching loader.
        selection: What to keep.

    Raises:
        ValueError: A loader without a map-style data set, or whose sampler cannot be made again for a subset.
    """
    if selection.everything:
        return data
    if hasattr(data, "loader") and not isinstance(data, DataLoader):  # timm's PrefetchLoader
        out = copy.copy(data)
        out.loader = subset_of(data.loader, selection)
        return out
    if not is_loader(data):
        items: Any = data
        return Subset(items, selection.indices(data, None))
    if isinstance(data.dataset, IterableDataset):
        raise ValueError(
            "subset: a stream cannot be cut to some of its items; use a data set with an item for each index"
        )
    shard: Any = data.batch_sampler
    batches = shard
    while hasattr(batches, "batch_sampler"):  # Accelerate's shard of it
        batches = batches.batch_sampler
    if type(batches) is not BatchSampler:
        raise _cannot_cut(batches)
    items = data.dataset
    part: Any = Subset(items, selection.indices(items, batches.batch_size))
    loader = DataLoader(
        part,
        batch_size=min(batches.batch_size, max(1, len(part))),
        sampler=_sampler_for(part, batches.sampler),
        drop_last=batches.drop_last,
        num_workers=data.num_workers,
        collate_fn=data.collate_fn,
        pin_memory=data.pin_memory,
        timeout=data.timeout,
        worker_init_fn=data.worker_init_fn,
        multiprocessing_context=data.multiprocessing_context,
        generator=data.generator,
        prefetch_factor=data.prefetch_factor,
        persistent_workers=data.persistent_workers,
    )
    if not isinstance(data, DataLoaderShard):
        return loader
    state = PartialState()
    return prepare_data_loader(
        loader,
        device=data.device,
        put_on_device=data.device is not None,
        num_processes=state.num_processes,
        process_index=state.process_index,
        split_batches=getattr(shard, "split_batches", False),
        even_batches=getattr(shard, "even_batches", True),
        rng_types=data.rng_types,
    )


def is_loader(data: Any) -> bool:
    """Whether this yields batches, and is not a data set to be indexed."""
    return not hasattr(data, "__getitem__") and hasattr(data, "__iter__")


def _sampler_for(part: Any, sampler: Any) -> Sampler[int]:
    if isinstance(sampler, Shuffled):
        return Shuffled(part, sampler.seed)
    if isinstance(sampler, DistributedSampler):
        out = DistributedSampler(
            part, sampler.num_replicas, sampler.rank, sampler.shuffle, sampler.seed, sampler.drop_last
        )
        out.set_epoch(sampler.epoch)
        return out
    if isinstance(sampler, RandomSampler):
        # As many draws for each item as before, where a number was asked for.
        asked = getattr(sampler, "_num_samples", None)
        draws = None if asked is None else max(1, round(asked * len(part) / len(sampler.data_source)))
        return RandomSampler(part, sampler.replacement, draws, sampler.generator)
    if isinstance(sampler, SequentialSampler):
        return SequentialSampler(part)
    raise _cannot_cut(sampler)


def _cannot_cut(sampler: Any) -> ValueError:
    return ValueError(
        f"subset: a loader with a {type(sampler).__name__} cannot be cut to some items; give `Run.subset` the data set "
        "instead and build the loader of what it returns"
    )


class Shuffled(Sampler[int]):
    """All items in an order that depends on a seed alone; set `seed` before each epoch."""

    def __init__(self, dataset: Any, seed: int = 0):
        self.length = len(dataset)
        self.seed = seed

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(self.length, generator=torch.Generator().manual_seed(self.seed)).tolist())


class Digits(Dataset[tuple[Any, int]]):
    """scikit-learn's 1,797 handwritten digits as RGB images of 32 x 32: real data that needs no network.

    Source: Alpaydin & Kaynak 1998, UCI Optical Recognition of Handwritten Digits; enlarged from 8 x 8 bilinearly.

    Args:
        split: ``train`` or ``test``. A fixed, stratified fifth (360 images) is the test set.
        transform: Applied to each PIL image.
    """

    def __init__(self, split: str, transform: Any = None):
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
        self.images = [image.resize((32, 32), Image.Resampling.BILINEAR).convert("RGB") for image in small]
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
        SettingError: It cannot be opened.
    """
    if settings.dataset == "digits":
        return Digits(split)
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
        return _Transformed(self._train, create_transform(**config, **augmentation, **more, is_training=True))

    def val_set(self, model: nn.Module) -> Dataset[Any]:
        return _Transformed(self._val, create_transform(**self._config(model)))

    def test_set(self, model: nn.Module) -> Dataset[Any]:
        return _Transformed(self._test, create_transform(**self._config(model)))

    def _config(self, model: nn.Module) -> dict[str, Any]:
        s = self.settings
        names = ("img_size", "in_chans", "mean", "std", "interpolation", "crop_pct", "crop_mode")
        return resolve_data_config({name: getattr(s, name) for name in names}, model=model)


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
        image, target = self.dataset[index][:2]
        return self.transform(image), target


def loader_of(dataset: Dataset[Any], batch_size: int, workers: int, shuffle: bool = False) -> DataLoader[Any]:
    """A loader for training (shuffled by a seed, whole batches only, as timm does) or for evaluation.

    Workers are started afresh for each epoch: ones that persist would carry random state from epoch to epoch, and a
    resumed run would see other augmentations than one that was never stopped.
    """
    return DataLoader(
        dataset,
        batch_size=min(batch_size, len(dataset)),  # pyright: ignore[reportArgumentType]
        sampler=Shuffled(dataset) if shuffle else None,
        drop_last=shuffle,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
    )
