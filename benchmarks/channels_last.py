"""What a step costs with an image's channels innermost in memory, over torch's own layout.

    OMP_NUM_THREADS=1 python benchmarks/channels_last.py [--rounds 9] [--models resnet18:224:4 ...]

A model, the pixels of its images and how many are in a batch each; random weights and images, a step of SGD with
momentum and a forward pass for evaluation. Times are of the processor, the two layouts in turn, medians. Printed:
Markdown, as kept in results/channels_last.md.
"""

import argparse
import platform
import statistics
import time
from datetime import date

import timm
import torch
from torch import nn
from torch.nn import functional as F

import timm_tickets  # noqa: F401 - registers the papers' networks with timm

LAYOUTS = (torch.contiguous_format, torch.channels_last)
MODELS = [
    *(
        "test_resnet:32:64",
        "cifar_resnet20:32:64",
        "resnet18:32:64",
        "resnet18:224:4",
        "resnet50:96:4",
        "resnet50:224:2",
    ),
    *("resnetv2_18:64:16", "legacy_seresnet18:64:16", "skresnet18:64:16", "selecsls42:64:16", "selecsls42:224:2"),
    *(
        "densenet121:64:4",
        "regnety_002:96:8",
        "mobilenetv3_small_050:64:32",
        "efficientnet_lite0:96:8",
        "test_nfnet:32:64",
    ),
    *("test_convnext:32:64", "visformer_tiny:224:4", "test_vit:32:32", "swin_tiny_patch4_window7_224:224:1"),
]


def step(model: nn.Module, optimizer: torch.optim.Optimizer, images: torch.Tensor, target: torch.Tensor) -> float:
    """Processor seconds of a training step."""
    model.train()
    began = time.process_time()
    optimizer.zero_grad()
    F.cross_entropy(model(images), target).backward()
    optimizer.step()
    return time.process_time() - began


def scoring(model: nn.Module, images: torch.Tensor) -> float:
    """Processor seconds of a forward pass without gradients."""
    model.eval()
    began = time.process_time()
    with torch.no_grad():
        model(images)
    return time.process_time() - began


def measured(name: str, pixels: int, count: int, rounds: int) -> list[list[float]]:
    """Milliseconds of a step, then of a forward pass, in each layout."""
    images, target = torch.randn(count, 3, pixels, pixels), torch.arange(count) % 10
    models = [timm.create_model(name, num_classes=10).to(memory_format=each) for each in LAYOUTS]  # pyright: ignore
    optimizers = [torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, nesterov=True) for model in models]
    taken: list[list[list[float]]] = [[[], []] for _ in LAYOUTS]
    for _ in range(rounds + 1):
        for layout, model, optimizer, (steps, passes) in zip(LAYOUTS, models, optimizers, taken, strict=True):
            laid = images.contiguous(memory_format=layout)
            steps.append(step(model, optimizer, laid, target))
            passes.append(scoring(model, laid))
    return [[statistics.median(each[1:]) * 1000 for each in layout] for layout in taken]  # the first warms up


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--models", nargs="+", default=MODELS, metavar="MODEL:PIXELS:BATCH")
    args = parser.parse_args()
    torch.manual_seed(0)
    print(
        f"{date.today()}, torch {torch.__version__}, timm {timm.__version__}, Python {platform.python_version()}, ",
        end="",
    )
    print(f"{torch.get_num_threads()} thread(s), medians of {args.rounds}\n")
    print("| model | pixels | batch | ms a step | channels last | ratio | ms a forward pass | channels last | ratio |")
    print("|---|---|---|---|---|---|---|---|---|")
    for one in args.models:
        name, pixels, count = one.split(":")
        (steps, passes), (last_steps, last_passes) = measured(name, int(pixels), int(count), args.rounds)
        row = (steps, last_steps, last_steps / steps, passes, last_passes, last_passes / passes)
        shown = " | ".join(f"{value:.{2 if place % 3 == 2 else 1}f}" for place, value in enumerate(row))
        print(f"| {name} | {pixels} | {count} | {shown} |", flush=True)


if __name__ == "__main__":
    main()
