"""Peak memory of a search by every pruner over that of plain training, in bytes a prunable weight.

    python benchmarks/memory.py [--methods imp colt ...] [--where]

A network whose weights outweigh its activations (ViT-S on four patches) is searched in a fresh process a pruner, a few
steps of SGD with momentum a run, until the ticket is there; its file is not written. Two measurements:

- Tensors: every storage that torch makes is counted from its making to its end, by where it is. No accelerator is
  needed: the model's tensors say that they are on another device and are computed by the CPU, so that everything takes
  the way it takes on one, copies to the host included. What a kernel allocates within is not seen. Once more on the
  host with a folder, into which every run is written.
- RSS: the growth of the process's peak resident memory in the same search on the CPU, kernels' work space included.

`NEEDS` is what each algorithm needs, argued from the paper and not from the code. A row is met where device and host
are each at most that, plus 10 %.
"""

import argparse
import importlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import traceback
import warnings
import weakref
from collections import Counter
from datetime import date
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import set_fused_attn
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.data import DataLoader, TensorDataset

import timm_tickets as tt

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))
card: Any = importlib.import_module("no_sync")  # the tests have tensors that say they are on another device
OnCard, computed, on_card_ = card.OnCard, card.computed, card.on_card_

MODEL, PIXELS, BATCH, SPARSITY = "vit_small_patch16_224", 32, 2, 0.9
SETTINGS: dict[str, dict[str, Any]] = {
    "imp": {"prune_rate": 0.7},
    "colt": {"prune_rate": 0.7, "split": "samples"},
    "continuous_sparsification": {"rounds": 2, "rewind": "1it"},
    "gradual": {"interval": 1},
    "set": {"interval": 1},
    "rigl": {"interval": 2},
    "synflow": {"iterations": 3, "input_size": (3, PIXELS, PIXELS)},
}
# Bytes a prunable weight that the algorithm has to hold at its peak, and what they are: in all on the training device,
# plain training's 12 (weight, gradient, momentum) being the least, and on the host. A float has 4 bytes, a mask 1. On
# the device is what a step uses, on the host what is ranked across layers or kept for later; each thing once, but a cut
# makes a new mask beside the old one. A search whose ticket starts from the weights as given, or from a rewind point,
# keeps that state from its beginning: whoever trains may change the model. One that ends trained has its ticket, values
# 4 and mask 1, at the end only.
NEEDS: dict[str, tuple[float, float, str]] = {
    "imp": (13, 6, "device: + mask; host: start 4, masks 2, as the trained weights are ranked where they are"),
    "colt": (13, 15, "device: + mask; host: start 4, trained weights of two copies 8, mask 1, one of each copy 2"),
    "continuous_sparsification": (
        24,
        10,
        "device: weight and score, their momenta and, as the backward pass comes, their gradients in place of the soft "
        "mask and the product; host: rewind point 4, scores to rank 4, masks 2",
    ),
    "edge_popup": (
        17,
        5,
        "device: weight, score, its momentum and gradient (before it, the product of weight and mask), mask 1; "
        "host: the ticket, as each layer is ranked by itself",
    ),
    "frozen_slt": (
        14,
        5,
        "device: weight 4, mask 1, what is free 1, score and momentum of the free half 4, product of both 4; "
        "host: the ticket, more than the free half's scores 2 and masks 2",
    ),
    "jackpot": (17, 5, "as edge_popup: swaps stay within a layer"),
    "gradual": (13, 5, "device: + mask; host: the ticket, as weights are ranked where they are"),
    "set": (13, 5, "device: + mask; host: the ticket, as exchanges stay within a layer"),
    "rigl": (13, 6, "device: + mask; host: the dense gradient, which the step must not see, 4, masks 2"),
    "snip": (12, 10, "device: weight and gradient; host: start 4, scores 4, masks 2"),
    "grasp": (
        12,
        13,
        "device: weight, gradient of all batches, Hessian times it; host: start 4, that gradient 4, the sum of the "
        "products 4, mask 1",
    ),
    "synflow": (
        12,
        14,
        "device: weight, its absolute value in double precision 8; host: start 4, scores in double precision 8, "
        "masks 2",
    ),
    "magnitude": (12, 6, "host: start 4, masks 2"),
    "random": (12, 6, "host: start 4, masks 2"),
}


class Storages(TorchDispatchMode):
    """Counts the bytes of all live storages, on the device and on the host, and remembers the most there were.

    Args:
        where: Whether to note which lines made what is alive at a peak.
    """

    def __init__(self, where: bool = False):
        super().__init__()
        self.where = where
        self.live: dict[int, tuple[Any, str, int, str]] = {}
        self.now, self.peak = Counter(), Counter()
        self.at_peak: dict[str, Counter[str]] = {}
        self._noted = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for one in tree_iter((args, kwargs)):
            self.see(one)
        out = computed(func, args, kwargs or {})
        for one in tree_iter(out):
            self.see(one)
        return out

    def see(self, one: Any) -> None:
        if not isinstance(one, Tensor):
            return
        tensor: Any = one
        on_device = isinstance(tensor, OnCard)
        kind = "device" if on_device else "host"
        storage = (tensor.content if on_device else tensor).untyped_storage()
        key = storage._cdata
        if key in self.live:
            return
        size = storage.nbytes()
        # torch gives a storage one Python object for as long as it lives.
        self.live[key] = weakref.ref(storage, lambda _: self.gone(key)), kind, size, _line() if self.where else ""
        self.now[kind] += size
        self.peak[kind] = max(self.peak[kind], self.now[kind])
        if self.where and self.now[kind] > 1.02 * self._noted[kind]:
            self._noted[kind] = self.now[kind]
            found = self.at_peak[kind] = Counter()
            for _, other, bytes, line in self.live.values():
                if other == kind:
                    found[line] += bytes

    def gone(self, key: int) -> None:
        _, kind, size, _ = self.live.pop(key)
        self.now[kind] -= size


def _line() -> str:
    """The innermost lines of this package or benchmark that are being run."""
    frames = [f for f in traceback.extract_stack() if "timm_tickets" in f.filename or f.filename == __file__]
    told = [f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in frames if f.name not in {"_line", "see"}]
    return " < ".join(reversed([one for one in told if "__torch_dispatch__" not in one][-4:]))


def train(model: nn.Module, loader: Any, device: bool, epochs: int, run: Any = None) -> None:
    # One tensor at a time: for all at once torch keeps temporaries of all weights, in plain training as well.
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, foreach=False)
    if run is not None:
        optimizer, loader = run.attach(optimizer), run.subset(loader)
    for _ in range(epochs):
        for images, labels in loader:
            if device:
                images, labels = OnCard(images), OnCard(labels)
            output = model(images)
            if run is None:
                loss = nn.functional.cross_entropy(output, labels)
            else:
                loss = run.loss(nn.functional.cross_entropy, output, labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()


def search(method: str | None, storages: Storages | None = None, folder: str | None = None) -> tuple[int, Any]:
    """Train plainly, or search; returns the number of prunable weights, and the ticket."""
    device = storages is not None
    torch.manual_seed(0)
    set_fused_attn(False)  # GraSP needs a second derivative
    # A missing kernel, a missing checkpoint, a layer pruned to nothing: none matters here.
    warnings.simplefilter("ignore")
    # Module.to must not write through .data, which a wrapped tensor has none of.
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    model = timm.create_model(MODEL, num_classes=10, img_size=PIXELS)
    weights = sum(model.get_parameter(name).numel() for name in tt.prunable_names(model))
    if storages is not None:
        on_card_(model)
        storages.peak.clear()  # on the host it was built
    labels = torch.tensor([0, 1, 2, 3, 5, 6, 7, 8])
    loader = DataLoader(TensorDataset(torch.randn(len(labels), 3, PIXELS, PIXELS), labels), BATCH)
    if method is None:
        return weights, train(model, loader, device, epochs=1)
    settings = {"epochs": 1, **SETTINGS.get(method, {})}
    pruner = tt.create_pruner(method, model, sparsity=SPARSITY, folder=folder, **settings)
    for run in pruner:
        train(model, loader, device, run.epochs, run)
    return weights, pruner.ticket


def resident(key: str) -> int:
    """``VmRSS`` or ``VmHWM``, its peak, of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))


def measure(method: str | None, how: str, where: bool) -> dict[str, Any]:
    """In a process of its own: bytes a weight at the peak."""
    if how == "rss":
        search_small = timm.create_model("test_vit", num_classes=10)  # what torch loads when it first computes
        search_small(torch.randn(1, 3, 160, 160)).sum().backward()
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = resident("VmRSS")
        weights, _ = search(method)
        return {"weights": weights, "rss": (resident("VmHWM") - before) / weights}
    with tempfile.TemporaryDirectory() as folder, Storages(where) as storages:
        weights, _ = search(method, storages, folder if how == "folder" else None)
    if where:
        for kind, lines in storages.at_peak.items():
            print(f"\n{method}: {kind}, {storages.peak[kind] / weights:.2f}", file=sys.stderr)
            for line, size in lines.most_common(14):
                print(f"  {size / weights:6.2f}  {line}", file=sys.stderr)
    return {"weights": weights, **{kind: storages.peak[kind] / weights for kind in ("device", "host")}}


def in_process(method: str | None, how: str, where: bool = False) -> dict[str, Any]:
    # Freed blocks go back to the system at once, so that the resident memory is what is in use.
    env = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, __file__, "--measure", how, "--methods", method or "plain"]
    out = subprocess.run(command + ["--where"] * where, env=env, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(out.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=tt.list_pruners())
    parser.add_argument("--where", action="store_true", help="say which lines made what is alive at the peaks")
    parser.add_argument("--measure", choices=("tensors", "folder", "rss"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        method = None if args.methods == ["plain"] else args.methods[0]
        return print(json.dumps(measure(method, args.measure, args.where)))
    versions = f"torch {torch.__version__}, timm {timm.__version__}, Python {platform.python_version()}"
    plain = in_process(None, "tensors") | in_process(None, "rss")
    weights = plain["weights"]
    print(f"{date.today()}, {versions}; {MODEL} at {PIXELS} pixels, batch {BATCH}, {weights:,} prunable weights\n")
    columns = "device needs", "device", "at most + 10 %", "host needs", "host", "at most + 10 %", "with a folder", "RSS"
    print("| |", " | ".join(columns), "over plain |\n|---" + "|---" * len(columns) + "|")
    print(
        f"| plain training | 12 | {plain['device']:.1f} | | 0 | {plain['host']:.1f} | | | {plain['rss']:.1f} in all |"
    )
    for method in args.methods:
        found = in_process(method, "tensors", args.where) | in_process(method, "rss")
        device, host, _ = NEEDS[method]
        row = [method]
        for needs, kind in ((device, "device"), (host, "host")):
            row += [f"{needs:g}", f"{found[kind]:.1f}", told(found[kind] / needs)]
        written = in_process(method, "folder", args.where)["host"]
        print("|", " | ".join(row), f"| {written:.1f} | {found['rss'] - plain['rss']:+.1f} |", flush=True)
    print("\n| | what it needs |\n|---|---|")
    for method in args.methods:
        print(f"| {method} | {NEEDS[method][2]} |")


def told(ratio: float) -> str:
    return "yes" if ratio <= 1.1 else f"no, x {ratio:.2f}"


if __name__ == "__main__":
    main()
