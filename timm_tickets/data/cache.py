"""Images that are decoded once and kept as bytes, on the device or in the host's memory, and augmented in batches.

Where they are kept changes no image but for a card's rounding, nor does the number of processes: what is drawn for one
depends on the seed of the pass and its index alone.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..core.errors import SettingError
from ..distributed.sigterm import Stopped, stop_asked
from .augmentation import Step
from .image_draws import ImageDraws, moved
from .subset import labels_of
from .transforms import Transformed

Track = Callable[[Iterable[Any], int], Iterable[Any]]

_TOGETHER = 64  # images that are decoded at a time


class Cached(Dataset[Any]):
    """A split whose images are decoded at their first use; asked for several, it gives a batch on the device.

    Args:
        source: The images as every one begins: uint8 (channels, height, width), the label beside.
        steps: What is done to a batch of them.
        kept_on: The device that holds them.
        device: The device that batches go to.
        workers: Processes that decode them.

    Attributes:
        images: All of them: one tensor where they have one size, else a list; None until they are decoded.
    """

    def __init__(
        self, source: Transformed, steps: Sequence[Step], kept_on: torch.device, device: torch.device, workers: int
    ):
        self.source, self.steps, self.kept_on, self.device, self.workers = source, steps, kept_on, device, workers
        self.targets = labels_of(source)
        self._seed = 0
        self.images: Tensor | list[Tensor] | None = None

    def __len__(self) -> int:
        return len(self.targets)

    def draw_from_(self, seed: int) -> None:
        """Augment by another seed from here on, as each pass through the images has one."""
        self._seed = seed

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        images, targets = self.__getitems__([index])
        return images[0], int(targets[0])

    def __getitems__(self, indices: Sequence[int]) -> list[Tensor]:
        """A batch; torch's loaders ask for it so, and for nothing smaller."""
        kept = self.fill() if self.images is None else self.images
        chosen = torch.tensor(indices)
        images: Any
        if isinstance(kept, Tensor):
            images = moved(kept.index_select(0, moved(chosen, kept.device)), self.device)
        else:
            images = [kept[index] for index in indices]
        draws = ImageDraws(self._seed, chosen)
        for step in self.steps:
            images = moved(step(images, draws), self.device)
        return [images, moved(self.targets[chosen], self.device)]

    def fill(self, track: Track | None = None) -> Tensor | list[Tensor]:
        """Decode the images.

        Args:
            track: Goes through the batches, so many, and shows how far it is.

        Raises:
            ImageError: One cannot be read, and none can stand for it.
            SettingError: They have different numbers of channels.
            Stopped: SIGTERM came meanwhile.
        """
        # A generator of its own: the training's draws must not depend on whether and when this is done.
        apart = torch.Generator()
        batches: Any = DataLoader(self.source, _TOGETHER, num_workers=self.workers, collate_fn=list, generator=apart)
        if track is not None:
            batches = track(batches, len(batches))
        kept: Any = None
        done = 0
        for batch in batches:
            if stop_asked():
                raise Stopped
            images = [image for image, _ in batch]
            if kept is None:
                kept = torch.empty(len(self), *images[0].shape, dtype=torch.uint8, device=self.kept_on)
            if isinstance(kept, Tensor) and any(image.shape != kept.shape[1:] for image in images):
                kept = [image.clone() for image in kept[:done]]
            if isinstance(kept, Tensor):
                kept[done : done + len(images)] = torch.stack(images)
            else:
                kept += [image.to(self.kept_on, copy=True) for image in images]
            done += len(images)
        if isinstance(kept, list) and len(counts := {image.shape[0] for image in kept}) > 1:
            raise SettingError(f"data.cache: images have {sorted(counts)} channels; set data.input_img_mode=RGB")
        self.images = kept
        return kept


def cache_of(dataset: Any) -> Cached | None:
    """The cache that a data set, or the one it is a part of, is; None where there is none."""
    while not isinstance(dataset, Cached) and hasattr(dataset, "dataset"):
        dataset = dataset.dataset
    return dataset if isinstance(dataset, Cached) else None


def whole(batch: Any) -> Any:
    """What a loader makes of a batch that is one already."""
    return batch
