"""Where a recipe's images are kept: `data.cache`, and what `auto` makes of it on this machine.

Every process keeps all images for itself, and counts on its part of the machine's memory: sharing one copy would take a
segment that outlives a process that is killed, and decoding is the smaller cost.
"""

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from ..core.errors import SettingError
from ..distributed.processes import any_of
from .augmentation import not_in_batches, steps_of
from .cache import Cached, Track
from .images import ImageError, Images, Unreadable, original
from .transforms import Transformed, beginning

MODES = ("RGB", "L")
_SHARE = 4  # of the free memory, a quarter at most
_FOR_A_WORKER = 512  # files; fewer are decoded before one has started
_SAMPLE = 128  # images, whose sizes stand for all


@dataclass(frozen=True)
class Place:
    """Where a split's images are kept.

    Attributes:
        where: ``device`` or ``host``; ``none`` where they pass one by one through timm's loader.
        size: Bytes that they take.
        why: What stands in the way, where they are kept nowhere.
    """

    where: str
    size: int = 0
    why: str = ""


class Caches:
    """The images of a recipe's splits, decoded once for all that is trained in a process.

    Args:
        settings: The recipe's ``data`` part.
        splits: By role (train, val, test) the images without a transform, and which of them cannot be decoded.
    """

    def __init__(self, settings: Any, splits: Mapping[str, tuple[Any, Unreadable | None]]):
        self.settings, self.splits = settings, splits
        self._places: dict[Any, dict[str, Place]] = {}
        self._made: dict[Any, dict[str, Cached]] = {}

    def of(self, config: dict[str, Any], device: torch.device) -> dict[str, Cached]:
        """By role those splits that are kept; every process has to ask for the first time together.

        Args:
            config: What `timm.data.resolve_data_config` found.
            device: Where batches go.

        Raises:
            SettingError: They cannot be kept where the recipe says.
        """
        key = (str(device), repr(config))
        if key not in self._made:
            self._made[key] = {}
            for role, place in self.places(config, device).items():
                if place.where == "none":
                    continue
                images, unreadable = self.splits[role]
                train = role == "train"
                source = Transformed(images, beginning(self.settings, config, train), unreadable)
                kept_on = device if place.where == "device" else torch.device("cpu")
                workers = len(images) // _FOR_A_WORKER if isinstance(original(images, 0)[0], Images) else 0
                workers = min(workers, self.settings.workers)
                self._made[key][role] = Cached(source, steps_of(self.settings, config, train), kept_on, device, workers)
        return self._made[key]

    def fill(self, track: Track | None = None) -> None:
        """Decode what is kept and is not decoded yet; raises what `Cached.fill` does."""
        for made in self._made.values():
            for one in made.values():
                if one.images is None:
                    one.fill(track)

    def told(self, config: dict[str, Any], device: torch.device) -> str:
        """In a sentence, which images are kept where, and what stands in the way of the others."""
        names = {"train": "training", "val": "validation", "test": "test"}
        memory = {"host": "the host's memory" if device.type == "cuda" else "memory", "device": "the device's memory"}
        groups: dict[tuple[str, str], list[str]] = {}
        places = self.places(config, device)
        for role, place in places.items():
            groups.setdefault((place.where, place.why), []).append(role)
        told = []
        for (where, why), roles in groups.items():
            some = " and ".join(names[role] for role in roles)
            images = f"{'all' if len(roles) == len(places) else some} images"
            if where == "none":
                told.append(f"{images} pass one by one through timm's loader ({why})")
            else:
                size = bytes_in_words(sum(places[role].size for role in roles))
                told.append(f"{images} are decoded once into {memory[where]} ({size}) and pass in batches")
        return "data: " + "; ".join(told)

    def places(self, config: dict[str, Any], device: torch.device) -> dict[str, Place]:
        """Where the images of each split are to be kept."""
        key = (str(device), repr(config))
        if key not in self._places:
            if self.settings.cache == "none":
                self._places[key] = dict.fromkeys(self.splits, Place("none", why="data.cache=none"))
            else:
                self._places[key] = self._placed(config, device)
        return self._places[key]

    def _placed(self, config: dict[str, Any], device: torch.device) -> dict[str, Place]:
        asked, found = self.settings.cache, {}
        needs = {role: self._needs(role, config) for role in self.splits}
        free = {"device": _free_on(device), "host": _free_here()}
        if asked != "auto":
            where = "host" if device.type == "cpu" else asked
            if why := next((why for why, _ in needs.values() if why), ""):
                raise SettingError(
                    f"data.cache: {asked} cannot be had with {why}, which takes images one by one; set "
                    "data.cache=auto, or leave that out"
                )
            size = sum(size for _, size in needs.values())
            if any_of([size > free[where]])[0]:
                raise SettingError(
                    f"data.cache: {asked} has no room for the decoded images, {bytes_in_words(size)} of "
                    f"{bytes_in_words(free[where])} that are free; set data.cache=auto or none"
                )
            return {role: Place(where, size) for role, (_, size) in needs.items()}
        room = {where: count // _SHARE for where, count in free.items()}
        for role, (why, size) in needs.items():
            where = next((where for where in room if size <= room[where]), "none")
            elsewhere = any_of([where != "device", where == "none"])  # all processes alike
            where = "none" if why or elsewhere[1] else "host" if elsewhere[0] else "device"
            if where == "none":
                most = bytes_in_words(max(room.values()))
                why = why and f"{why} is not done in batches"
                found[role] = Place("none", why=why or f"decoded they take {bytes_in_words(size)}, of {most} allowed")
                continue
            room[where] -= size
            found[role] = Place(where, size)
        return found

    def _needs(self, role: str, config: dict[str, Any]) -> tuple[str, int]:
        """What stands in the way of keeping the images of a split, and how many bytes they take."""
        s, images, train = self.settings, self.splits[role][0], role == "train"
        if any(mode not in MODES for mode in _modes(images)):
            return f"data.input_img_mode={s.input_img_mode or 'null'}", 0
        if train and (why := not_in_batches(s, config)):
            return why, 0
        channels, height, width = config["input_size"]
        whole = train and s.crop_padding is None and not s.no_aug  # crops are drawn from it as it lies there
        return "", round(len(images) * channels * (_area(images) if whole else height * width))


def _some(images: Any) -> Iterator[tuple[Any, int]]:
    """Some of the images: their data set, and the place of each there."""
    return (original(images, index) for index in range(0, len(images), len(images) // _SAMPLE + 1))


def _modes(images: Any) -> set[Any]:
    """The modes of PIL's that images are in."""
    data, _ = original(images, 0)
    if isinstance(data, Images):
        return {data.mode}
    return {getattr(data[place][0], "mode", None) for data, place in _some(images)}


def _area(images: Any) -> float:
    """Pixels of an image, on average over some of them."""
    areas = []
    for data, place in _some(images):
        with suppress(ImageError):  # another stands for it
            areas.append(math.prod(data.size(place) if isinstance(data, Images) else data[place][0].size))
    return sum(areas) / max(len(areas), 1)


def _free_on(device: torch.device) -> int:
    """Bytes that are free on a card, for each of the processes that may share it."""
    if device.type != "cuda":
        return 0
    return torch.cuda.mem_get_info(device)[0] // -(-_processes_here() // torch.cuda.device_count())


def _free_here() -> int:
    """Bytes that are free in the host's memory, or this container's part of it, for each of its processes."""
    free, folder = psutil.virtual_memory().available, Path("/sys/fs/cgroup")
    with suppress(OSError, ValueError):  # no container, or "max"
        free = min(free, int((folder / "memory.max").read_text()) - int((folder / "memory.current").read_text()))
    return max(free, 0) // _processes_here()


def _processes_here() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # torchrun's and Accelerate's launchers say so


def bytes_in_words(count: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB"
