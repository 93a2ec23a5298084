"""Channel tickets made small: the smallest architecture of each of timm's modules.

    OMP_NUM_THREADS=1 python benchmarks/compact.py [--records output/compact.jsonl] [--modules resnet regnet]

Each gets random weights; `imp` searches half of its prunable weights away, in whole channels and heads (half of those,
where that is less), with a training of one step of SGD on two random images; the ticket is trained a step under its
mask; then what nothing reads is removed. Compared in double precision, on another image, are the outputs of the masked
and of the smaller model. Times are of one forward pass of four images in float32, of the processor, the two models in
turn, the median of five each. A line a model goes to the records, and a second call goes on where the first stopped.
Printed: Markdown, as kept in results/compact.md.
"""

import argparse
import copy
import gc
import importlib
import json
import platform
import statistics
import sys
import time
import warnings
from datetime import date
from pathlib import Path
from typing import Any

import timm
import torch
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import timm_tickets as tt
from timm_tickets.structure.compact import compacted
from timm_tickets.structure.find import find_groups, images_for
from timm_tickets.structure.verify import outputs

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
zoo: Any = importlib.import_module("test_zoo")  # the tests choose the smallest
SMALLEST, build = zoo.SMALLEST, zoo.build


def stepped(model: torch.nn.Module, optimizer: Any, images: torch.Tensor) -> None:
    """A step of SGD."""
    out = outputs_of(model.train(), images)
    model.eval()
    out.square().mean().backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def outputs_of(model: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    found = tree_leaves(model(images))
    return torch.cat([one.flatten() for one in found if isinstance(one, torch.Tensor)])


def macs(model: torch.nn.Module, images: torch.Tensor) -> int:
    """Multiplications of a forward pass, as torch counts them."""
    model = copy.deepcopy(model).requires_grad_(False)  # what counts hooks into everything that requires a gradient
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images)
    return counter.get_total_flops() // 2


def times(models: list[torch.nn.Module], images: torch.Tensor) -> list[float]:
    """Seconds of the processor of a forward pass, in turn."""
    taken: list[list[float]] = [[] for _ in models]
    with torch.no_grad():
        for _ in range(6):
            for model, each in zip(models, taken, strict=True):
                began = time.process_time()
                model(images)
                each.append(time.process_time() - began)
    return [statistics.median(each[1:]) for each in taken]


def record(module: str) -> dict[str, Any]:
    """What was found in the smallest architecture of a module, in JSON types."""
    name = SMALLEST[module]
    model, began = build(name, 0), time.process_time()
    images = images_for(model.eval())
    images = images.repeat(2, 1, 1, 1) + torch.randn(2, *images.shape[1:])
    row: dict[str, Any] = {"module": module, "name": name}
    if not outputs(model, images[:1]).any():  # a classifier of zeros, which hides what is before it
        for parameter in model.get_classifier().parameters():
            torch.nn.init.normal_(parameter, std=0.02)
    settings = {"granularity": "channel", "sparsity": 0.5, "prune_rate": 0.5, "epochs": 1, "rewind": "0ep"}
    try:
        pruner = tt.create_pruner("imp", model, **settings)
    except tt.SettingError:  # less than half of the weights can be taken out
        pruner = tt.create_pruner("imp", model, **settings, sparsity_of="channels")
    row["find"] = time.process_time() - began
    for run in pruner:
        stepped(model, run.attach(torch.optim.SGD(model.parameters(), 0.01)), images)
    ticket = pruner.ticket
    row["sparsity"] = ticket.sparsity
    ticket.apply_(model)
    stepped(model, ticket.attach(model, torch.optim.SGD(model.parameters(), 0.01)), images)
    began = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = compacted(model, find_groups(model, classifier=True, vectors=True))
    row |= {"compact": time.process_time() - began, "removed": found.removed, "dead": found.dead}
    row["stayed"] = [(count, why) for _, count, why in found.stayed]
    small = found.model.eval()
    row["parameters"] = [sum(p.numel() for p in one.parameters()) for one in (model, small)]
    row["macs"] = [macs(one, images[:1]) for one in (model, small)]
    row["times"] = times([model, small], images.repeat(2, 1, 1, 1))
    other = torch.randn(1, *images.shape[1:], generator=torch.Generator().manual_seed(5)).double()
    before, after = (outputs(copy.deepcopy(one).double(), other) for one in (model, small))
    row["difference"] = float((before - after).abs().max() / before.abs().max())
    return row


def table(rows: list[dict[str, Any]]) -> None:
    good = [row for row in rows if "difference" in row and row["difference"] < 1e-6]
    whole = [row for row in good if not row["stayed"]]
    print(f"{len(good)} of {len(rows)} hold; of {len(whole)} all that nothing reads is gone. ", end="")
    for key, what in (("parameters", "parameters"), ("macs", "multiplications"), ("times", "the time")):
        share = sorted(row[key][1] / row[key][0] for row in good)
        print(
            f"Of {what} a median of {share[len(share) // 2]:.2f} is left ({share[0]:.2f} to {share[-1]:.2f}). ", end=""
        )
    print(f"Largest difference {max(row['difference'] for row in good):.1g} of the largest output.\n")
    print("| module | architecture | pruned | removed | M parameters | left | M multiplications | left | ", end="")
    print("faster | difference | s to find, compact | what stays |\n|---|---|---|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        if "difference" not in row:
            print(f"| {row['module']} | {row['name']} | | | | | | | | | | {row['error']} |")
            continue
        (p, q), (m, n), (s, t) = row["parameters"], row["macs"], row["times"]
        stays = f"{sum(count for count, _ in row['stayed'])}: {row['stayed'][0][1]}" if row["stayed"] else ""
        print(
            f"| {row['module']} | {row['name']} | {row['sparsity']:.2f} | {row['removed']:,} of {row['dead']:,} ",
            end="",
        )
        print(f"| {p / 1e6:.1f} | {q / p:.2f} | {m / 1e6:.0f} | {n / m:.2f} | {s / t:.1f} x ", end="")
        print(f"| {row['difference']:.1g} | {row['find']:.0f}, {row['compact']:.0f} | {stays} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=Path, default=Path("output/compact.jsonl"))
    parser.add_argument("--modules", nargs="*", default=list(SMALLEST))
    args = parser.parse_args()
    args.records.parent.mkdir(parents=True, exist_ok=True)
    lines = args.records.read_text().splitlines() if args.records.is_file() else []
    rows = {row["module"]: row for row in map(json.loads, lines)}
    with args.records.open("a") as file:
        for module in args.modules:
            if module not in rows:
                try:
                    rows[module] = record(module)
                except Exception as error:  # a table of all modules goes on
                    told = str(error).splitlines()[0] if str(error) else ""
                    rows[module] = {
                        "module": module,
                        "name": SMALLEST[module],
                        "error": f"{type(error).__name__}: {told}",
                    }
                file.write(json.dumps(rows[module]) + "\n")
                file.flush()
                gc.collect()
    print(f"{date.today()}, torch {torch.__version__}, timm {timm.__version__}, Python {platform.python_version()}\n")
    table([rows[module] for module in args.modules if module in rows])


if __name__ == "__main__":
    main()
