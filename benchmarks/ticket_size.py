"""Size of tickets against what information theory says they must hold, and the time to code their masks.

    python benchmarks/ticket_size.py [--steps 8] [--only resnet18]

Every ticket is searched by its method, with a few steps of SGD on handwritten digits a run: far too few to be accurate,
but masks, scores and batch-norm statistics are the methods' own. The pretrained weights of the jackpot are simulated: a
fixed random state dict, given to the ticket as such, with trained-looking normalisation. Prints Markdown tables.
"""

import argparse
import platform
import statistics
import tempfile
import time
import warnings
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import timm
import torch
from sklearn.datasets import load_digits
from torch import nn

import timm_tickets as tt
from timm_tickets.tickets.mask_coding import decode, encode

SPARSITY = 0.9
SEARCHES: dict[str, dict[str, Any]] = {
    "imp": {"prune_rate": 0.7},
    "colt": {"prune_rate": 0.6, "partitions": 2},
    "frozen_slt": {"frozen": 0.7, "scale": "dynamic"},
}
PAPER_BYTES, PAPER_FP32 = 418_663, 44_657_408  # Otsuka et al. 2024: (1 - F) N / 8 bytes, .419 MB; 4 N bytes, 44.66 MB
CIFAR_WEIGHTS = 11_164_352


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """1,797 handwritten digits as 3 x 32 x 32, and their labels."""
    bunch: Any = load_digits()
    images = torch.tensor(bunch.images / 16, dtype=torch.float32)[:, None].repeat(1, 3, 1, 1)
    images = nn.functional.interpolate((images - 0.3) / 0.38, size=32, mode="bilinear")
    return images, torch.tensor(bunch.target)


def searched(method: str, model: nn.Module, steps: int, **settings: Any) -> tt.Ticket:
    """The ticket a method finds with this many steps a run."""
    images, labels = digits()
    pruner = tt.create_pruner(method, model, epochs=1, **settings)
    for run in pruner:
        optimizer = run.attach(torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1, momentum=0.9))
        chosen = torch.isin(labels, torch.tensor(run.classes)) if run.classes else labels >= 0
        own = chosen.nonzero().flatten()
        run.batches_per_epoch = steps
        model.train()
        for step in range(steps):
            batch = own[32 * step % len(own) :][:32]
            run.loss(nn.functional.cross_entropy, model(images[batch]), labels[batch]).backward()
            optimizer.step()
            optimizer.zero_grad()
    return pruner.ticket


def cifar_resnet18() -> nn.Module:
    """ResNet-18 for 32 pixels: a 3x3 stem of stride 1 and no pooling after it."""
    model: Any = timm.create_model("resnet18", num_classes=10)
    model.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    model.maxpool = nn.Identity()
    return model


def sized(ticket: tt.Ticket, folder: Path, dtype: str | None = None) -> Any:
    """The ticket's sizes, once its file has been written and read back."""
    path = folder / "one.ticket"
    ticket.save(path, dtype=dtype)
    given = None if ticket.pretrained is None else ticket.pretrained.state
    loaded = tt.load_ticket(path, pretrained=given)
    assert dtype is not None or loaded.fingerprint == ticket.fingerprint
    return tt.weigh(path)


def seconds_to_code(ticket: tt.Ticket) -> float:
    """Median of five times encoding and decoding all of a ticket's masks, nothing of them known."""
    masks = [mask.flatten().numpy() for mask in ticket.masks.values()]
    counts = [(len(mask), int(mask.sum())) for mask in masks]
    taken = []
    for _ in range(5):
        began = time.perf_counter()
        list(decode(encode(masks), counts))
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def masks_table(names: list[str], steps: int, folder: Path) -> None:
    print("\n## Masks and whole files at .9, in bytes\n")
    print("beyond: everything in the file but values, over the mask bound; code: encoding and decoding all masks\n")
    columns = ("model", "method", "mask bound", "coded / bound", "values", "file", "file / (bound + values)")
    print("| " + " | ".join((*columns, "beyond", "code")) + " |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name in names:
        for method, settings in SEARCHES.items():
            torch.manual_seed(0)
            ticket = searched(method, timm.create_model(name, num_classes=10), steps, sparsity=SPARSITY, **settings)
            size = sized(ticket, folder)
            print(
                f"| {name} | {method} | {size.bound:,.0f} | {size.masks / size.bound:.5f} | {size.values:,} | "
                f"{size.file:,} | {size.file / (size.bound + size.values):.5f} | "
                f"{(size.file - size.values) / size.bound:.5f} | {seconds_to_code(ticket):.2f} s |",
                flush=True,
            )


def frozen_table(steps: int, folder: Path) -> None:
    print(f"\n## Frozen SLT, F = .7, ResNet-18 (CIFAR), {CIFAR_WEIGHTS:,} weights\n")
    print(f"The paper's arithmetic: {PAPER_BYTES:,} bytes of mask; {PAPER_FP32:,} bytes in fp32.\n")
    print(
        "| sparsity | statistics | masks | statistics, bytes | header and the rest | file | of .419 MB | of 44.66 MB |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for sparsity in (0.5, 0.7, 0.9):
        torch.manual_seed(0)
        everything = {"classifier": True, "train_rest": False, "norm_affine": False, "weights": "kaiming_uniform"}
        ticket = searched("frozen_slt", cifar_resnet18(), steps, sparsity=sparsity, frozen=0.7, **everything)
        assert sum(mask.numel() for mask in ticket.masks.values()) == CIFAR_WEIGHTS
        for dtype in (None, "float16"):
            size = sized(ticket, folder, dtype)
            assert size.start == 0
            print(
                f"| {sparsity} | {dtype or 'float32'} | {size.masks:,} | {size.statistics:,} | "
                f"{size.header + size.rest + size.padding:,} | {size.file:,} | {size.file / PAPER_BYTES:.3f} | "
                f"1/{PAPER_FP32 / size.file:.1f} |",
                flush=True,
            )


def jackpot_table(steps: int, folder: Path) -> None:
    print("\n## Jackpot at .9, resnet50 with a new head for 10 classes, pretrained weights simulated\n")
    print("| statistics | mask bound | masks | statistics, bytes | head | header | file | of the fp32 checkpoint |")
    print("|---|---|---|---|---|---|---|---|")
    torch.manual_seed(0)
    model = timm.create_model("resnet50", num_classes=10)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    ticket = searched("jackpot", model, steps, sparsity=SPARSITY)
    ticket.pretrained = tt.Pretrained("resnet50.a1_in1k", state)
    for dtype in (None, "float16"):
        size = sized(ticket, folder, dtype)
        assert size.pretrained
        print(
            f"| {dtype or 'float32'} | {size.bound:,.0f} | {size.masks:,} | {size.statistics:,} | {size.rest:,} | "
            f"{size.header:,} | {size.file:,} | 1/{size.checkpoint / size.file:.1f} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--only", action="append", help="models of the first table; both where not given")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    found = ", ".join(f"{name} {version(name)}" for name in ("torch", "timm", "numpy", "constriction", "safetensors"))
    print("# Size of tickets against the bound\n")
    print("`python benchmarks/ticket_size.py`\n")
    print(f"{date.today()}, {found}, Python {platform.python_version()}, {torch.get_num_threads()} thread(s), ")
    print(f"{args.steps} steps of SGD a run on handwritten digits of 32 pixels, in batches of 32")
    with tempfile.TemporaryDirectory() as folder:
        masks_table(args.only or ["resnet18", "resnet50"], args.steps, Path(folder))
        frozen_table(args.steps, Path(folder))
        jackpot_table(args.steps, Path(folder))


if __name__ == "__main__":
    main()
