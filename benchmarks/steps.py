"""A step of each method that learns or holds masks over the same network's dense step, side by side in one process.

    python benchmarks/steps.py [--model resnet18] [--pixels 32] [--batch 64] [--rounds 5] [--methods imp ...]

Steps of the dense network and of every method take turns, so that drift of the machine hits all alike; what is compared
is processor time, which others on the machine do not add to, or on a card the time until it is done. Models that are
given 32 pixels get the stem for CIFAR: 3 x 3, stride 1, no pooling. Printed: a Markdown table of medians, the median
ratio to the dense step of the same turn, with its quartiles.
"""

import argparse
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from datetime import date
from typing import Any

import timm
import torch
from torch import nn

import timm_tickets as tt

SETTINGS: dict[str, dict[str, Any]] = {
    "imp": {"prune_rate": 0.9},
    "colt": {"prune_rate": 0.5, "split": "samples"},
    "continuous_sparsification": {"rewind": "0ep"},
    "edge_popup": {},
    "frozen_slt": {},
    "jackpot": {},
    "gradual": {"interval": 10},
    "set": {"interval": 10},
    "rigl": {"interval": 10},
}
SPARSITY = 0.9


def built(name: str, pixels: int) -> nn.Module:
    torch.manual_seed(0)
    model: Any = timm.create_model(name, num_classes=10)
    if pixels <= 32 and hasattr(model, "maxpool"):
        model.conv1 = nn.Conv2d(3, model.conv1.out_channels, 3, 1, 1, bias=False)
        model.maxpool = nn.Identity()
    return model.train()


class Steps:
    """One network being trained, dense or by a method, a step at a time."""

    def __init__(self, method: str | None, model: nn.Module, images: torch.Tensor, labels: torch.Tensor):
        self.model, self.images, self.labels = model.to(images.device), images, labels
        self.loss: Callable[..., Any] = lambda criterion, output, target: criterion(output, target)
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=5e-4)
        if method is not None:
            pruner = tt.create_pruner(method, model, sparsity=SPARSITY, epochs=100, **SETTINGS.get(method, {}))
            self.run = run = next(pruner)
            run.batches_per_epoch = 1000
            if method in ("imp", "colt"):  # of which the first round is dense
                masks = tt.create_pruner("magnitude", model, sparsity=SPARSITY).ticket.masks
                pruner.subnet.set_mask_(masks)
            optimizer = run.attach(optimizer)
            self.pruner, self.loss = pruner, run.loss
        self.optimizer = optimizer

    def __call__(self) -> None:
        self.loss(nn.functional.cross_entropy, self.model(self.images), self.labels).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def timed(step: Callable[[], None], cuda: bool) -> float:
    clock = time.perf_counter if cuda else time.process_time
    began = clock()
    step()
    if cuda:
        torch.cuda.synchronize()
    return clock() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--pixels", type=int, default=32)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--methods", nargs="+", default=list(SETTINGS))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")
    images = torch.randn(args.batch, 3, args.pixels, args.pixels, device=args.device)
    labels = torch.randint(0, 10, (args.batch,), device=args.device)
    found: dict[str, list[float]] = {name: [] for name in ("dense", *args.methods)}
    steps = {
        name: Steps(None if name == "dense" else name, built(args.model, args.pixels), images, labels) for name in found
    }
    for turn in range(-2, args.rounds):  # two to warm up
        for name, step in steps.items():
            seconds = timed(step, args.device != "cpu")
            if turn >= 0:
                found[name].append(seconds)
    versions = f"torch {torch.__version__}, timm {timm.__version__}, Python {platform.python_version()}"
    print(
        f"{date.today()}, {versions}, {args.device}, {args.threads} threads; {args.model}, {args.pixels} pixels, ",
        end="",
    )
    print(f"batch {args.batch}, sparsity {SPARSITY}, {args.rounds} steps each\n")
    print("| | ms | over dense | quartiles |\n|---|---|---|---|")
    for name, seconds in found.items():
        ratios = [a / b for a, b in zip(seconds, found["dense"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(f"| {name} | {1000 * statistics.median(seconds):.1f} | {middle:.3f} | {low:.3f}..{high:.3f} |")


if __name__ == "__main__":
    main()
