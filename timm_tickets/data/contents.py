"""What splits contain: no image twice, and in each life of a search the same."""

import filecmp
import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..core.errors import SettingError
from .digits import Digits
from .images import Images
from .splits import Split, class_names
from .subset import labels_of

Record = Mapping[str, Mapping[str, Sequence[Any]]]  # by role and class: how many images, and their digest


@dataclass
class Contents:
    """What is in a split.

    Attributes:
        classes: By class, how many images, and a digest of them. Of images in files a digest of their names and sizes,
            of arrays one of every value, of other data sets (hfds/, where reading takes long) one of the labels.
        files: Of each image, what all names of its file share, links included; None where it lies in none.
        exact: Whether the digest is one of every value.
    """

    classes: dict[str, tuple[int, str]]
    files: list[Any] | None = field(default=None, repr=False)
    exact: bool = False


def contents(split: Split) -> Contents:
    """Look every file of a split up and open none: a second for 200,000.

    Raises:
        SettingError: A file is listed that is not there.
    """
    labels = labels_of(split.data).tolist()
    looked_up = split.whole.files(split.chosen) if isinstance(split.whole, Images) else None
    if looked_up is None:
        digest, values = hashlib.sha256(np.asarray(labels).tobytes()), _values(split.whole)
        for value in values:
            digest.update(value)
        return Contents({"": (len(labels), digest.hexdigest())}, exact=bool(values))
    names, counts, sums, files = class_names(split), defaultdict(int), defaultdict(int), []
    try:
        for label, (name, size, file) in zip(labels, looked_up, strict=True):
            counts[label] += 1
            # A sum, because the order of names that sort alike is not the same everywhere.
            sums[label] += int.from_bytes(hashlib.blake2b(f"{name}\0{size}".encode(), digest_size=8).digest(), "big")
            files.append(file)
    except OSError as error:
        raise SettingError(
            f"{split.setting}: {error.filename} cannot be found: {error.strerror}; mend the link, or remove it"
        ) from None
    return Contents(
        {names.get(label, str(label)): (counts[label], f"{sums[label] % 2**64:016x}") for label in sorted(counts)},
        files,
    )


def _values(data: Any) -> list[Any]:
    """The images of a data set that holds them in memory; none of others."""
    if isinstance(data, Digits):
        return [image.tobytes() for image in data.images]
    values = getattr(data, "data", None)  # torchvision's
    return [] if values is None else [np.ascontiguousarray(values)]


def check_apart(splits: Sequence[Split], found: Sequence[Contents]) -> None:
    """Refuse an image that is in two splits.

    Raises:
        SettingError: There is one.
    """
    for number, later in enumerate(splits):
        for before, split in enumerate(splits[:number]):
            if (shared := _shared(split, found[before], later, found[number])) is None:
                continue
            hint = "; without data.val_split, data.val_fraction of the training images is held out to validate on"
            raise SettingError(
                f"{later.setting}: {shared}; what is trained on, validated on and scored at the end have to be "
                "different images" + hint * ("val" in (split.role, later.role))
            )


def _shared(one: Split, its: Contents, other: Split, others: Contents) -> str | None:
    """In words, what two splits have in common."""
    if its.files is not None and others.files is not None:
        known = set(its.files)
        double = [place for place, file in enumerate(others.files) if file in known]
        if double:
            name = other.whole.name(other.chosen[double[0]])
            return f"{len(double):,} of the {len(others.files):,} images are in {one.setting} too, such as {name}"
        same = its.classes == others.classes and _copied(one, other)
        return f"{other.where} is a copy of {one.where}, which is {one.setting}" if same else None
    same = its.classes == others.classes if its.exact else _overlap(one.word, other.word)
    return f"{other.where} has images of {one.setting} ({one.word!r})" if same else None


def _overlap(one: str, other: str) -> bool:
    """Whether two splits share images by their words alone, such as 'train' and 'train[:10%]' of hfds/."""
    left, right = ({part.partition("[")[0]: part for part in word.split("+")} for word in (one, other))
    return one == other or any(name in (left[name], right[name]) for name in left.keys() & right)


def _copied(one: Split, other: Split) -> bool:
    """Whether splits whose images have the same names and sizes are the same images; a few of them tell."""
    places = range(0, len(one.chosen), len(one.chosen) // 32 + 1)
    pairs = [[split.whole.name(split.chosen[place]) for split in (one, other)] for place in places]
    try:
        return all(filecmp.cmp(*pair, shallow=False) for pair in pairs)
    except OSError:  # they are in tars
        return False


def record(splits: Sequence[Split], found: Sequence[Contents]) -> Record:
    """What an experiment's folder remembers of its images."""
    return {split.role: its.classes for split, its in zip(splits, found, strict=True)}


def differences(old: Record, new: Record) -> list[str]:
    """In words, which splits are not what they were, each with a class where that shows."""
    told = []
    for role in {**old, **new}:
        before, now = ({name: tuple(one) for name, one in its.get(role, {}).items()} for its in (old, new))
        changed = [name for name in {**before, **now} if before.get(name) != now.get(name)]
        if not changed:
            continue
        there, here = (sum(count for count, _ in its.values()) for its in (before, now))
        text = f"{role}: {there:,} images there, {here:,} now"
        if name := next(filter(None, changed), ""):
            counts = [its.get(name, (0,))[0] for its in (before, now)]
            text += f"; class {name!r}: {counts[0]:,} there, {counts[1]:,} now"
        told.append(text + ("" if there != here else ", of other names or sizes" if name else ", with other values"))
    return told
