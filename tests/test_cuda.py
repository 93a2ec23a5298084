"""On a card: every method's search in every precision, what it leaves read on a CPU, several processes on one card.

Without a card none of this runs (conftest.py skips what is marked `cuda`); `benchmarks/on_card.sh` runs it on one.
"""

import gc
import os
import subprocess
import sys
from functools import partial

import pytest
import timm
import torch
from support.commands import COLT
from support.every_method import (
    EXPECTED_WARNINGS,
    METHODS,
    OPTIMIZERS,
    SPARSITY,
    fresh,
    ids,
    loader,
    of_channels,
    pruner_of,
)

import timm_tickets as tt

# torch tells of each operation that has no deterministic algorithm.
pytestmark = [pytest.mark.cuda, pytest.mark.filterwarnings(*EXPECTED_WARNINGS, "ignore:.*determinis")]
DEVICE = "cuda"
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
SHORT = ["training.epochs=2", "pruner.prune_rate=0.6", "pruner.sparsity=0.8", "data.val_fraction=0.7", "controls=[]"]
SAME_BITS = "training.deterministic=true"  # by this setting alone are they promised


def train(run, model, dtype, check):
    """A user's loop on the card, in mixed precision where a type is given."""
    optimizer = run.attach(OPTIMIZERS["sgd"](model.parameters()))
    # Small enough that no step overflows: the loop is to be trained in every precision, not skipped.
    scaler = torch.amp.GradScaler(DEVICE, init_scale=128.0, enabled=dtype is torch.float16)
    model.train()
    for _ in range(run.epochs):
        for images, labels in run.subset(loader()):
            images, labels = images.to(DEVICE), labels.to(DEVICE)
            with torch.autocast(DEVICE, dtype, enabled=dtype is not None):
                loss = run.loss(torch.nn.functional.cross_entropy, model(images), labels)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            check()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("row", METHODS, ids=ids)
def test_a_search_on_the_card_is_exact_and_its_ticket_is_read_on_a_cpu(row, precision, tmp_path):
    model = fresh().to(DEVICE)
    pruner = pruner_of(row, model)
    soft = row.name == "continuous_sparsification"  # while it trains

    def check():
        for name, mask in pruner.subnet.mask.items():
            layer, _, leaf = name.rpartition(".")
            weight = getattr(model.get_submodule(layer), leaf)
            assert soft or not weight[~mask.to(weight.device)].any()

    for run in pruner:
        train(run, model, PRECISIONS[precision], check)
    ticket = pruner.ticket

    total = sum(mask.numel() for mask in ticket.masks.values())
    pruned = sum(int((~mask).sum()) for mask in ticket.masks.values())
    if of_channels(row):
        assert round(SPARSITY * total) <= pruned <= (SPARSITY + 0.005) * total
    else:
        assert pruned == round(SPARSITY * total)

    ticket.save(tmp_path / "card.ticket")
    read = tt.load_ticket(tmp_path / "card.ticket")
    assert read.fingerprint == ticket.fingerprint
    there = read.apply_(fresh(seed=1)).state_dict()
    for name, value in model.state_dict().items():
        assert there[name].device.type == "cpu"
        assert torch.equal(there[name], value.cpu()), name
    for name, mask in read.masks.items():
        assert not there[name][~mask.cpu()].any()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_search_by_recipe_leaves_a_model_that_a_cpu_loads(precision, tmp_path):
    dtype = {"bf16": "bfloat16", "fp16": "float16"}.get(precision)
    mixed = [] if dtype is None else ["training.amp=true", f"training.amp_dtype={dtype}"]
    short = ["training.epochs=4", "pruner.prune_rate=0.5", "pruner.sparsity=0.5", "controls=[]"]
    left = tt.search("digits_imp", [*short, *mixed, "training.channels_last=true", f"output={tmp_path / 'run'}"])
    assert left.ticket.sparsity == pytest.approx(0.5, abs=1e-4)
    model = timm.create_model(f"local-dir:{tmp_path / 'run'}", pretrained=True)
    for name, mask in left.ticket.masks.items():
        weight = model.get_parameter(name)
        assert weight.device.type == "cpu"
        assert not weight[~mask.cpu()].any()
    assert left.rows[-1]["metrics"]["test_top1"] > 50  # of ten classes: it has learned


def command(folder, settings, processes=1):
    """A search as a user types it, on one card, in processes of its own: cuBLAS reads its settings once."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    words = [sys.executable, *(launch if processes > 1 else []), "-m", "timm_tickets", "search", "digits_imp"]
    for one in (*settings, SAME_BITS, f"output={folder}"):
        words += ["--set", one]
    env = {name: value for name, value in os.environ.items() if name != "ACCELERATE_USE_CPU"}
    env["OMP_NUM_THREADS"] = "1"  # as torchrun sets it: what the CPU adds up is the same only with as many threads
    env["CUDA_VISIBLE_DEVICES"] = env.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return tt.load_ticket(folder / "digits_imp.ticket"), done.stdout


def trained(folder):
    """The weights that the ticket was trained to."""
    return timm.create_model(f"local-dir:{folder}", pretrained=True).state_dict()


def test_a_deterministic_search_finds_the_same_ticket_twice(tmp_path):
    one, two = (command(tmp_path / name, SHORT)[0] for name in ("one", "two"))
    assert one.fingerprint == two.fingerprint
    weights = trained(tmp_path / "two")
    for name, value in trained(tmp_path / "one").items():
        assert torch.equal(value, weights[name]), name


def test_two_processes_on_one_card_find_the_ticket_of_one(tmp_path):
    settings = [one for one in COLT if "checkpoint_interval" not in one]
    one, _ = command(tmp_path / "one", settings)
    two, said = command(tmp_path / "two", settings, processes=2)
    assert "2 processes share 1 card" in said
    assert two.fingerprint == one.fingerprint


def peak(train_once):
    """Bytes on the card at the peak of a call, over what was there before."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    train_once()
    return torch.cuda.max_memory_allocated() - before


def test_imp_takes_no_more_memory_than_a_plain_loop_and_its_masks():
    images, labels = torch.randn(8, 3, 64, 64, device=DEVICE), torch.arange(8, device=DEVICE)
    counted = {}

    def steps(model, optimizer, loss_of):
        for _ in range(3):
            loss_of(model(images)).backward()
            optimizer.step()
            optimizer.zero_grad()

    def plain():
        model = timm.create_model("resnet18", num_classes=10).to(DEVICE)
        optimizer = OPTIMIZERS["sgd"](model.parameters())
        steps(model, optimizer, lambda output: torch.nn.functional.cross_entropy(output, labels))

    def imp():
        model = timm.create_model("resnet18", num_classes=10).to(DEVICE)
        pruner = tt.create_pruner("imp", model, sparsity=0.8, prune_rate=0.5, epochs=1)
        for run in pruner:
            optimizer = run.attach(OPTIMIZERS["sgd"](model.parameters()))
            loss_of = partial(run.loss, torch.nn.functional.cross_entropy, target=labels)
            steps(model, optimizer, loss_of)
        counted["weights"] = sum(mask.numel() for mask in pruner.ticket.masks.values())

    plain()  # cuDNN and cuBLAS take work space of their own the first time
    alone, searched = peak(plain), peak(imp)
    assert searched <= 1.1 * (alone + counted["weights"])  # a byte a mask; benchmarks/memory.py allows as much
