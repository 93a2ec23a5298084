"""Several processes: equal masks on every rank, or a stop that names the rank that disagrees."""

import os
import subprocess
import sys

import pytest
import torch

from timm_tickets.starts import digest

SCRIPT = """
import sys
import timm, torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

import timm_tickets as tt

dist.init_process_group("gloo")
rank, (name, *more) = dist.get_rank(), sys.argv[1:]
torch.set_num_threads(1)
settings = eval(more[0])
torch.manual_seed(0)
model = timm.create_model("test_resnet", num_classes=4, zero_init_last=False)
pruner = tt.create_pruner(name, model, sparsity=0.8, epochs=1, **settings)
model = DistributedDataParallel(model)
data = torch.randn(32, 3, 32, 32, generator=torch.Generator().manual_seed(rank))  # each its own part
loader = DataLoader(TensorDataset(data, torch.arange(32) % 4), batch_size=8)
for run in pruner:
    optimizer = run.attach(torch.optim.SGD(model.parameters(), 0.05, momentum=0.9))
    for images, labels in run.subset(loader):
        run.loss(torch.nn.functional.cross_entropy, model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    if "break" in more and rank == 1:  # as a search would be whose ranks have drifted apart
        mask = pruner.subnet.mask
        mask["conv1.0.weight"][0] ^= True
        pruner.subnet.set_mask_(mask)
masks = pruner.ticket.masks
for name, mask in masks.items():
    assert not pruner.subnet.model.get_parameter(name)[~mask].any(), name
print("digest", tt.starts.digest(masks))
dist.destroy_process_group()
"""


def ranks(tmp_path, *arguments, count=2, check=True):
    """What each process printed, and the exit status."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
    command += ["--log-dir", str(tmp_path / "logs"), "--redirects", "3", str(script), *arguments]
    done = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=280
    )
    out = {path: path.read_text() for path in sorted((tmp_path / "logs").rglob("std*.log"))}
    if check:
        assert done.returncode == 0, "\n".join([done.stderr[-2000:], *out.values()])
    return done.returncode, [text for path, text in out.items() if path.name == "stdout.log"], "\n".join(out.values())


METHODS = [
    ("imp", "{'prune_rate': 0.6}"),
    ("colt", "{'prune_rate': 0.6, 'split': 'samples'}"),
    ("continuous_sparsification", "{'rounds': 1, 'rewind': '1it'}"),
    ("edge_popup", "{}"),
    ("frozen_slt", "{}"),
    ("jackpot", "{}"),
    ("snip", "{}"),
    ("grasp", "{}"),
    ("gradual", "{'interval': 1}"),
    ("set", "{'interval': 1}"),
    ("rigl", "{'interval': 2}"),
]


# The ones whose masks come from gradients, learned scores or parts of the data; the others are slow only in sum.
ALWAYS = ("colt", "edge_popup", "grasp", "rigl")


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        pytest.param(name, settings, id=name, marks=() if name in ALWAYS else pytest.mark.slow)
        for name, settings in METHODS
    ],
)
def test_two_processes_agree_on_every_mask(tmp_path, name, settings):
    _, printed, _ = ranks(tmp_path, name, settings)
    digests = {line for text in printed for line in text.splitlines() if line.startswith("digest")}
    assert len(printed) == 2
    assert len(digests) == 1


def test_processes_that_disagree_are_stopped_and_named(tmp_path):
    status, _, everything = ranks(tmp_path, "imp", "{'prune_rate': 0.6}", "break", check=False)
    assert status != 0
    assert "ranks [1] hold another one than rank 0" in everything


def test_the_digest_sees_every_bit():
    mask = {"a": torch.ones(3, 3, dtype=torch.bool), "b": torch.zeros(2, dtype=torch.bool)}
    before = digest(mask)
    assert digest({name: one.clone() for name, one in mask.items()}) == before
    mask["b"][1] = True
    assert digest(mask) != before
