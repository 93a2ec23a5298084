"""Splits: which images training, validation and test really read, and that their classes are the same.

timm reads the whole root where a split's folder is not there, takes any word but 'train' for torchvision's test part,
and numbers the classes of each split by themselves. Here a split has to be there, and the training split's class map
is everyone's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from timm.data import create_dataset
from torch.utils.data import Dataset
from torchvision.datasets import DatasetFolder

from ..core.errors import SettingError, unknown
from .digits import Digits
from .images import Images
from .subset import labels_of

# timm takes each word of a row for any other of it.
TRAIN = ("train", "training")
EVAL = ("val", "valid", "validation", "eval", "evaluation")
_TWO_PARTS = ("cifar10", "cifar100", "mnist", "kmnist", "fashion_mnist", "qmnist")
_FOLDERS = ("folder", "image_folder")
_STREAMS = ("hfids", "tfds", "wds")


@dataclass
class Split:
    """One split of a data set.

    Attributes:
        role: What it is for: train, val or test.
        word: Its name in the recipe.
        where: What is read, for messages.
        data: Its images without a transform, and their labels.
    """

    role: str
    word: str
    where: str
    data: Any

    @property
    def setting(self) -> str:
        return f"data.{self.role}_split"

    @property
    def whole(self) -> Any:
        """The data set itself, where `data` has some classes of it."""
        return self.data.dataset if isinstance(self.data, Classes) else self.data

    @property
    def chosen(self) -> Sequence[int]:
        """Which of the whole's images are in `data`."""
        return self.data.indices if isinstance(self.data, Classes) else range(len(self.data))


class Classes(Dataset[Any]):
    """The images of some classes, whose labels become their places in the list."""

    def __init__(self, dataset: Any, classes: tuple[int, ...], where: str):
        labels = labels_of(dataset)
        missing = sorted(set(classes) - set(labels.tolist()))
        if missing or len(set(classes)) < len(classes):
            none = f"no image of class {', '.join(map(str, missing))}; it has " if missing else ""
            raise SettingError(
                f"data.classes: {list(classes)} is not valid; {where} has {none}classes {int(labels.min())} to "
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


def open_splits(settings: Any) -> list[Split]:
    """The recipe's splits, training first and test last; without validation where that is held out from training.

    Raises:
        SettingError: A split is not there or cannot be opened, or its classes are not the training split's.
    """
    words = {role: getattr(settings, f"{role}_split") for role in ("train", "val", "test")}
    splits = [_open(settings, role, word) for role, word in words.items() if word is not None]
    if settings.class_map is None and all(isinstance(split.data, Images) and split.data.classes for split in splits):
        _number_alike([split.data for split in splits])
    if settings.classes is not None:
        for split in splits:
            split.data = Classes(split.data, settings.classes, split.where)
    for other in splits[1:]:
        _check_classes(splits[0], other)
    return splits


def _open(settings: Any, role: str, word: str) -> Split:
    name, setting = settings.dataset, f"data.{role}_split"
    prefix, _, rest = name.lower().rpartition("/")
    where, root, search = f"split {word!r} of {name}", settings.data_dir, True
    if name == "digits":
        if root is not None:
            raise SettingError(
                f"data.data_dir: {root!r} would not be read, as the dataset 'digits' is embedded; set "
                "data.dataset=folder to read images from there, or leave it out"
            )
        return Split(role, word, where, Digits(word, settings.input_img_mode or "RGB", setting))
    if prefix.partition("/")[0] in _STREAMS:
        raise SettingError(
            f"data.dataset: {name} is read as a stream, and a search needs images that can be asked for by number; "
            "use hfds/, torch/ or a folder"
        )
    if prefix == "torch" and rest in _TWO_PARTS and word not in (*TRAIN, "test", *EVAL):
        raise SettingError(unknown(setting, word, (*TRAIN, "test", *EVAL)))
    if prefix == "torch" and root is None:
        raise SettingError(
            f"data.data_dir: is not set, and {name} is read from there; give a folder, and data.dataset_download=true "
            "where it is not in it yet"
        )
    if prefix.partition("/")[0] not in ("torch", "hfds") or (prefix == "torch" and rest in _FOLDERS):
        where = root = str(_folder_of(settings, role, word))
        search = False
    try:
        found: Any = create_dataset(
            name,
            root=root,
            split=word,
            search_split=search,
            download=settings.dataset_download,
            class_map=settings.class_map,
            input_img_mode=settings.input_img_mode,
        )
    except (RuntimeError, ValueError, OSError, AssertionError, ImportError, TypeError, KeyError) as error:
        raise SettingError(
            f"data: timm cannot open split {word!r} of {name!r} in data_dir {settings.data_dir!r}: "
            f"{error}; check data.dataset, data.data_dir and the split names, or set data.dataset_download=true"
        ) from error
    if isinstance(found, DatasetFolder) or hasattr(found, "reader"):
        found = Images(found, settings.input_img_mode)
    return Split(role, word, where, found)


def _folder_of(settings: Any, role: str, word: str) -> Path:
    """The folder of a split, by timm's rule, but that timm takes the whole root where there is none.

    Raises:
        SettingError: There is none.
    """
    if settings.data_dir is None:
        raise SettingError(
            f"data.data_dir: is not set; dataset {settings.dataset!r} is read from a folder that has one for each "
            f"split. {_others(settings.dataset)}"
        )
    root = Path(settings.data_dir)
    if not root.is_dir():
        raise SettingError(f"data.data_dir: {str(root)!r} is not a folder; give the one with the splits' folders")
    alike = (word, *next((row for row in (TRAIN, EVAL) if word in row), ()))
    for one in alike:
        if (root / one).exists():
            return root / one
    there = sorted(path.name for path in root.iterdir() if path.is_dir() or path.suffix == ".tar")
    scored = next((one for one in EVAL if one in there), None)
    if role == "test" and "test" not in there and scored is not None and any(one in there for one in TRAIN):
        raise SettingError(
            f"data.test_split: there is no {word!r} in {root}, which has {', '.join(there)}. Set "
            f"data.test_split={scored} to score each ticket on {scored} once, and to validate on images held out of "
            f"training (data.val_fraction={settings.val_fraction:g}); or make a folder {word} of images that are in "
            f"none of these, and set data.val_split={scored} to validate on {scored}"
        )
    for near in (root.resolve().parent, *(root / one for one in there[:60])):
        if any((near / one).is_dir() for one in alike):
            raise SettingError(
                f"data.{role}_split: there is no folder {word!r} in {root}, but in {near}; set data.data_dir={near}"
            )
    raise SettingError(unknown(f"data.{role}_split", word, there) + f" (the folders in {root})")


def _others(dataset: str) -> str:
    close = get_close_matches(dataset.lower().replace("-", ""), ("digits", *_TWO_PARTS), n=1, cutoff=0.8)
    if not close:
        return "The embedded 'digits' and timm's 'torch/cifar10' are others"
    return f"Did you mean {'digits' if close == ['digits'] else f'torch/{close[0]}'!r}?"


def _number_alike(splits: Sequence[Images]) -> None:
    """Number the classes of all splits as the training split's are, the first one.

    Classes that only other splits have come last: they are refused then, or left out by ``data.classes``.
    """
    ours = dict.fromkeys(name for split in splits for name in split.names)
    if all(split.classes == splits[0].classes and list(ours) == list(split.classes) for split in splits):
        return
    for split in splits:
        split.number_({name: number for number, name in enumerate(ours)})


def _check_classes(train: Split, other: Split) -> None:
    """Refuse a split whose classes are not the training split's: its score would be that of another task."""
    wanted, found = (set(labels_of(split.data).tolist()) for split in (train, other))
    if wanted == found:
        return
    names = class_names(train) | class_names(other)

    def told(numbers: set[int]) -> str:
        listed = [f"{names[one]!r} ({one})" if one in names else str(one) for one in sorted(numbers)]
        return ", ".join(listed[:8]) + (f" and {len(listed) - 8:,} more" if len(listed) > 8 else "")

    wrong = [f"no image of class {told(wanted - found)}"] if wanted - found else []
    wrong += [f"class {told(found - wanted)}, of which training has no image"] if found - wanted else []
    raise SettingError(
        f"{other.setting}: the classes of {other.where} are not those of {train.where}: it has "
        f"{', and '.join(wrong)}. Name the classes alike in all splits, or choose with data.classes, by number, those "
        "that all of them have"
    )


def class_names(split: Split) -> dict[int, str]:
    """The names of a split's labels, where they have any."""
    if not isinstance(split.data, Images):
        return {}
    return {number: name or "no folder" for name, number in split.data.classes.items()}


def label_names(split: Split, chosen: Sequence[int] | None) -> dict[int, str]:
    """The names of the labels that a model is trained on, as far as the data set has any.

    Args:
        split: The training split.
        chosen: The classes that were chosen, in the order of their labels; all where None.
    """
    whole = split.whole
    if isinstance(whole, Images):
        names = {number: name for name, number in whole.classes.items()}
    else:  # torchvision's data sets, and the digits
        names = dict(enumerate(getattr(whole, "classes", ())))
    if chosen is not None:
        names = {label: names[number] for label, number in enumerate(chosen) if number in names}
    return {label: str(name) for label, name in names.items() if name}
