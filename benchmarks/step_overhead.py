"""Time of a training step with masks held over the same step without, side by side in one process.

    python benchmarks/step_overhead.py [--pairs 30] [--device cpu]

Steps with and without the hooks alternate on the same model, weights and batch, so that drift of the machine hits both
alike. Printed: medians and the median of the pairwise ratios, with its quartiles, as a Markdown table.
"""

import argparse
import platform
import statistics
import time
from datetime import date

import timm
import torch
from torch import nn

import timm_tickets as tt

CASES = (("test_resnet", 32, 128), ("resnet18", 224, 16), ("vit_small_patch16_224", 224, 8))
SPARSITY = 0.9


def timed_step(model: nn.Module, optimizer: torch.optim.Optimizer, images: torch.Tensor, labels: torch.Tensor) -> float:
    began = time.perf_counter()
    nn.functional.cross_entropy(model(images), labels).backward()
    optimizer.step()
    optimizer.zero_grad()
    if images.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began


def measure(name: str, size: int, batch: int, pairs: int, device: str) -> tuple[list[float], list[float]]:
    """Seconds a step without and with masks, one pair after the other."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10).to(device)
    ticket = tt.create_pruner("magnitude", model, sparsity=SPARSITY).ticket
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=1e-4)
    images, labels = torch.randn(batch, 3, size, size, device=device), torch.randint(0, 10, (batch,), device=device)
    subnet = tt.Subnet(model, tuple(ticket.masks))
    without, with_masks = [], []
    for pair in range(-3, pairs):  # three to warm up
        subnet.release_()
        a = timed_step(model, optimizer, images, labels)
        ticket.attach(model, optimizer)
        b = timed_step(model, optimizer, images, labels)
        if pair >= 0:
            without.append(a)
            with_masks.append(b)
    return without, with_masks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    versions = f"torch {torch.__version__}, timm {timm.__version__}, Python {platform.python_version()}"
    threads = torch.get_num_threads()
    print(f"{date.today()}, {versions}, {args.device}, {threads} threads, sparsity {SPARSITY}, {args.pairs} pairs\n")
    print("| model | pixels | batch | ms without | ms with masks | ratio | quartiles |")
    print("|---|---|---|---|---|---|---|")
    for name, size, batch in CASES:
        without, with_masks = measure(name, size, batch, args.pairs, args.device)
        ratios = [b / a for a, b in zip(without, with_masks, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        a, b = (1000 * statistics.median(times) for times in (without, with_masks))
        print(f"| {name} | {size} | {batch} | {a:.1f} | {b:.1f} | {middle:.3f} | {low:.3f}..{high:.3f} |", flush=True)


if __name__ == "__main__":
    main()
