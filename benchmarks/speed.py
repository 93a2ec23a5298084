"""How fast tickets are on one machine's CPU: dense, with zeros, compacted and exported, side by side.

    python benchmarks/speed.py [--threads 1] [--clock processor] [--rounds 7] [--batch 4] [--models resnet50 ...]

Each model gets random weights, which are as fast as trained ones, and two tickets by magnitude: .9 of the weights of
each layer zero (`zeros`, `csr`), and whole channels and heads with .7 of the multiplications taken out (`compacted`).
All are timed in turn, round after round; exported files are kept in output/speed, where a second call finds them.
`--clock processor` counts the processor's time, for a machine that others use too, with one thread; `wall` the time
that passes. Printed: Markdown, as kept in results/speed.md; in brackets the quartiles over the rounds.
"""

import argparse
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch

import timm_tickets as tt
from timm_tickets.deploy.onnx_file import write_onnx
from timm_tickets.deploy.openvino_file import convert
from timm_tickets.deploy.runners import onnxruntime_run, openvino_run
from timm_tickets.deploy.speed import macs_of, sample
from timm_tickets.deploy.speed_report import Ratio

MODELS = ("test_resnet@32", "resnet50", "vit_small_patch16_224")  # with the pixels of an image, if not timm's
ZEROS: dict[str, Any] = {"sparsity": 0.9, "scope": "layerwise"}
CHANNELS: dict[str, Any] = {"sparsity": 0.7, "granularity": "channel", "sparsity_of": "macs"}


def variants(arch: str) -> dict[str, torch.nn.Module]:
    def fresh() -> torch.nn.Module:
        torch.manual_seed(0)
        return timm.create_model(arch).eval().requires_grad_(False)

    dense, zeros, channels = fresh(), fresh(), fresh()
    tt.create_pruner("magnitude", zeros, **ZEROS).ticket  # noqa: B018 - leaves the model masked
    small = tt.create_pruner("magnitude", channels, **CHANNELS).ticket.compact(channels)
    return {"dense": dense, "zeros": zeros, "compacted": small.eval().requires_grad_(False)}


def csr(model: torch.nn.Module) -> torch.nn.Module | None:
    """The model with CSR weights in its linear layers; None where it has none with zeros."""
    layers = [one for one in model.modules() if isinstance(one, torch.nn.Linear) and bool((one.weight == 0).any())]
    for layer in layers:
        layer.weight = torch.nn.Parameter(layer.weight.detach().to_sparse_csr(), requires_grad=False)
    return model if layers else None


def torch_run(model: torch.nn.Module) -> Callable[[Any], Any]:
    def run(images: Any) -> Any:
        with torch.no_grad():  # torch's CSR products refuse inference_mode
            return model(torch.from_numpy(images)).numpy()

    return run


def runs(arch: str, folder: Path, threads: int, size: Any) -> tuple[dict[tuple[str, str], Any], dict[str, Any]]:
    """What is timed, by engine and variant; and each variant's parameters, multiplications and bytes of ONNX."""
    models, found, facts = variants(arch), {}, {}
    for name, model in models.items():
        file = folder / f"{arch}_{name}.onnx"
        if not file.exists():
            write_onnx(model, size, file)
            convert(file, file.with_suffix(".xml"), {})
        found["torch", name] = torch_run(model)
        facts[name] = sum(one.numel() for one in model.parameters()), macs_of(model, size), file.stat().st_size
    for name in models:
        found["onnxruntime", name] = onnxruntime_run(folder / f"{arch}_{name}.onnx", threads)
    for name in models:
        found["openvino", name] = openvino_run(folder / f"{arch}_{name}.xml", threads)
    again = timm.create_model(arch).eval().requires_grad_(False)
    again.load_state_dict(models["zeros"].state_dict())
    if (sparse := csr(again)) is not None:
        found["torch", "csr"] = torch_run(sparse)
    return found, facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=MODELS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=("processor", "wall"), default="processor")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, default=4)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(args.threads)
    clock = time.process_time if args.clock == "processor" else time.perf_counter
    (folder := Path("output/speed")).mkdir(parents=True, exist_ok=True)
    names = ", ".join(f"{name} {version(name)}" for name in ("torch", "timm", "onnxruntime", "openvino"))
    rounds = f"{args.threads} threads, {args.clock} time, medians of {args.rounds} rounds"
    print(f"{date.today()}, {names}, Python {platform.python_version()}, CPU, {rounds}\n")
    for arch, _, pixels in (one.partition("@") for one in args.models):
        size = timm.get_pretrained_cfg(arch).input_size  # pyright: ignore[reportOptionalMemberAccess]
        size = (size[0], int(pixels), int(pixels)) if pixels else size
        timed, facts = runs(arch, folder, args.threads, size)
        one, many = (np.random.default_rng(0).standard_normal((n, *size), dtype=np.float32) for n in (1, args.batch))
        taken: dict[Any, tuple[list[float], list[float]]] = {key: ([], []) for key in timed}
        for _ in range(args.rounds):
            for key, run in timed.items():
                for images, times in zip((one, many), taken[key], strict=True):
                    times.append(sample(run, images, clock))
        print(f"## {arch}, images of {' x '.join(map(str, size))}\n")
        print(f"| engine | model | 1 image, ms | times dense | {args.batch} images, ms | times dense |")
        print("|---" * 6 + "|")
        for (engine, name), (latency, batch) in sorted(taken.items(), key=lambda item: item[0][0] != "torch"):
            cells = [engine, name]
            for times, base in zip((latency, batch), taken[engine, "dense"], strict=True):
                ratio = Ratio.of(base, times)
                told = "1" if name == "dense" else f"{ratio.middle:.2f} ({ratio.low:.2f}..{ratio.high:.2f})"
                cells += [f"{1000 * statistics.median(times):.3g}", told]
            print("|", " | ".join(cells), "|")
        print("\n| model | parameters, M | GMACs | ONNX, MB |\n|---|---|---|---|")
        for name, (parameters, macs, size_of) in facts.items():
            print(f"| {name} | {parameters / 1e6:.2f} | {macs / 1e9:.3g} | {size_of / 1e6:.1f} |")
        print(flush=True)


if __name__ == "__main__":
    main()
