"""FSDP2: searches on models that are split over gloo processes find what one process finds; what cannot is refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from support import started
from support.run_folders import leftovers, same
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.torch_version import TorchVersion

import timm_tickets as tt

DRIVER = Path(__file__).parent / "support" / "split_searches.py"
# The package says so too; what needs no processes is tested there.
splits = pytest.mark.skipif(torch.__version__ < "2.7", reason="torch 2.6 cannot split a model on CPUs")
ORDERS = [
    ("imp", {"sparsity": 0.8, "prune_rate": 0.6}),
    ("colt", {"sparsity": 0.6, "prune_rate": 0.4}),
    ("continuous_sparsification", {"sparsity": 0.8, "rounds": 2, "rewind": "2it", "penalty": 1e-4}),
    ("frozen_slt", {"sparsity": 0.6}),
    ("edge_popup", {"sparsity": 0.5}),
    ("jackpot", {"sparsity": 0.5}),
    ("gradual", {"sparsity": 0.8, "interval": 2}),
    ("set", {"sparsity": 0.8, "interval": 2}),
    ("rigl", {"sparsity": 0.8, "interval": 2}),
    ("magnitude", {"sparsity": 0.8}),
    ("random", {"sparsity": 0.8}),
]
REFUSED = ["snip", "grasp", "synflow"]


def searched(folder, processes, orders):
    """What each process told of each search, by pruner; the tickets are in the folder."""
    folder.mkdir()
    told = [
        {"pruner": name, "settings": with_, "file": str(folder / name), **more}
        for name, with_, *mores in orders
        for more in (mores or [{}])
    ]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = started.run_together([DRIVER, json.dumps(told)], processes, env=env)
    assert done.returncode == 0, done.stderr[-4000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    found = {}
    for one in map(json.loads, lines):
        found.setdefault(one["pruner"], []).append(one)
    assert {len(ranks) for ranks in found.values()} == {processes}
    return found


def agrees(rank, expected):
    """What a process of several told of a search is what one process told."""
    for key in ("digest", "runs", "sparsity"):
        assert rank[key] == expected[key], rank
    assert rank["zeros"], rank
    assert rank["kept_zero"], rank
    assert max(rank["logits"], rank["left"]) < 1e-12, rank
    assert not expected["stale"]
    assert "call `model.reshard()` first" in rank["stale"]
    assert not expected["tweaks"]
    assert "FSDP2 has split this model" in rank["tweaks"]


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one") / "process"
    return searched(folder, 1, ORDERS), folder


@splits
@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_every_pruner_finds_the_masks_of_one_process_on_a_split_model(one, tmp_path, processes):
    """Masks bit for bit, values as near as sums in another order are: 1e-9 of the largest, in double precision."""
    expected, there = one
    found = searched(tmp_path / "split", processes, [*ORDERS, *((name, {"sparsity": 0.8}) for name in REFUSED)])
    for name, _ in ORDERS:
        for rank in found[name]:
            agrees(rank, expected[name][0])
        mine, theirs = (tt.load_ticket(folder / name) for folder in (tmp_path / "split", there))
        for key, value in theirs.values.items():
            torch.testing.assert_close(mine.values[key], value, rtol=0, atol=1e-9 * max(1, float(value.abs().max())))
    for name in REFUSED:
        assert all("which FSDP2 does not give; search with DDP" in rank["refused"] for rank in found[name])


@pytest.mark.slow
def test_standardised_layers_on_a_split_model(tmp_path):
    order = [("imp", {"sparsity": 0.6, "prune_rate": 0.6}, {"model": "test_nfnet"})]
    (expected,) = searched(tmp_path / "one", 1, order)["imp"]
    for rank in searched(tmp_path / "two", 2, order)["imp"]:
        agrees(rank, expected)


class FullyShardedDataParallel(nn.Module):
    """Named as FSDP1's wrapper, whose like cannot be built without a process group."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module


def test_what_takes_parameters_apart_is_refused_when_the_pruner_is_created():
    model = timm.create_model("test_resnet", num_classes=4)
    with pytest.raises(tt.SettingError, match=r"FSDP1 joins weights into flat parameters.*use DDP, or FSDP2"):
        tt.create_pruner("imp", FullyShardedDataParallel(model), sparsity=0.5)
    next(model.parameters()).ds_id = 0  # as DeepSpeed's ZeRO-3 marks what it has partitioned
    with pytest.raises(tt.SettingError, match=r"DeepSpeed.*use DDP, or FSDP2"):
        tt.create_pruner("imp", model, sparsity=0.5)


@pytest.mark.filterwarnings("ignore:DTensor random operators")  # says torch 2.6
def test_a_model_split_over_cpus_by_torch_2_6_is_refused(tmp_path, monkeypatch):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = timm.create_model("test_resnet", num_classes=4)
        pruner = tt.create_pruner("imp", model, sparsity=0.5)
        fully_shard(model)
        monkeypatch.setattr(torch, "__version__", TorchVersion("2.6.0"))
        refused = r"split it over CPUs, where torch 2\.6\.0 cannot train it; use torch 2\.7 or later, or DDP"
        with pytest.raises(tt.SettingError, match=refused):
            next(pruner).attach(torch.optim.SGD(model.parameters(), 0.1))
        with pytest.raises(tt.SettingError, match=refused):
            tt.create_pruner("imp", model, sparsity=0.5)
    finally:
        torch.distributed.destroy_process_group()


VIT = ["model.model=test_vit", "training.epochs=2", "training.checkpoint_interval=0", "data.val_fraction=0.7"]
IMP = [*VIT, "pruner.prune_rate=0.6", "pruner.sparsity=0.6"]
GRADUAL = [*VIT, "pruner.interval=1", "pruner.sparsity=0.6"]
LEARNED = [*VIT, "pruner.name=frozen_slt", "pruner.sparsity=0.6", "controls=[]"]


def by_recipe(folder, overrides, split, moment=0, of=None, check=True, recipe="digits_imp"):
    """A recipe's search on two processes through Accelerate, its model split or not; killed at a moment of one."""
    order = {
        "recipe": recipe,
        "overrides": [*overrides, f"output={folder}"],
        "lives": [moment],
        "rank": of,
        "split": split,
    }
    line = [str(DRIVER.with_name("killed_search.py")), json.dumps(order)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    if moment:  # the end of one is torchrun's to report
        line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *line]
        done = subprocess.run(line, env=env, capture_output=True, text=True, timeout=280)
    else:
        done = started.run_together(line, 2, env=env)
    assert not check or done.returncode == 0, done.stderr[-3000:]
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert all(one["splits"] == split for one in told)
    return done


def agreement(folder, other):
    """Fraction of the masks' bits that two searches' tickets share."""
    mine, theirs = (tt.load_ticket(next(one.glob("*.ticket"))).masks for one in (folder, other))
    equal = sum(int((mine[name] == theirs[name]).sum()) for name in theirs)
    return equal / sum(mask.numel() for mask in theirs.values())


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [IMP, LEARNED], ids=["imp", "frozen_slt"])
def test_a_recipe_whose_model_accelerate_splits(tmp_path, overrides):
    """In single precision sums in another order move weights, and so the bits near the threshold."""
    by_recipe(tmp_path / "split", overrides, split=True)
    by_recipe(tmp_path / "ddp", overrides, split=False)
    assert agreement(tmp_path / "split", tmp_path / "ddp") > 0.99
    rows = [json.loads((tmp_path / one / "result.json").read_text())["rows"] for one in ("split", "ddp")]
    assert [row["sparsity"] for row in rows[0]] == [row["sparsity"] for row in rows[1]]
    assert rows[0][-1]["metrics"]["test_loss"] == pytest.approx(rows[1][-1]["metrics"]["test_loss"], rel=0.05)


@splits
@pytest.mark.parametrize(
    ("recipe", "overrides", "moment", "of"),
    [
        pytest.param("digits_imp", IMP, 20, 1, marks=pytest.mark.slow),
        pytest.param("digits_imp", IMP, 70, 0, marks=pytest.mark.slow),
        # It cuts at every step, and a step too many would show.
        pytest.param("digits_gradual", GRADUAL, 20, 1, marks=pytest.mark.slow),
        # Its optimizer has no state, and there is none to load.
        pytest.param(
            "digits_gradual", [*GRADUAL, "training.opt=momentum", "training.momentum=0"], 20, 1, marks=pytest.mark.slow
        ),
    ],
)
def test_a_killed_search_on_a_split_model_continues_to_the_same_ticket(tmp_path, recipe, overrides, moment, of):
    by_recipe(tmp_path / "whole", overrides, split=True, recipe=recipe)
    done = by_recipe(tmp_path / "killed", overrides, split=True, moment=moment, of=of, check=False, recipe=recipe)
    assert done.returncode != 0
    assert not (tmp_path / "killed" / "result.json").exists()
    by_recipe(tmp_path / "killed", overrides, split=True, recipe=recipe)
    same(tmp_path / "killed", tmp_path / "whole")
    assert not leftovers(tmp_path / "killed")


@pytest.mark.slow
def test_numbers_are_of_one_model_where_processes_have_statistics_of_their_own(tmp_path):
    """A ticket that ends trained is scored again as it is saved: the same weights and statistics, the same numbers."""
    overrides = [*GRADUAL, "model.model=test_resnet", "controls=[]"]
    by_recipe(tmp_path, overrides, split=True, recipe="digits_gradual")
    first, last = json.loads((tmp_path / "result.json").read_text())["rows"]
    assert first["metrics"]["test_loss"] == last["metrics"]["test_loss"]


def test_what_fsdp2_cannot_train_is_refused_before_anything_is_trained(tmp_path):
    done = by_recipe(tmp_path, [*IMP, "training.model_ema=true"], split=True, check=False)
    assert "training.model_ema: no average is kept of weights that FSDP2 has split" in done.stderr
    assert not (tmp_path / "recipe.yaml").exists()
