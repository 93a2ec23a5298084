"""Subsets of data sets and loaders: by class, by part, by number of batches."""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from accelerate.data_loader import DataLoaderShard, prepare_data_loader
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    Subset,
)

from ..core.errors import SettingError
from ..core.seeds import seed_from
from ..distributed.processes import join_processes

_read_labels: WeakKeyDictionary[Any, Tensor] = WeakKeyDictionary()


def labels_of(dataset: Any) -> Tensor:
    """The class of every item, int64, without decoding images where the data set says them.

    Looks at ``targets`` (torchvision), ``samples`` (image folders), ``tensors`` (TensorDataset, the last one) and what
    timm's readers say; otherwise reads every item once and remembers.
    """
    if isinstance(dataset, Subset):
        return labels_of(dataset.dataset)[torch.as_tensor(dataset.indices, dtype=torch.int64)]
    if isinstance(dataset, ConcatDataset):
        return torch.cat([labels_of(part) for part in dataset.datasets])
    reader = getattr(dataset, "reader", None)
    found: Any = getattr(dataset, "targets", getattr(reader, "targets", None))
    if found is None:
        samples = getattr(dataset, "samples", getattr(reader, "samples", None))
        if samples is not None:
            found = [sample[1] for sample in samples]
        elif tensors := getattr(dataset, "tensors", None):
            found = tensors[-1]
        elif reader is not None and hasattr(reader, "iter_targets"):
            found = list(reader.iter_targets())
    if found is not None:
        change = getattr(dataset, "target_transform", None)
        return torch.as_tensor([change(target) for target in found] if change else found, dtype=torch.int64)
    if dataset not in _read_labels:
        try:
            _read_labels[dataset] = torch.tensor([int(dataset[i][1]) for i in range(len(dataset))])
        except (TypeError, ValueError, RuntimeError, IndexError) as error:
            raise ValueError(
                f"subset: a {type(dataset).__name__} does not give (image, class) for each index ({error}); give "
                "a torch DataLoader, or such a data set"
            ) from error
    return _read_labels[dataset]


@dataclass(frozen=True)
class Selection:
    """Which items a run trains on; those of all the conditions together.

    Attributes:
        classes: Only these classes.
        part: ``(i, n)``: the i-th of n parts of all items, drawn by the seed.
        batches: Only so many batches of a loader, all processes' together, drawn by the seed.
        per_class: Only so many items of each class, or all where it has fewer, drawn by the seed.
        seed: Of what is drawn.
    """

    classes: Sequence[int] | None = None
    part: tuple[int, int] | None = None
    batches: int | None = None
    per_class: int | None = None
    seed: int = 0

    @property
    def everything(self) -> bool:
        return self.classes is None and self.part is None and self.batches is None and self.per_class is None

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
        if self.per_class is not None:
            labels = labels_of(dataset)
            if labels.ndim != 1:
                raise ValueError(
                    "subset: images of each class cannot be drawn where an image has no single class; let the method "
                    "read whole batches instead (`batches`)"
                )
            labels = labels[order]
            few = [order[(labels == label) & chosen[order]][: self.per_class] for label in labels.unique()]
            chosen = torch.zeros_like(chosen)
            chosen[torch.cat(few)] = True
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
        SettingError: A loader without a map-style data set, or whose sampler cannot be made again for a subset.
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
        raise SettingError(
            "subset: a stream cannot be cut to some of its items; use a data set with an item for each index"
        )
    shard: Any = data.batch_sampler
    batches = shard
    while hasattr(batches, "batch_sampler"):  # Accelerate's shard of it
        batches = batches.batch_sampler
    if type(batches) is not BatchSampler:
        raise _cannot_cut(batches)
    items = data.dataset
    together = _drawn_together(shard, batches.sampler)
    part: Any = Subset(items, selection.indices(items, batches.batch_size * together))
    batch_size, drop_last = min(batches.batch_size, max(1, len(part) // together)), batches.drop_last
    if selection.per_class is not None:  # in batches of one size, none left out
        parts = together * (shard.num_processes if getattr(shard, "split_batches", False) else 1)
        count = math.ceil(len(part) / (batches.batch_size * together))
        batch_size, drop_last = math.ceil(len(part) / (count * parts)) * (parts // together), False
        while parts == 1 and batch_size > 1 and len(part) % batch_size == 1:
            batch_size += 1  # batch normalisation cannot take a last batch of one image
    loader = DataLoader(
        part,
        batch_size=batch_size,
        sampler=_sampler_for(part, batches.sampler),
        drop_last=drop_last,
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
    state = join_processes()
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


def _drawn_together(shard: Any, sampler: Any) -> int:
    """How many of this loader's batches make one of the training: processes that each draw a whole one of their own."""
    if isinstance(sampler, DistributedSampler):
        return sampler.num_replicas
    while hasattr(shard, "batch_sampler") and not hasattr(shard, "num_processes"):  # Accelerate's, that skips some
        shard = shard.batch_sampler
    return 1 if getattr(shard, "split_batches", True) else shard.num_processes


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
        # As many draws for each item as before.
        draws = max(1, round(sampler.num_samples * len(part) / len(sampler.data_source)))
        return RandomSampler(part, sampler.replacement, draws, sampler.generator)
    if isinstance(sampler, SequentialSampler):
        return SequentialSampler(part)
    raise _cannot_cut(sampler)


def _cannot_cut(sampler: Any) -> SettingError:
    if type(sampler).__name__ == "_RepeatSampler":
        return SettingError(
            "subset: timm's multi-epoch loader draws from all items for ever and cannot be cut to some; leave out "
            "--use-multi-epochs-loader (use_multi_epochs_loader of timm's create_loader)"
        )
    return SettingError(
        f"subset: a loader with a {type(sampler).__name__} cannot be cut to some items; give `run.subset` the data set "
        "instead and build the loader of what it returns"
    )


class Shuffled(Sampler[int]):
    """All items in an order that depends on a seed alone; set `seed` before each epoch.

    A data set that augments by a seed (`cache.Cached`) is told one of the same; gone through again without a new seed,
    the items come in the same order, augmented anew.

    Attributes:
        first: How many items to leave out at the beginning, to go on within an epoch.
        before: Called with an item's place in the order before it is given, and with the length at the end.
    """

    def __init__(self, dataset: Any, seed: int = 0):
        self.dataset, self.length = dataset, len(dataset)
        self.seed = seed
        self.first = 0
        self.before: Callable[[int], None] | None = None

    @property
    def seed(self) -> int:
        return self._seed

    @seed.setter
    def seed(self, value: int) -> None:
        self._seed, self._passes = value, 0

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        images = self.dataset
        while hasattr(images, "dataset"):
            images = images.dataset
        if hasattr(images, "draw_from_"):
            images.draw_from_(seed_from(self.seed, self._passes))
        self._passes += 1
        order = torch.randperm(self.length, generator=torch.Generator().manual_seed(self.seed)).tolist()
        for place in range(self.first, self.length):
            if self.before is not None:
                self.before(place)
            yield order[place]
        if self.before is not None:
            self.before(self.length)


def slice_classes(output: Any, target: Tensor, classes: Sequence[int]) -> tuple[Any, Tensor]:
    """Logits and targets as if the head had these classes only; soft targets are scaled to sum to 1 again.

    Raises:
        ValueError: A target of another class.
    """
    index = torch.as_tensor(classes, device=target.device)
    if isinstance(output, tuple | list):
        output = tuple(one[:, index] for one in output)
    else:
        output = output[:, index]
    if target.ndim > 1:
        part = target[:, index]
        return output, part / part.sum(dim=1, keepdim=True)
    order = index.argsort()
    place = order[torch.searchsorted(index[order], target).clamp(max=len(classes) - 1)]
    # On a GPU the check would wait for the device at every batch.
    if target.device.type == "cpu" and not torch.equal(index[place], target):
        raise ValueError(f"target: holds classes outside this run's {list(classes)}; train on `run.subset(loader)`")
    return output, place
