"""Accidents: kills, SIGTERM, damaged checkpoints, full disks, two commands on one folder. Nothing is lost."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from support import started
from support.run_folders import leftovers, same

import timm_tickets as tt
from timm_tickets.distributed import sigterm as stop
from timm_tickets.storage import checkpoint_file as checkpoint
from timm_tickets.storage import lock
from timm_tickets.storage.checkpoint_file import BEFORE, CHECKPOINT, load_checkpoint, save_checkpoint
from timm_tickets.training.randomness import random_states, set_random_states_

DRIVER = Path(__file__).parent / "support" / "killed_search.py"
ENV = os.environ | {"OMP_NUM_THREADS": "1"}
# Two runs of 14 steps and a checkpoint at each of them; everything that draws numbers is on.
SMALL = [
    "training.epochs=2",
    "training.checkpoint_interval=0",
    "pruner.sparsity=0.6",
    "pruner.prune_rate=0.6",
    "data.val_fraction=0.7",
    "data.reprob=0.5",
    "model.drop=0.2",
    "training.mixup=0.2",
    "training.model_ema=true",
]


def lives(folder, moments, *more, number=signal.SIGKILL):
    """Search in a folder, killed at these moments of each life; how each ended, and what those that lived printed."""
    order = {"overrides": [*SMALL, f"output={folder}", *more], "lives": moments, "signal": int(number)}
    done = started.run(DRIVER, json.dumps(order), env=ENV)
    assert done.returncode == 0, done.stderr
    told = [json.loads(line) for line in done.stdout.splitlines()]
    ended = [one["ended"] for one in told if "ended" in one]
    assert len(ended) == len(moments), done.stderr
    assert 1 not in ended, done.stderr
    return ended, [one for one in told if "ended" not in one]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted search: its folder, and how many moments it has."""
    folder = tmp_path_factory.mktemp("whole")
    ended, (told,) = lives(folder, [0])
    assert ended == [0]
    return folder, told["moments"]


def killed_and_continued(whole, folder, seed, kills):
    expected, moments = whole
    draw = random.Random(seed)
    # One start-up, then anywhere up to twice the step that an even walk through the search would take.
    points = [1 + draw.randrange(4)] + [draw.randrange(1, 2 * moments // kills) for _ in range(kills - 1)]
    ended, told = lives(folder, [*points, 0, 0, 0])
    assert ended[:3] == [-signal.SIGKILL] * 3
    assert ended.count(-signal.SIGKILL) + ended.count(0) == len(ended)
    assert ended[-1] == 0
    assert told[-1]["fingerprint"] == tt.load_ticket(expected / "digits_imp.ticket").fingerprint
    assert not leftovers(folder)
    same(folder, expected)


def test_killed_five_times_it_continues_to_the_same_ticket(whole, tmp_path):
    killed_and_continued(whole, tmp_path, seed=0, kills=5)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_killed_25_times_it_continues_to_the_same_ticket(whole, tmp_path, seed):
    killed_and_continued(whole, tmp_path, seed, kills=25)


@pytest.mark.slow
def test_killed_with_workers_it_continues_and_leaves_no_lock(tmp_path):
    """Each image draws its own augmentation there; a worker that outlives its parent holds no lock."""
    more = ["data.cache=none", "data.workers=1", "training.epochs=1", "training.checkpoint_interval=0"]
    _, (told,) = lives(tmp_path / "whole", [0], *more)
    ended, _ = lives(tmp_path / "killed", [told["moments"] // 2, 0], *more)
    assert ended == [-signal.SIGKILL, 0]
    same(tmp_path / "killed", tmp_path / "whole")
    assert not leftovers(tmp_path / "killed")


@pytest.mark.slow
def test_sigterm_saves_and_exits_with_143(whole, tmp_path):
    folder = tmp_path / "run"
    ended, told = lives(folder, [whole[1] // 3, 0], number=signal.SIGTERM)
    assert ended == [stop.STOPPED, 0]
    assert stop.STOPPED == 143
    assert "goes on after" in told[-1]["said"]
    same(folder, whole[0])


def test_the_command_says_that_sigterm_stopped_it_and_a_second_one_is_refused(whole, tmp_path):
    settings = [word for setting in [*SMALL, f"output={tmp_path}"] for word in ("--set", setting)]
    command = ["-m", "timm_tickets", "search", "digits_imp", *settings]
    first = started.start(command, env=ENV)
    (process,) = first.processes
    while not (tmp_path / "round_00" / BEFORE).exists():
        assert process.exitcode is None
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGSTOP)  # or it may have ended before the second one comes
    second = started.run(*command, env=ENV)
    assert second.returncode == 2
    assert f"{tmp_path} is in use: process {process.pid} on " in second.stderr.replace("\n", "")
    os.kill(process.pid, signal.SIGTERM)
    os.kill(process.pid, signal.SIGCONT)
    done = first.ended()
    assert done.returncode == 143
    assert "stopped by SIGTERM; the same command continues" in done.stderr
    assert not (tmp_path / lock._HOLDER).exists()


def test_a_lock_is_refused_while_it_is_held_and_leaves_nothing(tmp_path):
    folder = tmp_path / "a" / "run"
    said = []
    with lock.locked(folder, said.append):
        with (
            pytest.raises(tt.SettingError, match=rf"is in use: process {os.getpid()} on .*, since 2.* choose another"),
            lock.locked(folder, said.append),
        ):
            pass
        with (
            pytest.raises(tt.SettingError, match="is in use"),
            lock.locked(folder, said.append),  # a refusal must not have ended the lock
        ):
            pass
    assert not folder.exists()
    with lock.locked(folder, said.append):
        (folder / "mine").touch()
    assert [path.name for path in folder.iterdir()] == ["mine"]
    assert not said


def test_a_lock_ends_with_its_process_and_not_with_its_children(tmp_path):
    script = (
        "import os, sys, time; from pathlib import Path; from timm_tickets.storage.lock import locked\n"
        "with locked(Path(sys.argv[1]), print):\n"
        "    child = os.fork()\n"
        "    if child == 0: time.sleep(600)\n"
        "    print(child, flush=True); time.sleep(600)"
    )
    holder = subprocess.Popen([sys.executable, "-c", script, tmp_path], env=ENV, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    child = int(holder.stdout.readline())
    try:
        with pytest.raises(tt.SettingError, match=f"process {holder.pid} on"), lock.locked(tmp_path, print):
            pass
        holder.kill()
        holder.wait()
        with lock.locked(tmp_path, print):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        holder.stdout.close()
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_exist_is_refused_at_once(tmp_path, monkeypatch):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    for place in ("output/run", "/proc/x"):
        with (
            pytest.raises(tt.SettingError, match=rf"output: the folder {place} cannot be made \(No such file or dir"),
            lock.locked(Path(place), print),
        ):
            pass


HOLDERS = {
    "{}": "another command",
    "[]": "another command",
    "": "another command",
    "[" * 900: "another command",
    '{"pid": 1, "host": "a", "since": 3}': "another command",
    '{"pid": 1, "host": "\\u001b[2Jh", "since": "2026-11-20T10:00:00+00:00"}': "another command",
    '{"pid": "\\u001b", "host": "h", "since": "2026-11-20T10:00:00+00:00"}': "another command",
    '{"pid": 1, "host": "h", "since": "2026-11-20T10:00:00+00:00"' + " " * 2000 + "}": "another command",
    '{"pid": 1, "host": "h", "since": "2026-11-20T10:00:00+00:00"}': "process 1 on h, since 2026-11-20T10:00:00+00:00,",
}


@pytest.mark.parametrize(("text", "who"), HOLDERS.items(), ids=range(len(HOLDERS)))
def test_the_holder_of_a_lock_is_named_only_as_we_would_write_it(tmp_path, text, who):
    with lock.locked(tmp_path, print):
        (tmp_path / lock._HOLDER).write_text(text)
        assert lock._refusal(tmp_path) == (
            f"{tmp_path} is in use: {who} works in it. Wait until it has ended, or choose another output="
        )
        (tmp_path / lock._HOLDER).unlink()
        os.mkfifo(tmp_path / lock._HOLDER)
        assert "another command works in it" in lock._refusal(tmp_path)


def test_where_there_are_no_locks_it_goes_on_and_says_so(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", none)
    said = []
    with lock.locked(tmp_path, said.append):
        assert "cannot be locked (No locks available); start no second command on it" in said[0]
    monkeypatch.setattr(lock, "fcntl", None)
    with lock.locked(tmp_path, said.append):
        assert "cannot lock" in said[1]


@pytest.fixture
def saved(tmp_path):
    """A folder with two checkpoints, the later one holding 2."""
    for number in (1, 2):
        save_checkpoint(tmp_path, {"number": number, "values": torch.arange(1000.0)})
    return tmp_path


def cut(path, keep):
    path.write_bytes(path.read_bytes()[:keep])


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "empty": lambda path: cut(path, 0),
    "cut in the middle": lambda path: cut(path, 2000),
    "cut before the checksum": lambda path: cut(path, -52),
    "one byte short": lambda path: cut(path, -1),
    "bit of a value": lambda path: flip(path, 1500),
    "bit of the checksum": lambda path: flip(path, -1),
    "of another program": lambda path: path.write_bytes(b"PK not a checkpoint"),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_checkpoint_is_noticed_and_the_one_before_is_used(saved, damage):
    assert load_checkpoint(saved)[0]["number"] == 2
    damage(saved / CHECKPOINT)
    found, told = load_checkpoint(saved)
    assert found["number"] == 1
    assert "is damaged" in told[0]
    assert "goes on from the one before" in told[0]
    assert not (saved / CHECKPOINT).exists()  # or the next one would push out the good one for it
    assert load_checkpoint(saved)[1] == []
    damage(saved / BEFORE)
    found, told = load_checkpoint(saved)
    assert found is None
    assert "the run starts from its beginning" in told[0]
    assert not list(saved.iterdir())


def test_a_checkpoint_is_one_that_torch_reads_safely(saved):
    assert torch.load(saved / CHECKPOINT, weights_only=True)["number"] == 2


@pytest.mark.parametrize("piece", [1, 3])
def test_a_disk_that_is_full_keeps_the_last_checkpoint(saved, monkeypatch, piece):
    original = checkpoint._Hashing.write
    calls = {"made": 0}

    class Full:
        def write(self, data):
            raise OSError(28, os.strerror(28))

    def filling(self, data):
        calls["made"] += 1
        if calls["made"] == piece:
            self.file = Full()
        return original(self, data)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint._Hashing, "write", filling)
        with pytest.raises(OSError, match=r"cannot write .*checkpoint.pt: No space left on device"):
            save_checkpoint(saved, {"number": 3, "values": torch.arange(1000.0)})
    assert load_checkpoint(saved)[0]["number"] == 2
    assert {path.name for path in saved.iterdir()} == {CHECKPOINT, BEFORE}


@pytest.mark.slow
def test_a_search_with_damaged_checkpoints_goes_on_to_the_same_ticket(whole, tmp_path):
    lives(tmp_path, [whole[1] // 3])
    (newest,) = tmp_path.glob(f"*/{CHECKPOINT}")
    flip(newest, 3000)
    _, told = lives(tmp_path, [0])
    assert f"{newest} is damaged" in told[0]["said"]
    assert "goes on after" in told[0]["said"]
    same(tmp_path, whole[0])


def test_a_folder_that_becomes_read_only_stops_the_search_with_a_clear_error(tmp_path, monkeypatch):
    """Injected, because tests may run as root, whom permissions do not stop."""
    original = Path.open

    def refused(self, mode="r", *args, **kwargs):
        if "w" in mode and CHECKPOINT in self.name:
            raise PermissionError(13, os.strerror(13), str(self))
        return original(self, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refused)
    with pytest.raises(OSError, match=r"cannot write .*checkpoint.pt: Permission denied; nothing written before"):
        tt.search("digits_imp", [*SMALL, f"output={tmp_path / 'run'}"])
    monkeypatch.undo()
    assert not leftovers(tmp_path)


def test_random_states_come_back():
    states = random_states()
    drawn = [torch.rand(3), np.random.rand(3), random.random()]
    set_random_states_(states)
    again = [torch.rand(3), np.random.rand(3), random.random()]
    assert torch.equal(drawn[0], again[0])
    assert (drawn[1] == again[1]).all()
    assert drawn[2] == again[2]


class Halt(BaseException):
    pass


@pytest.mark.parametrize(
    "settings",
    [
        ["training.grad_accum_steps=3", "training.opt=adamw", "training.lr=0.001"],
        pytest.param(["training.opt=lookahead_sgd"], marks=pytest.mark.slow),
        ["pruner.name=rigl", "pruner.interval=3"],
        ["pruner.name=continuous_sparsification", "pruner.rounds=1", "pruner.rewind=1ep"],
        pytest.param(["pruner.rewind=5it"], marks=pytest.mark.slow),
        ["retrain.tweaks=[smooth_activation]"],
        pytest.param(["retrain.tweaks=[rescaled_init]"], marks=pytest.mark.slow),
        pytest.param(
            ["training.lr=0.05", "training.opt=adahessian"],
            marks=[pytest.mark.slow, pytest.mark.filterwarnings("ignore:Using backward")],
        ),
    ],
    ids=lambda settings: settings[-1],
)
@pytest.mark.filterwarnings("ignore:continuous_sparsification")
def test_every_kind_of_training_goes_on_within_an_epoch(tmp_path, monkeypatch, settings):
    """Stopped after every few batches, in the middle of epochs; each time a new trainer goes on."""
    plain = [one for one in SMALL if "mixup" not in one and "prune_rate" not in one and "ema" not in one]
    if settings[0].startswith("pruner.name"):
        common = [*plain, "controls=[]", *settings]
    else:
        common = [*plain, "pruner.prune_rate=0.6", *settings]
    tt.search("digits_imp", [*common, f"output={tmp_path / 'whole'}"])
    loss = tt.Training.loss
    seen = {"losses": 0}

    def halting(self, *args):
        seen["losses"] += 1
        if seen["losses"] % 9 == 0:
            raise Halt
        return loss(self, *args)

    monkeypatch.setattr(tt.Training, "loss", halting)
    for _ in range(20):
        try:
            tt.search("digits_imp", [*common, f"output={tmp_path / 'halted'}"])
        except Halt:
            continue
        break
    assert seen["losses"] > 9
    same(tmp_path / "halted", tmp_path / "whole")
