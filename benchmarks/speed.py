"""How fast tickets are on this machine's CPU: dense, with zeros, compacted and exported, side by side.

    python benchmarks/speed.py [--threads 2] [--rounds 11] [--models resnet50 vit_small_patch16_224]

Each model gets random weights, which are as fast as trained ones, and two tickets by magnitude: .9 of the weights of
each layer zero, and whole channels and heads with .7 of the multiplications. Each is measured as `timm-tickets speed`
does. Printed: Markdown, as kept in results/speed.md.
"""

import argparse
import platform
import statistics
import tempfile
import warnings
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import timm
import torch

import timm_tickets as tt
from timm_tickets.deploy.speed import Speed, measure
from timm_tickets.deploy.speed_report import Ratio, verdict

MODELS = ("resnet50", "vit_small_patch16_224")
TICKETS = {
    "0.9 of the weights of each layer zero": {"sparsity": 0.9, "scope": "layerwise"},
    "0.7 of the MACs, in whole channels and heads": {"sparsity": 0.7, "granularity": "channel", "sparsity_of": "macs"},
}


def ticket(arch: str, path: Path, **settings: Any) -> None:
    torch.manual_seed(0)
    model = timm.create_model(arch, num_classes=1000)
    tt.create_pruner("magnitude", model, **settings).ticket.save(path)


def show(done: Speed) -> None:
    """A table, and what it says; in brackets the quartiles over the rounds."""
    titles = ("engine", "model", "1 image, ms", "times dense", f"{done.batch} images/s", "times dense")
    print("|", " | ".join((*titles, "memory, MB", "file, MB", "parameters, M", "GMACs")), "|")
    print("|---" * 10 + "|")
    dense = {row.engine: row for row in done.rows if row.variant == "dense"}
    for row in done.rows:
        base = dense[row.engine]
        one, many = Ratio.of(base.latency, row.latency), Ratio.of(base.batch, row.batch)
        times = [f"{r.middle:.2f} ({r.low:.2f}..{r.high:.2f})" if row is not base else "1" for r in (one, many)]
        cells = [row.engine, row.variant, f"{1000 * statistics.median(row.latency):.1f}", times[0]]
        cells += [f"{done.batch / statistics.median(row.batch):.1f}", times[1]]
        cells += ["-" if row.memory is None else f"{row.memory:.0f}", f"{row.file / 1e6:.1f}"]
        cells += [f"{row.parameters / 1e6:.1f}", "-" if row.macs is None else f"{row.macs / 1e9:.2f}"]
        print("|", " | ".join(cells), "|")
    print("\n" + "\n".join(f"- {line}" for line in (*done.notes, *verdict(done))) + "\n", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=MODELS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--batch", type=int, default=8)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    names = ("torch", "timm", "onnxruntime", "openvino")
    versions = ", ".join(f"{name} {version(name)}" for name in names)
    rounds = f"{args.threads} threads, {args.rounds} rounds"
    print(f"{date.today()}, {versions}, Python {platform.python_version()}, CPU, {rounds}\n")
    for arch in args.models:
        for told, settings in TICKETS.items():
            with tempfile.TemporaryDirectory() as folder:
                ticket(arch, path := Path(folder) / f"{arch}.ticket", **settings)
                print(f"## {arch}: {told}\n")
                show(measure(path, batch=args.batch, rounds=args.rounds, threads=args.threads))


if __name__ == "__main__":
    main()
