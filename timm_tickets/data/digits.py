"""The embedded data set: scikit-learn's digits."""

from typing import Any

import numpy as np
from torch.utils.data import Dataset

from ..core.errors import SettingError, unknown


class Digits(Dataset[tuple[Any, int]]):
    """scikit-learn's 1,797 handwritten digits as RGB images of 32 x 32: real data that needs no network.

    Source: Alpaydin & Kaynak 1998, UCI Optical Recognition of Handwritten Digits; enlarged from 8 x 8 bilinearly.

    Args:
        split: ``train`` or ``test``. A fixed, stratified fifth (360 images) is the test set.
        mode: PIL's mode of the images: RGB, or L for one channel.
        name: Of the setting that names the split, for the message where there is none.

    Raises:
        SettingError: There is no such split.
    """

    classes = tuple("0123456789")

    def __init__(self, split: str, mode: str = "RGB", name: str = "split of the digits"):
        from PIL import Image
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        if split not in ("train", "test"):
            raise SettingError(unknown(name, split, ("train", "test")))
        bunch: Any = load_digits()
        train, test = train_test_split(
            np.arange(len(bunch.target)), test_size=0.2, stratify=bunch.target, random_state=0
        )
        chosen = np.sort(train if split == "train" else test)
        pixels = np.round(bunch.images[chosen] * (255 / 16)).astype(np.uint8)
        small = [Image.fromarray(image) for image in pixels]
        self.images = [image.resize((32, 32), Image.Resampling.BILINEAR).convert(mode) for image in small]
        self.targets = bunch.target[chosen].tolist()

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.images[index], self.targets[index]
