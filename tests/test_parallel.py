"""A search shared by several processes: the same ticket from any number of them, and what happens when one dies."""

import json
import shutil
import subprocess
import time

import pytest
import torch
import torch.distributed
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from support import started
from support.commands import COLT, ENV, IMP, command, running, searched
from support.run_folders import leftovers, same

import timm_tickets as tt
from timm_tickets.distributed.cards import sharing
from timm_tickets.distributed.processes import (
    any_of,
    apart,
    ending_with_others,
    join_processes,
    place,
    rank,
    wait_for_others,
    world_size,
)
from timm_tickets.experiments.controls import asked_parallel


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """COLT with two partitions by one process."""
    folder = tmp_path_factory.mktemp("one")
    searched(folder, COLT, 1)
    return folder


@pytest.mark.slow  # that the next but one ends with two processes is in the continuous run
@pytest.mark.parametrize("processes", [2, 3])
def test_colt_by_runs_finds_the_same_ticket_on_any_number_of_processes(one, tmp_path, processes):
    """Not only the masks: every weight and number in the folder, because each training is one process's."""
    searched(tmp_path, [*COLT, "parallel=runs"], processes)
    same(tmp_path, one)
    assert not leftovers(tmp_path)


@pytest.mark.slow
def test_colt_of_whole_channels_by_runs(tmp_path):
    settings = [*COLT, "pruner.granularity=channel"]
    for processes in (1, 2):
        searched(tmp_path / str(processes), settings, processes)
    same(tmp_path / "2", tmp_path / "1")


@pytest.mark.slow
@pytest.mark.parametrize("how", ["runs", "data"])
def test_a_damaged_run_is_done_again_by_whoever_trains_it_and_all_agree(one, tmp_path, how):
    """One that the others have to wait for; and as it becomes what it was, no run after it is done again."""
    folder, settings = tmp_path / "damaged", [*COLT, f"parallel={how}"]
    if how == "data":  # which finds another ticket
        one = tmp_path / "whole"
        searched(one, settings, 2)
    shutil.copytree(one, folder)
    (folder / "result.json").unlink()
    path = folder / "round_00_part_1" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    (folder / "start.state").unlink()
    said = searched(folder, settings, 2).stderr
    assert sorted(line.partition("Warning: ")[2] for line in said.splitlines() if "Warning: /" in line) == [
        f"{path} is damaged (its checksum differs); round_00_part_1 is done again",
        f"{folder}/start.state is missing; it is written again: the model as given is the same",
    ]
    same(folder, one)
    records = {path.parent.name: path.stat().st_mtime_ns for path in folder.glob("*/run.json")}
    assert [name for name in records if records[name] != (one / name / "run.json").stat().st_mtime_ns] == [
        "round_00_part_1"
    ]


@pytest.mark.slow
def test_a_control_and_the_ticket_are_trained_side_by_side(tmp_path):
    """A method without runs has two trainings, of the dense network and of the ticket: each process does one."""
    settings = ["pruner.sparsity=0.8", "data.val_fraction=0.7", "training.epochs=2"]
    for processes in (1, 2):
        done = searched(tmp_path / str(processes), settings, processes, recipe="digits_magnitude")
    same(tmp_path / "2", tmp_path / "1")
    told = [json.loads(line) for line in done.stdout.splitlines()]
    steps = [json.loads((tmp_path / "2" / name / "run.json").read_text())["steps"] for name in ("round_00", "dense")]
    assert [one["losses"] for one in told] == steps


def test_one_of_two_processes_is_killed_and_the_same_command_continues_to_the_same_ticket(one, tmp_path):
    done = searched(tmp_path, COLT, 2, moment=70, of=1, check=False)  # `auto` is by runs here
    assert done.returncode != 0
    assert "SIGKILL" in done.stderr
    assert not running(tmp_path)
    assert not (tmp_path / "result.json").exists()
    searched(tmp_path, COLT, 2)
    same(tmp_path, one)
    assert not leftovers(tmp_path)


def test_a_process_that_dies_ends_the_others_which_say_so(tmp_path):
    """By data, with nobody who would end the others: two processes without torchrun."""
    folder = tmp_path / "run"
    settings = [word for one in [*IMP, f"output={folder}"] for word in ("--set", one)]
    both = started.start(["-m", "timm_tickets", "search", "digits_imp", *settings], 2, env=ENV)
    first, second = both.processes
    while not (folder / "round_00" / "checkpoint.pt").exists():
        assert first.exitcode is None
        time.sleep(0.02)
    second.kill()
    first.join(200)
    (said, _) = both.ended().errs
    assert first.exitcode == 2, said
    assert "process 0 of 2 has lost another one" in said
    assert "the same command continues" in said


@pytest.mark.slow
def test_two_machines_on_loopback_find_the_same_ticket(one, tmp_path):
    """Two torchruns, as on two machines with a shared folder."""
    port = str(torch.randint(20000, 40000, (1,)).item())
    machines = []
    for number in range(2):
        line = command(tmp_path, COLT, 2)
        launch = ["--nnodes", "2", "--node-rank", str(number), "--master-addr", "127.0.0.1", "--master-port", port]
        line[line.index("--standalone") : line.index("--standalone") + 1] = launch
        line[line.index("--nproc_per_node") + 1] = "1"
        machines.append(subprocess.Popen(line, env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True))
    said = [process.communicate(timeout=280)[1] for process in machines]
    assert [process.returncode for process in machines] == [0, 0], said
    same(tmp_path, one)
    assert not leftovers(tmp_path)


def test_by_data_each_process_trains_on_its_part_of_every_batch(tmp_path):
    done = searched(tmp_path, [*IMP, "training.batch_size=64"], 2)
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert [one["batches"] for one in told] == [[32], [32]]
    assert len({one["fingerprint"] for one in told}) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "moment", "of"), [(2, 3, 0), (2, 3, 1), (2, 40, 0), (2, 40, 1), (2, 90, 0), (2, 90, 1), (3, 40, 2)]
)
def test_killed_by_data_it_continues_to_what_as_many_processes_find(tmp_path, processes, moment, of):
    settings = [*IMP, "training.batch_size=96"]
    searched(tmp_path / "whole", settings, processes)
    done = searched(tmp_path / "killed", settings, processes, moment=moment, of=of, check=False)
    assert done.returncode != 0 or (tmp_path / "killed" / "result.json").exists()
    assert not running(tmp_path / "killed")
    searched(tmp_path / "killed", settings, processes)
    same(tmp_path / "killed", tmp_path / "whole")
    assert not leftovers(tmp_path / "killed")


@pytest.mark.slow
def test_sigterm_to_torchrun_saves_in_both_processes(one, tmp_path):
    """As a cluster does it: to all of them."""
    process = subprocess.Popen(
        command(tmp_path, COLT, 2), env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while not list(tmp_path.glob("round_00_part_1/checkpoint.pt")):
        assert process.poll() is None
        time.sleep(0.02)
    process.terminate()
    process.wait()
    assert not running(tmp_path)
    assert not (tmp_path / "result.json").exists()
    assert not list(tmp_path.rglob("*.timm-tickets-tmp"))  # each has ended its saving
    searched(tmp_path, COLT, 1)  # any number of processes continues
    same(tmp_path, one)


def test_how_a_search_is_shared_does_not_decide_its_result():
    hashes = {tt.load_recipe("digits_imp", [f"parallel={how}"]).hash for how in ("auto", "runs", "data")}
    assert hashes == {tt.load_recipe("digits_imp").hash}
    with pytest.raises(tt.SettingError, match="parallel"):
        tt.load_recipe("digits_imp", ["parallel=both"])


def test_a_batch_that_the_processes_cannot_share_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(Accelerator, "num_processes", 3)
    monkeypatch.setattr("timm_tickets.training.supported.world_size", lambda: 3)
    with pytest.raises(tt.SettingError, match=r"training.batch_size: 64 .* 3 processes .* multiple of 3"):
        tt.search("digits_imp", ["training.batch_size=64", f"output={tmp_path / 'x'}"])
    assert not (tmp_path / "x").exists()


def test_sync_bn_is_refused_where_torch_would(monkeypatch, tmp_path):
    monkeypatch.setattr(Accelerator, "num_processes", 2)
    monkeypatch.setattr("timm_tickets.training.supported.world_size", lambda: 2)
    monkeypatch.setattr(Accelerator, "device", torch.device("cpu"))
    with pytest.raises(tt.SettingError, match="sync_bn: torch's SyncBatchNorm refuses CPUs"):
        tt.search("digits_imp", ["training.sync_bn=true", f"output={tmp_path}"])


@pytest.fixture
def machine(monkeypatch):
    """Make this machine one of so many cards, and this process one of so many there."""

    def made(processes, cards, **env):
        for name in ("ACCELERATE_USE_CPU", "ACCELERATE_BYPASS_DEVICE_MAP"):
            monkeypatch.delenv(name, raising=False)
        for name, value in {"LOCAL_WORLD_SIZE": str(processes), **env}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: cards)

    return made


@pytest.mark.parametrize(
    ("processes", "cards", "env", "shared"),
    [
        (4, 1, {}, (4, 1)),
        (4, 2, {}, (4, 2)),
        (4, 4, {}, None),
        (1, 4, {}, None),
        (4, 0, {}, None),  # CPUs
        (4, 1, {"ACCELERATE_USE_CPU": "true"}, None),
        (4, 1, {"ACCELERATE_BYPASS_DEVICE_MAP": "true"}, None),  # each process sees a card of its own
    ],
)
def test_processes_that_share_cards_talk_over_gloo(machine, monkeypatch, processes, cards, env, shared):
    machine(processes, cards, **env)
    assert sharing() == shared
    asked = {}
    monkeypatch.setattr("timm_tickets.distributed.processes.PartialState", lambda **given: asked.update(given))
    join_processes()
    assert asked.get("backend") == (None if shared is None else "gloo")
    recipes = {how: tt.load_recipe("digits_imp", [f"parallel={how}"]) for how in ("auto", "runs", "data")}
    assert {how: asked_parallel(recipe) for how, recipe in recipes.items()} == {
        "auto": "auto" if shared is None else "runs",
        "runs": "runs",
        "data": "data",
    }


@pytest.mark.parametrize("settings", [["parallel=data"], ["processes_per_run=2"]])
def test_processes_that_share_a_card_do_not_share_a_training(machine, monkeypatch, tmp_path, settings):
    machine(2, 1)
    monkeypatch.setattr(Accelerator, "num_processes", 2)
    monkeypatch.setattr("timm_tickets.training.supported.world_size", lambda: 2)
    with pytest.raises(tt.SettingError, match="2 processes share 1 card, and a training of 2"):
        tt.search("digits_imp", [*settings, f"output={tmp_path / 'x'}"])
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
def test_on_a_shared_card_runs_are_handed_out_unasked(one, tmp_path):
    """The card is pretended: what a card alone can show is in test_cuda.py."""
    told = [json.loads(line) for line in searched(tmp_path, COLT, 2, cards=1).stdout.splitlines()]
    assert "2 processes share 1 card: each trains runs of its own" in told[0]["said"] + told[1]["said"]
    same(tmp_path, one)


def test_working_alone_hides_the_others_from_everything(monkeypatch):
    PartialState()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
    monkeypatch.setattr(
        "timm_tickets.distributed.processes._by_itself", lambda whole: whole
    )  # test_groups.py has a real one
    for state in (PartialState, AcceleratorState):  # copies: whatever is written to them is gone after the test
        monkeypatch.setattr(state, "_shared_state", {**state._shared_state, "num_processes": 3, "process_index": 1})
    assert (rank(), world_size()) == (1, 3)
    with apart():
        assert (rank(), world_size(), place()) == (0, 1, (1, 3))
        assert PartialState().num_processes == 1
        assert PartialState().is_main_process
        assert any_of([True, False]) == [True, False]
        wait_for_others()
    with apart(None):
        assert world_size() == 3
    assert PartialState().num_processes == 3
    assert PartialState().process_index == 1


def test_runs_are_handed_out_through_a_folder_only(monkeypatch):
    import timm

    pruner = tt.create_pruner("colt", timm.create_model("test_resnet", num_classes=4), sparsity=0.5, epochs=1)
    pruner.parallel = "runs"
    monkeypatch.setattr("timm_tickets.pruning.pruner.groups_of", lambda size: (0, 2))
    with pytest.raises(tt.SettingError, match="gathered through one; create the pruner with a folder"):
        next(pruner)


def test_other_errors_are_not_taken_for_a_death():
    with pytest.raises(RuntimeError, match="shape"), ending_with_others():
        raise RuntimeError("shape mismatch")
    with pytest.raises(tt.TrainingError, match="NaN"), ending_with_others():
        raise tt.TrainingError("NaN")
