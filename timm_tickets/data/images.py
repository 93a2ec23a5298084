"""Images that each lie in a file of their own: read one by one, so that one that cannot be decoded is known by name.

timm puts the next image, of whatever class, in its place.
"""

import multiprocessing
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import Any

import torch
from accelerate.utils import gather_object
from PIL import Image, UnidentifiedImageError
from timm.data.readers.reader_image_folder import ReaderImageFolder
from timm.utils import natural_key
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets import DatasetFolder

from ..core.errors import TrainingError
from ..distributed.processes import world_size
from .subset import labels_of


class ImageError(TrainingError):
    """An image that cannot be read.

    Raised in a loader's worker, it is made again here, of the worker's whole traceback: only its message is kept.
    """

    def __init__(self, text: str):
        super().__init__(text.rpartition(f"{type(self).__name__}: ")[2].strip())


class Undecodable(ImageError):
    """A file that can be read and does not hold an image."""


class Images(Dataset[tuple[Any, int]]):
    """The images of one split.

    Args:
        dataset: timm's, or torchvision's of folders.
        mode: PIL's mode to convert to; None leaves each as it is, and torchvision's as RGB.

    Attributes:
        targets: The class of each, int64.
        classes: The number of each class by its name; empty where the data set names none.
    """

    def __init__(self, dataset: Any, mode: str | None):
        self.mode, self.targets = mode, labels_of(dataset)
        if isinstance(dataset, DatasetFolder):
            self.reader, self.mode = _Listed(dataset), mode or "RGB"
        else:
            self.reader = dataset.reader
        names = getattr(self.reader, "class_to_idx", getattr(self.reader, "class_name_to_idx", {}))
        self.classes: dict[str, int] = names

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        with self._opened(index) as image:
            if self.mode:
                image = image.convert(self.mode)
            image.load()
        return image, int(self.targets[index])

    def size(self, index: int) -> tuple[int, int]:
        """Width and height of an image, as its file says before it is decoded."""
        with self._opened(index) as image:
            return image.size

    @contextmanager
    def _opened(self, index: int) -> Iterator[Image.Image]:
        try:
            with self.reader[index][0] as file:
                data = file.read()
        except OSError as error:
            reason = error.strerror or error
            raise ImageError(f"{self.name(index)} cannot be read: {reason}") from error
        try:
            yield Image.open(BytesIO(data))
        except MemoryError:
            raise
        except Exception as error:  # PIL's decoders raise what they like
            reason = "it is no image" if isinstance(error, UnidentifiedImageError) else error
            raise Undecodable(f"{self.name(index)} cannot be decoded: {reason}") from error

    def name(self, index: int) -> str:
        """The file of an image, for messages."""
        return str(self.reader.filename(index, absolute=True) or f"image {index}")

    @property
    def names(self) -> list[str]:
        """The names of the classes in the order of their numbers.

        Those that sort alike, such as 'a' and 'A', timm's folders number in an order that changes from one process to
        the next.
        """
        found = sorted(self.classes, key=self.classes.__getitem__)
        if hasattr(self.reader, "samples") and not isinstance(self.reader, _Listed):
            found.sort(key=lambda name: (natural_key(name), name))
        return found

    def number_(self, numbers: dict[str, int]) -> None:
        """Number the classes so; every one here has to be named."""
        moved = torch.zeros(max(self.classes.values()) + 1, dtype=torch.int64)
        for name, number in self.classes.items():
            moved[number] = numbers[name]
        self.targets, self.classes = moved[self.targets], numbers

    def files(self, chosen: Iterable[int]) -> Iterator[tuple[str, int, Any]] | None:
        """For each of these images its name within the split, its bytes, and what two names of one file share.

        Looks each file up, and opens none. None where the data set does not say where its images are.

        Raises:
            OSError: A file is not there.
        """
        if not hasattr(self.reader, "samples"):
            return None
        return self._in_tar(chosen) if hasattr(self.reader, "class_name_to_idx") else self._in_folder(chosen)

    def _in_folder(self, chosen: Iterable[int]) -> Iterator[tuple[str, int, Any]]:
        root = os.path.join(self.reader.root, "")
        for index in chosen:
            path = self.reader.samples[index][0]
            found = os.stat(path)
            yield path.removeprefix(root), found.st_size, (found.st_dev, found.st_ino)

    def _in_tar(self, chosen: Iterable[int]) -> Iterator[tuple[str, int, Any]]:
        whole = os.stat(self.reader.root)
        for index in chosen:
            member, _, inner = self.reader.samples[index]
            within = None if inner is None else inner.name
            yield member.name, member.size, (whole.st_dev, whole.st_ino, within, member.offset_data)


def original(dataset: Any, index: int) -> tuple[Any, int]:
    """The data set that one is a part of, and the place of an image there."""
    while hasattr(dataset, "indices"):
        dataset, index = dataset.dataset, dataset.indices[index]
    return dataset, index


class _Listed(ReaderImageFolder):
    """timm's reader of images that torchvision has found.

    Args:
        found: An image folder of torchvision's.
    """

    def __init__(self, found: Any):
        self.root, self.samples, self.class_to_idx = found.root, found.samples, found.class_to_idx


class Unreadable:
    """Which training images could not be decoded, as far as they have been read: at most a share of them.

    Args:
        targets: The class of each training image.
        name: The file of an image.
        share: Largest share of them that may be.
    """

    def __init__(self, targets: Tensor, name: Callable[[int], str], share: float):
        self.targets, self.name, self.share = targets, name, share
        # A loader's workers are other processes; what they write here is seen by all.
        self.flags = torch.zeros(len(targets), dtype=torch.bool).share_memory_()
        self._told = 0

    def instead_of(self, index: int) -> int:
        """Remember an image that cannot be decoded, and give the next one of its class, in a circle.

        Raises:
            ImageError: There is none, or too many cannot be.
        """
        self.flags[index] = True
        self._check(self._found())
        same = (self.targets == self.targets[index]) & ~self.flags
        if not same.any():
            raise ImageError(f"data: no training image of the class of {self.name(index)} can be decoded; mend them")
        places = same.nonzero().flatten()
        return int(places[torch.searchsorted(places, index) % len(places)])

    def look(self, say: Callable[[str], None]) -> None:
        """At an epoch's end, say what was found since the last; every process that trains with this one has to ask.

        Raises:
            ImageError: In all of them, where too many cannot be decoded.
        """
        found = self._found()
        if world_size() > 1:
            found = sorted({*gather_object(found)})
            self.flags[found] = True
        self._check(found)
        if len(found) > self._told:
            self._told = len(found)
            say(
                f"{len(found):,} of {len(self.targets):,} training images cannot be decoded, and the next of its class "
                f"is taken for each: {self._names(found)}"
            )

    def _found(self) -> list[int]:
        return self.flags.nonzero().flatten().tolist()

    def _check(self, found: list[int]) -> None:
        count = len(self.targets)
        if len(found) > self.share * count:
            raise ImageError(
                f"data.unreadable: {len(found):,} of {count:,} training images cannot be decoded, more than the share "
                f"of {self.share:g} that may be: {self._names(found)}. Finished runs are kept: set it higher, such as "
                f"{min(0.99, max(0.05, 2 * len(found) / count)):.2g}, and the same command continues; or mend these "
                "files, and begin again with --restart"
            )

    def _names(self, found: list[int]) -> str:
        more = f" and {len(found) - 5:,} more" if len(found) > 5 else ""
        return ", ".join(map(self.name, found[:5])) + more


_DEATH = re.compile(r"DataLoader worker .*(exited unexpectedly|killed by signal)")


@contextmanager
def minding_workers() -> Iterator[None]:
    """Say in words that a process that loads images has died.

    Around everything: torch tells of it by a signal, wherever the training then is.

    Raises:
        TrainingError: Instead of what torch raises.
    """
    try:
        yield
    except TrainingError:
        raise
    except (RuntimeError, EOFError, ConnectionError) as error:
        found = _DEATH.search(str(error))
        if found is None and not isinstance(error, RuntimeError):  # its pipe broke; torch's signal is just behind
            try:
                time.sleep(1)
            except RuntimeError as late:
                found = _DEATH.search(str(late))
        if found is None:
            raise
        multiprocessing.active_children()  # buries it, or torch would tell again when any other process ends
        raise TrainingError(
            f"a process that loads images has died ({found[0]}). Finished runs are kept, and the same command "
            "continues. Mostly it is for want of memory: free some, or begin again with data.workers=0 and --restart"
        ) from error
