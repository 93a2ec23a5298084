"""Damaged, foreign and hostile files in the folders of searches: told by name, and what they held is done again."""

import contextlib
import os
import shutil

import pytest
import torch
from rich.console import Console
from torch import nn

import timm_tickets as tt
from timm_tickets.experiments import run_folder
from timm_tickets.pruning.run_files import read_run_record
from timm_tickets.storage import files
from timm_tickets.storage.checkpoint_file import BEFORE, CHECKPOINT, load_checkpoint, save_checkpoint

SETTINGS = {"sparsity": 0.8, "prune_rate": 0.4, "epochs": 1, "rewind": "2it", "exclude": ("1.*",)}


def searched(folder, seed=0, lr=0.1, **settings):
    """A search of four runs of four steps; the pruner, and the runs that were trained and not replayed."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 2))
    pruner, trained = tt.create_pruner("imp", model, folder=folder, **{**SETTINGS, **settings}), []
    for run in pruner:
        trained.append(run.name)
        run.batches_per_epoch = 4
        optimizer = run.attach(torch.optim.SGD(model.parameters(), lr))
        for step in range(4):
            inputs = torch.linspace(-1, 1, 64).reshape(4, 16) * (1 + step)
            run.loss(lambda output, _: output.square().sum(), model(inputs), torch.zeros(4)).backward()
            optimizer.step()
            optimizer.zero_grad()
    return pruner.ticket.fingerprint, trained


RUNS = ["round_00", "round_01", "round_02", "round_03"]


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A finished search: its folder, and its ticket's fingerprint."""
    folder = tmp_path_factory.mktemp("original")
    fingerprint, trained = searched(folder)
    assert trained == RUNS
    assert searched(folder) == (fingerprint, [])
    return folder, fingerprint


@pytest.fixture
def search(original, tmp_path):
    """A copy of it."""
    return shutil.copytree(original[0], tmp_path / "search"), original[1]


def flip(path, place=None, bit=4):
    data = bytearray(path.read_bytes())
    data[len(data) * 2 // 3 if place is None else place] ^= 1 << bit
    path.write_bytes(data)


def replace(path, make):
    path.unlink()
    make(path)


DAMAGE = {
    "flipped": flip,
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-20]),
    "empty": lambda path: path.write_bytes(b""),
    "missing": lambda path: path.unlink(),
    "a FIFO": lambda path: replace(path, os.mkfifo),
    "a link": lambda path: replace(path, lambda path: path.symlink_to("/etc/passwd")),
    "a link to nothing": lambda path: replace(path, lambda path: path.symlink_to("nowhere")),
    "a link to itself": lambda path: replace(path, lambda path: path.symlink_to(path.name)),
    "nested without end": lambda path: path.write_bytes(b"[" * 100_000),
}
FILES = ["run.json", "round_00.ticket", "model.safetensors", "rewind.safetensors"]


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_run_is_told_by_name_and_alone_trained_again(search, name, damage):
    folder, fingerprint = search
    damage(folder / "round_00" / name)
    with pytest.warns(UserWarning, match=rf"round_00/{name} is .*; round_00 is done again") as told:
        assert searched(folder) == (fingerprint, ["round_00"])
    assert len(told) == 1
    assert searched(folder) == (fingerprint, [])


@pytest.mark.parametrize("name", FILES)
def test_a_folder_in_place_of_a_file_is_refused_and_named(search, name):
    folder, fingerprint = search
    path = folder / "round_00" / name
    replace(path, lambda path: path.mkdir())
    with pytest.raises(OSError, match=rf"round_00/{name} is a folder, where a file belongs; move or delete it"):
        searched(folder)
    path.rmdir()
    with pytest.warns(UserWarning, match="done again"):
        assert searched(folder) == (fingerprint, ["round_00"])


def every_flip(path, module, monkeypatch):
    """Have a module read this file once for each of its bytes, with a bit of that flipped."""
    data = path.read_bytes()
    for place in range(len(data)):
        flipped = bytearray(data)
        flipped[place] ^= 1 << place % 8
        monkeypatch.setattr(module, "read_bytes", lambda _, flipped=bytes(flipped): flipped)
        yield


def test_any_flipped_bit_of_a_record_is_noticed(original, monkeypatch):
    folder = original[0] / "round_01"
    expected, taken = read_run_record(folder), 0
    for _ in every_flip(folder / "run.json", files, monkeypatch):
        with contextlib.suppress(files.DamagedError):
            assert read_run_record(folder) == expected
            taken += 1
    assert taken < 3  # in "1e-05", e may become E


def test_a_run_that_ends_otherwise_this_time_has_those_after_it_trained_again(search):
    folder, fingerprint = search
    flip(folder / "round_01" / "model.safetensors")
    with pytest.warns(UserWarning, match=r"round_0\d is done again") as told:
        other, trained = searched(folder, lr=0.3)
    assert trained == RUNS[1:]
    after = "run.json was written after other runs than those that are now before it; round_0"
    assert [after in str(one.message) for one in told] == [False, True, True]
    assert other != fingerprint
    assert searched(folder) == (other, [])


def test_a_run_of_another_search_or_round_is_not_taken_for_this_one_s(search, tmp_path):
    folder, fingerprint = search
    searched(tmp_path / "other", seed=1)
    shutil.copytree(tmp_path / "other" / "round_02", folder / "round_02", dirs_exist_ok=True)
    with pytest.warns(UserWarning, match=r"round_02/run.json is of another search; round_02 is done again"):
        assert searched(folder) == (fingerprint, ["round_02"])
    for path in (folder / "round_01").iterdir():
        shutil.copy(path, folder / "round_02" / path.name.replace("round_01", "round_02"))
    with pytest.warns(UserWarning, match=r"round_02/run.json is of another run \('round_01'\)"):
        assert searched(folder) == (fingerprint, ["round_02"])


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_first_state_is_written_again_only_if_it_is_known(search, damage):
    folder, fingerprint = search
    damage(folder / "start.state")
    before = sorted((path, path.lstat().st_mtime_ns) for path in folder.rglob("*"))
    with pytest.raises(OSError, match=r"start.state is .* the model as given is not known .*--restart does"):
        searched(folder, seed=1)
    assert sorted((path, path.lstat().st_mtime_ns) for path in folder.rglob("*")) == before
    with pytest.warns(UserWarning, match=r"start.state is .*; it is written again: the model as given is the s"):
        assert searched(folder) == (fingerprint, [])
    assert searched(folder, seed=1) == (fingerprint, [])


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_record_of_a_search_is_written_again_only_if_it_is_known(search, damage):
    folder, fingerprint = search
    kept = shutil.copytree(folder, folder.with_name("kept"))
    damage(folder / "pruner.json")
    with pytest.raises(OSError, match=r"pruner.json is .* the finished runs beside it are not known to be"):
        searched(folder, seed=1, sparsity=0.7)
    with pytest.warns(UserWarning, match=r"pruner.json is .*; it is written again"):
        assert searched(folder, seed=1) == (fingerprint, [])  # the first state is there
    damage(folder / "pruner.json")
    flip(folder / "start.state")
    with pytest.raises(OSError, match=r"pruner.json is .* the finished runs beside it are not known to be"):
        searched(folder, seed=1)
    with pytest.warns(UserWarning, match=r"pruner.json is .*; it is written again"):
        assert searched(folder) == (fingerprint, [])
    for path in kept.glob("*.*"):
        assert (folder / path.name).read_bytes() == path.read_bytes()


# Experiments


SMALL = ["training.epochs=1", "pruner.sparsity=0.6", "pruner.prune_rate=0.6", "data.val_fraction=0.7"]


def experiment(folder, *more):
    """The fingerprint that a search of two trainings finds, and what it printed."""
    console = Console(record=True, width=200, quiet=False, file=open(os.devnull, "w"))  # noqa: SIM115
    result = tt.search("digits_imp", [*SMALL, f"output={folder}", *more], console=console)
    console.file.close()
    assert result.ticket.fingerprint == tt.load_ticket(folder / "digits_imp.ticket").fingerprint
    assert [row["name"] for row in result.rows] == ["round_00", "round_01"]
    return result.ticket.fingerprint, console.export_text()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    return folder, experiment(folder)[0]


@pytest.fixture
def found(finished, tmp_path):
    return shutil.copytree(finished[0], tmp_path / "found"), finished[1]


CASES = [
    ("result.json", "flipped", r"result.json is damaged \(.*\); it is made again from the finished runs"),
    ("result.json", "empty", r"result.json is damaged \(it is empty\); it is made again"),
    ("digits_imp.ticket", "flipped", r"digits_imp.ticket .*; it is made again from the finished runs"),
    ("digits_imp.ticket", "missing", r"there is no ticket at .*digits_imp.ticket; it is made again"),
    ("digits_imp.ticket", "a FIFO", r"there is no ticket at .*digits_imp.ticket; it is made again"),
    ("recipe.yaml", "flipped", r"recipe.yaml is damaged \(its checksum differs\); written again, as of this command"),
    ("recipe.yaml", "missing", r"recipe.yaml is missing; written again, as of this command"),
    ("recipe.yaml", "a FIFO", r"recipe.yaml is damaged \(it is a FIFO, .*\); written again"),
    ("experiment.json", "flipped", r"experiment.json is damaged \(.*\); written again, as of this command"),
    ("experiment.json", "missing", r"experiment.json is missing; written again, as of this command"),
]


@pytest.mark.parametrize(("name", "damage", "told"), CASES, ids=[f"{name} {damage}" for name, damage, _ in CASES])
def test_what_a_finished_search_reads_is_made_again_without_a_training(found, name, damage, told):
    folder, fingerprint = found
    DAMAGE[damage](folder / name)
    with pytest.warns(UserWarning, match=told):
        again, text = experiment(folder)
    assert again == fingerprint
    assert "nothing to do" in text or ("1 finished runs skipped" in text and "round_01 is finished; skipped" in text)
    assert "nothing to do" in experiment(folder)[1]


def test_a_damaged_training_of_the_ticket_itself_is_done_again(found):
    folder, fingerprint = found
    (folder / "result.json").unlink()
    DAMAGE["cut"](folder / "round_01" / "run.json")
    shutil.copytree(folder / "round_00", folder / "round_07")
    (folder / "mine").mkdir()
    (folder / "mine" / "run.json").write_text("{}")
    with pytest.warns(UserWarning, match=r"done again|left out") as told:
        assert experiment(folder)[0] == fingerprint
    texts = " ".join(str(one.message) for one in told)
    assert "round_01/run.json is damaged (it is not JSON); round_01 is done again" in texts
    assert "round_07/run.json is of another run ('round_00'); it is left out of the results" in texts
    assert "mine/run.json is damaged (it has no checksum); it is left out of the results" in texts


def test_where_nothing_says_whose_results_they_are_the_command_says_what_to_delete(found):
    folder, fingerprint = found
    flip(folder / "recipe.yaml")
    flip(folder / "experiment.json")
    with pytest.raises(
        tt.SettingError, match=r"cannot be told. If it does, delete .*recipe.yaml and .*experiment.json"
    ):
        experiment(folder)
    (folder / "recipe.yaml").unlink()
    (folder / "experiment.json").unlink()
    with pytest.warns(UserWarning, match=r"result.json is of another experiment; it is made again"):
        assert experiment(folder)[0] == fingerprint
    flip(folder / "recipe.yaml")
    with pytest.raises(tt.SettingError, match=r"recipe.yaml is damaged .* begin again with --restart"):
        experiment(folder, "training.lr=0.01")
    (folder / "recipe.yaml").unlink()
    run_folder.check_folder(folder, tt.load_recipe("digits_imp"), "search", restart=True)
    assert not list(folder.iterdir())


def test_every_flipped_bit_of_a_stored_recipe_is_noticed(finished, monkeypatch):
    path = finished[0] / "recipe.yaml"
    assert run_folder._lost_recipe(path) == (None, True)
    for _ in every_flip(path, run_folder, monkeypatch):
        assert run_folder._lost_recipe(path)[0] is not None


# Checkpoints


def test_a_checkpoint_of_another_run_is_not_gone_on_with(tmp_path):
    save_checkpoint(tmp_path, {"number": 1}, of="round_00 of a search")
    assert load_checkpoint(tmp_path, "round_00 of a search")[0] == {"number": 1, "of": "round_00 of a search"}
    found, told = load_checkpoint(tmp_path, "round_01 of a search")
    assert found is None
    assert "checkpoint.pt is of another run" in told[0]
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_that_is_no_file_does_not_hang(tmp_path):
    for _ in range(2):
        save_checkpoint(tmp_path, {"number": 1})
    replace(tmp_path / CHECKPOINT, os.mkfifo)
    found, told = load_checkpoint(tmp_path)
    assert found == {"number": 1}
    assert "is a FIFO" in told[0]
    assert not (tmp_path / CHECKPOINT).exists()
    replace(tmp_path / BEFORE, lambda path: path.mkdir())
    with pytest.raises(OSError, match=r"checkpoint_before.pt is a folder, where a file belongs"):
        load_checkpoint(tmp_path)
