"""Groups of processes: each trains a run together, while the others train the other runs of the round."""

import json
import signal

import pytest
from support import started
from support.commands import COLT, ENV, running, searched
from support.run_folders import leftovers, same

import timm_tickets as tt
from timm_tickets.distributed.processes import apart, groups_of

BATCH = 64
TOGETHER = [*COLT, f"training.batch_size={BATCH}", "parallel=data"]
GROUPS = [*TOGETHER[:-1], "parallel=runs", "processes_per_run=2"]

# Images are told apart by their first pixel.
LOOP = """
import json, sys

import timm, torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import timm_tickets as tt
from timm_tickets.processes import any_of, apart, place, rank, wait_for_others, world_size

dist.init_process_group("gloo")
number, count = place()
torch.manual_seed(0)
images = torch.randn(48, 3, 32, 32)
images[:, 0, 0, 0] = torch.arange(48.0)
data = TensorDataset(images, torch.arange(48) % 4)
model = timm.create_model("test_efficientnet_gn", num_classes=4)
pruner = tt.create_pruner("colt", model, sparsity=0.6, prune_rate=0.4, epochs=1, folder=sys.argv[1])
size = int(sys.argv[2])
pruner.parallel, pruner.processes_per_run = "runs", size
ddp, seen = None, {}
for run in pruner:
    with apart(run.processes):
        assert (rank(), world_size()) == (dist.get_rank(), dist.get_world_size()) == (number % size, size)
        assert place() == (number, count)
        ddp = ddp or DistributedDataParallel(model)
        optimizer = run.attach(torch.optim.SGD(model.parameters(), 0.05, momentum=0.9))
        for batch, labels in run.subset(DataLoader(data, 4, sampler=DistributedSampler(data, shuffle=False))):
            seen.setdefault(run.name, []).extend(int(one) for one in batch[:, 0, 0, 0])
            run.loss(torch.nn.functional.cross_entropy, ddp(batch), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert (rank(), world_size()) == (dist.get_rank(), dist.get_world_size()) == place() == (number, count)
try:
    with apart(2 if size == 2 else None):
        if size == 1:
            raise KeyError
        assert any_of([number == 0, number == 3]) == [number < 2, number > 1]
        wait_for_others()
        with apart():
            assert (rank(), world_size(), place()) == (0, 1, (number, count))
            assert (dist.get_rank(), dist.get_world_size()) == (0, 1)
        assert world_size() == dist.get_world_size() == 2
        raise KeyError
except KeyError:
    assert dist.get_world_size() == world_size() == count
wait_for_others()
print(json.dumps({"ticket": pruner.ticket.fingerprint, "seen": seen}) + "\\n", end="", flush=True)
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """COLT with two partitions by two processes, which train every run together."""
    folder = tmp_path_factory.mktemp("together")
    searched(folder, TOGETHER, 2)
    return folder


@pytest.mark.slow
def test_groups_of_two_find_what_two_processes_find(together, tmp_path):
    """Not only the masks: every weight and number in the folder, because each training is that of two processes."""
    told = [json.loads(line) for line in searched(tmp_path, GROUPS, 4).stdout.splitlines()]
    same(tmp_path, together)
    assert not leftovers(tmp_path)
    assert len(told) == 4
    assert len({one["fingerprint"] for one in told}) == 1
    assert [one["batches"] for one in told] == [[BATCH // 2]] * 4
    steps = [0, 0]  # by the group that took them; the ticket's own training is the first one's
    for record in tmp_path.glob("*/run.json"):
        run = json.loads(record.read_text())
        steps[run["part"]] += run["steps"]
    assert sorted(one["losses"] for one in told) == sorted(steps * 2)


def by_loop(folder, processes, size):
    """What each process tells of the loop."""
    script = folder / "loop.py"
    script.write_text(LOOP)
    done = started.run_together([script, folder / f"run_{processes}", size], processes, env=ENV)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(one) for one in done.stdout.splitlines()]


@pytest.mark.slow
def test_a_ddp_model_in_a_loop_of_ones_own_is_of_one_process_where_each_trains_alone(tmp_path):
    (expected,) = by_loop(tmp_path, 1, 1)
    mine, other = by_loop(tmp_path, 2, 1)
    assert mine["ticket"] == other["ticket"] == expected["ticket"]
    assert mine["seen"] | other["seen"] == expected["seen"]


def test_a_loop_of_ones_own_trains_by_groups(tmp_path):
    told = by_loop(tmp_path, 4, 2)
    assert len({one["ticket"] for one in told}) == 1
    shares = {}  # of each run, by process
    for one in told:
        for run, images in one["seen"].items():
            shares.setdefault(run, []).append(images)
    assert sorted(shares) == [f"round_{number:02d}_part_{part}" for number in range(2) for part in range(2)]
    for run, (mine, other) in shares.items():
        assert len({*mine} | {*other}) == len(mine) + len(other) == 24, run  # all images of two of the four classes
    assert [len(one["seen"]) for one in told] == [2] * 4  # one run a round


@pytest.mark.slow
def test_fsdp2_splits_a_model_over_a_group(tmp_path):
    told = {}
    for count, settings in ((2, TOGETHER), (4, GROUPS)):
        done = searched(tmp_path / str(count), settings, count, split=True)
        told[count] = [json.loads(line) for line in done.stdout.splitlines()]
        assert [one["splits"] for one in told[count]] == [True] * count
        assert [one["batches"] for one in told[count]] == [[BATCH // 2]] * count
    same(tmp_path / "4", tmp_path / "2")
    assert sum(one["losses"] for one in told[4]) == sum(one["losses"] for one in told[2])


@pytest.mark.slow
@pytest.mark.parametrize(("of", "number", "moment"), [(3, signal.SIGKILL, 17), (0, signal.SIGTERM, 25)])
def test_one_of_a_group_ends_and_the_same_command_continues_to_the_same_ticket(together, tmp_path, of, number, moment):
    done = searched(tmp_path, GROUPS, 4, moment=moment, of=of, number=number, check=False)
    assert done.returncode != 0
    assert not running(tmp_path)
    assert not (tmp_path / "result.json").exists()
    searched(tmp_path, GROUPS, 4)
    same(tmp_path, together)
    assert not leftovers(tmp_path)


@pytest.mark.slow
def test_a_control_and_the_ticket_are_trained_side_by_side_by_groups(tmp_path):
    settings = ["pruner.sparsity=0.8", "data.val_fraction=0.7", "training.epochs=2"]
    searched(tmp_path / "2", [*settings, "parallel=data"], 2, recipe="digits_magnitude")
    done = searched(tmp_path / "4", [*settings, "processes_per_run=2"], 4, recipe="digits_magnitude")
    same(tmp_path / "4", tmp_path / "2")
    told = [json.loads(line)["losses"] for line in done.stdout.splitlines()]
    steps = [json.loads((tmp_path / "4" / name / "run.json").read_text())["steps"] for name in ("round_00", "dense")]
    assert sorted(told) == sorted(steps * 2)


@pytest.mark.parametrize(("size", "count"), [(3, 4), (8, 4), (2, 3)])
def test_processes_that_cannot_be_grouped_are_refused_before_anything_is_trained(monkeypatch, tmp_path, size, count):
    monkeypatch.setattr("timm_tickets.distributed.processes.place", lambda: (0, count))
    monkeypatch.setattr("torch.distributed.broadcast_object_list", lambda *_: None)  # as for the first of them
    with pytest.raises(
        tt.SettingError, match=f"processes_per_run: {size} does not divide the {count} processes"
    ) as told:
        groups_of(size)
    with pytest.raises(tt.SettingError, match="does not divide"), apart(size):
        pass
    with pytest.raises(tt.SettingError, match="processes_per_run: 0 is not valid"):
        groups_of(0)
    valid = {4: "1, 2, 4", 3: "1, 3"}[count]
    assert f"set it to one of {valid}, or start a multiple of {size}" in str(told.value)
    alone = "data.cache=none"  # the processes would agree on the memory they have
    with pytest.raises(tt.SettingError, match="processes_per_run"):
        tt.search("digits_imp", [f"processes_per_run={size}", f"output={tmp_path / 'run'}", alone])
    assert not (tmp_path / "run").exists()


def test_one_process_is_a_group_of_any_size():
    assert groups_of(7) == (0, 1)


def test_groups_do_not_decide_what_a_recipe_is():
    assert tt.load_recipe("digits_imp", ["processes_per_run=2"]).hash == tt.load_recipe("digits_imp").hash
    with pytest.raises(tt.SettingError, match="processes_per_run"):
        tt.load_recipe("digits_imp", ["processes_per_run=0"])
