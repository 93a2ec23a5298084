"""Processor time of an image on its way to the model, kept and augmented in batches against timm's loader, one by one.

    OMP_NUM_THREADS=1 python benchmarks/loading.py [--repeats 7]

Both make whole training batches of the same made-up images in one process without workers, in turns, so that what else
the machine does hits both alike; printed are medians of the processor time (not of the clock), as a Markdown table. The
images of 32 pixels lie in memory as torchvision holds CIFAR's; those of 500 x 375 are JPEG files, decoded each time by
timm's loader and once by the cache (the first use, not counted). A step is forward, backward and SGD's.
"""

import argparse
import io
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torchvision
from PIL import Image
from timm.data import create_dataset
from torch import nn
from torch.utils.data import Dataset

from timm_tickets.config.parts import DataSettings
from timm_tickets.data.datasets import loader_of
from timm_tickets.data.images import Images
from timm_tickets.data.placing import Caches
from timm_tickets.data.transforms import Transformed, train_transform

CONFIG = {"mean": (0.49, 0.48, 0.45), "std": (0.25, 0.24, 0.26), "crop_pct": 0.9}


@dataclass(frozen=True)
class Case:
    """What is measured: images, batch, the data settings, and the model whose step it stands beside."""

    name: str
    model: str
    images: int
    batch: int
    size: int
    settings: dict[str, Any]
    interpolation: str = "bilinear"


CASES = (
    Case("CIFAR: pad, crop, flip", "cifar_resnet20", 2048, 128, 32, {"crop_padding": 4}),
    Case("the same and rotation", "cifar_resnet20", 2048, 128, 32, {"crop_padding": 4, "rotation": 15}),
    Case("digits: random resized crop", "test_resnet", 1280, 64, 32, {"color_jitter": 0, "hflip": 0}, "bicubic"),
    Case("resized crop, flip, erasing", "resnet18", 96, 32, 224, {"color_jitter": 0, "reprob": 0.25}, "bicubic"),
    Case("the same and colour jitter", "resnet18", 96, 32, 224, {"reprob": 0.25}, "bicubic"),
)


class Arrays(Dataset[Any]):
    """Images in memory, as torchvision's CIFAR holds them."""

    def __init__(self, count: int):
        self.data = np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        self.targets = [number % 10 for number in range(count)]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return Image.fromarray(self.data[index]), self.targets[index]


def photos(folder: Path, count: int) -> Images:
    """JPEG files of 500 x 375, as smooth as photographs."""
    noise = np.random.default_rng(0)
    (folder / "one").mkdir()
    for number in range(count):
        coarse = Image.fromarray(noise.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        held = io.BytesIO()
        coarse.resize((500, 375), Image.Resampling.BICUBIC).save(held, "JPEG", quality=90)
        (folder / "one" / f"{number:04d}.jpg").write_bytes(held.getvalue())
    return Images(create_dataset("", root=str(folder), search_split=False), "RGB")


def taken(work: Callable[[], Any]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def loaders(case: Case, images: Any) -> tuple[Any, Any]:
    """timm's and the cache's, over the same images."""
    settings = DataSettings(cache="host", workers=0, **case.settings)
    config = {**CONFIG, "input_size": (3, case.size, case.size), "interpolation": case.interpolation}
    single = Transformed(images, train_transform(settings, config))
    kept = Caches(settings, {"train": (images, None)}).of(config, torch.device("cpu"))["train"]
    kept.fill()
    return loader_of(single, case.batch, 0, shuffle=True), loader_of(kept, case.batch, 0, shuffle=True)


def step_of(case: Case) -> Callable[[], None]:
    torch.manual_seed(0)
    model = timm.create_model(case.model, num_classes=10)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    images, labels = torch.randn(case.batch, 3, case.size, case.size), torch.randint(0, 10, (case.batch,))

    def step() -> None:
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measured(case: Case, images: Any, repeats: int) -> list[float]:
    """Microseconds an image: timm's loader, the cache, the step."""
    single, kept = loaders(case, images)
    count = min(case.images // case.batch, 4) * case.batch
    step = step_of(case)
    works = [lambda loader=loader: list(islice(loader, count // case.batch)) for loader in (single, kept)]
    times: list[list[float]] = [[], [], []]
    for repeat in range(-1, repeats):  # one to warm up
        found = [*(taken(work) / count for work in works), taken(step) / case.batch]
        if repeat >= 0:
            for one, value in zip(times, found, strict=True):
                one.append(value)
    return [statistics.median(one) * 1e6 for one in times]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    versions = f"torch {torch.__version__}, torchvision {torchvision.__version__}, timm {timm.__version__}"
    print(f"{date.today()}, {versions}, Python {platform.python_version()}, {platform.machine()}, ", end="")
    print(f"{torch.get_num_threads()} thread, medians of {args.repeats}\n")
    print("| images | pixels | timm's loader, us | in batches, us | times as fast | images a second and core |", end="")
    print(" step of | us an image | loading of an epoch: timm's | in batches |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        files = photos(Path(folder), max(case.images for case in CASES if case.size > 32))
        for case in CASES:
            one, many, step = measured(case, Arrays(case.images) if case.size == 32 else files, args.repeats)
            shares = " | ".join(f"{100 * load / (load + step):.1f} %" for load in (one, many))
            print(
                f"| {case.name} | {case.size} | {one:.0f} | {many:.1f} | {one / many:.1f} | {1e6 / many:,.0f} ", end=""
            )
            print(f"| {case.model}, batch {case.batch} | {step:.0f} | {shares} |", flush=True)


if __name__ == "__main__":
    main()
