"""Searches and trainings from recipes: what they leave, how they continue, how they fail."""

import contextlib
import csv
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
from rich.console import Console
from support.pictures import make

import timm_tickets as tt
from timm_tickets.experiments import report
from timm_tickets.experiments import search as experiment
from timm_tickets.training import trainer as trainer_module

SHORT = ["training.epochs=2", "pruner.sparsity=0.8", "pruner.prune_rate=0.6", "training.checkpoint_interval=0"]


def search(folder, *more, restart=False):
    """A search of two rounds and its ticket's training, two epochs each; its result and what it printed."""
    text = io.StringIO()
    result = tt.search(
        "digits_imp", [*SHORT, f"output={folder}", *more], restart=restart, console=Console(file=text, width=200)
    )
    return result, text.getvalue()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted search: (result, output)."""
    return search(tmp_path_factory.mktemp("whole"))


def test_what_a_search_leaves(whole):
    result, text = whole
    folder = result.folder
    assert tt.load_recipe(folder / "recipe.yaml").hash == tt.load_recipe("digits_imp", SHORT).hash
    rows = list(csv.DictReader((folder / "summary.csv").open()))
    assert [row["name"] for row in rows] == ["round_00", "round_01", "round_02"]
    assert [float(row["sparsity"]) for row in rows] == pytest.approx([0, 0.6, 0.8], abs=1e-5)
    assert (folder / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    for row in rows:
        where = folder / row["name"]
        ticket = tt.load_ticket(where / f"{row['name']}.ticket")
        assert ticket.sparsity == pytest.approx(float(row["sparsity"]), abs=1e-9)
        trained = timm.create_model("test_resnet", num_classes=10, checkpoint_path=where / "model.safetensors")
        for name, mask in ticket.masks.items():
            assert not trained.get_parameter(name)[~mask].any()
        assert 0 <= float(row["test_top1"]) <= 100
        assert row["name"] in text
    assert not list(folder.rglob(".*"))
    assert not list(folder.rglob("checkpoint.pt"))


def test_the_final_ticket_holds_its_metrics_and_recipe(whole):
    result, _ = whole
    ticket = tt.load_ticket(result.folder / "digits_imp.ticket")
    assert ticket.fingerprint == result.ticket.fingerprint
    assert ticket.metadata["metrics"]["test_top1"] == result.rows[-1]["metrics"]["test_top1"]
    assert ticket.metadata["recipe"]["hash"] == tt.load_recipe("digits_imp", SHORT).hash
    assert ticket.metadata["model"]["kwargs"] == {"num_classes": 10}


def test_the_recorded_accuracy_is_the_saved_models(whole):
    from timm_tickets.data.datasets import Data

    result, _ = whole
    data = Data(tt.load_recipe("digits_imp").data)
    model = timm.create_model(
        "test_resnet", num_classes=10, checkpoint_path=result.folder / "round_02" / "model.safetensors"
    ).eval()
    test = data.test_set(model)
    images, labels = zip(*(test[i] for i in range(len(test))), strict=True)
    with torch.no_grad():
        correct = (model(torch.stack(images)).argmax(1) == torch.tensor(labels)).float().mean()
    assert 100 * correct.item() == pytest.approx(result.rows[-1]["metrics"]["test_top1"], abs=1e-4)


def test_splits_do_not_overlap():
    from timm_tickets.data.datasets import Data

    data = Data(tt.load_recipe("digits_imp").data)
    train, val = set(data._train.indices), set(data._val.indices)
    assert not train & val
    assert len(train | val) == 1437
    train_images, test_images = (
        {part.images[i].tobytes() for i in range(len(part))} for part in (data._train.dataset, data._test)
    )
    assert len(train_images & test_images) <= 1  # one digit was scanned twice
    assert len(val) == 144
    assert len(data._test) == 360


def test_a_finished_search_does_nothing(whole):
    result, _ = whole
    before = {path: path.stat().st_mtime_ns for path in result.folder.rglob("*")}
    again, text = search(result.folder)
    assert "is finished; nothing to do" in text
    assert again.ticket.fingerprint == result.ticket.fingerprint
    assert before == {path: path.stat().st_mtime_ns for path in result.folder.rglob("*")}


def test_a_changed_recipe_is_refused_with_the_differences(whole):
    result, _ = whole
    with pytest.raises(tt.SettingError) as error:
        search(result.folder, "training.lr=0.3", "pruner.sparsity=0.9")
    assert "training.lr: 0.05 there, 0.3 now" in str(error.value)
    assert "pruner.sparsity: 0.8 there, 0.9 now" in str(error.value)
    assert "--restart" in str(error.value)
    assert tt.load_ticket(result.folder / "digits_imp.ticket").fingerprint == result.ticket.fingerprint


def test_restart_deletes_results_and_nothing_else(tmp_path):
    search(tmp_path, "pruner.sparsity=0.3", "pruner.prune_rate=0.3", "training.epochs=1")
    mine = ("notes.txt", "best.ticket", "round_table/data", "round_00/notes.txt", "other/.draft.tmp")
    for name in mine:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    result, text = search(tmp_path, "pruner.sparsity=0.2", "training.epochs=1", restart=True)
    assert "skipped" not in text
    assert result.ticket.sparsity == pytest.approx(0.2, abs=1e-5)
    assert all((tmp_path / name).read_text() == "mine" for name in mine)


def test_a_recipe_that_somebody_else_wrote_is_not_overwritten(tmp_path):
    (tmp_path / "recipe.yaml").write_text("name: mine\n")
    with pytest.raises(tt.SettingError, match="was not written by timm-tickets"):
        search(tmp_path, restart=True)
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def test_a_recipe_that_cannot_be_built_leaves_the_folder_free(tmp_path):
    with pytest.raises(tt.SettingError, match="widht"):
        search(tmp_path / "run", "model.model_kwargs.widht=3")
    assert not (tmp_path / "run").exists()


def test_a_search_and_a_training_do_not_share_a_folder(whole, tmp_path):
    with pytest.raises(tt.SettingError, match="experiment: search there, training of dense now"):
        tt.train("digits_imp", None, [*SHORT, f"output={whole[0].folder}"])


def test_a_ticket_that_rewinds_past_the_training_is_refused(whole, tmp_path):
    ticket = tt.load_ticket(whole[0].folder / "digits_imp.ticket")
    ticket.metadata["start_epoch"] = 5.0
    ticket.save(tmp_path / "late.ticket")
    with pytest.raises(tt.SettingError, match=r"starts at epoch 5 .* of 2: nothing is left to train"):
        tt.train("digits_imp", tmp_path / "late.ticket", [*SHORT, f"output={tmp_path / 'run'}"])


def test_a_checkpoint_stays_until_its_run_is_written(whole, tmp_path, monkeypatch):
    """The disk fills at the very end of a training: the next call only scores and writes."""
    from timm_tickets.pruning import run_files

    def full(path, state):
        raise OSError("cannot write: No space left")

    with monkeypatch.context() as patch:
        patch.setattr(run_files, "write_state", full)
        with pytest.raises(OSError, match="No space left"):
            search(tmp_path)
    assert (tmp_path / "round_00" / "checkpoint.pt").exists()
    result, text = search(tmp_path)
    assert "round_00 goes on after 2 of 2 epochs" in text
    assert result.ticket.fingerprint == whole[0].ticket.fingerprint


class Stop(BaseException):
    pass


@pytest.mark.parametrize("epochs_before", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 3, 5))])
def test_stopped_at_any_epoch_it_continues_to_the_same_ticket(whole, tmp_path, monkeypatch, epochs_before):
    """Stops after an epoch has been trained but before it is written down, or between rounds."""
    seen = {"epochs": 0}
    evaluate = trainer_module.Trainer.evaluate

    def counted(self, loader, run, ema=None):
        if loader is self.val_loader:
            seen["epochs"] += 1
            if seen["epochs"] == epochs_before:
                raise Stop
        return evaluate(self, loader, run, ema)

    with monkeypatch.context() as patch:
        patch.setattr(trainer_module.Trainer, "evaluate", counted)
        with pytest.raises(Stop):
            search(tmp_path)
    result, text = search(tmp_path)
    expected, _ = whole
    assert result.ticket.fingerprint == expected.ticket.fingerprint
    assert [row["metrics"]["test_top1"] for row in result.rows] == [
        row["metrics"]["test_top1"] for row in expected.rows
    ]
    assert ("finished runs skipped" in text) == (epochs_before > 2)
    left, right = (timm.models.load_state_dict(r.folder / "round_02" / "model.safetensors") for r in (result, expected))
    assert all(torch.equal(left[name], right[name]) for name in right)


@pytest.mark.filterwarnings("ignore:jackpot", "ignore:.*no gradient reaches", "ignore:continuous_sparsification")
@pytest.mark.filterwarnings("ignore:edge_popup.*1 of 15 layers")
@pytest.mark.parametrize(
    "settings",
    [
        ["pruner.name=edge_popup", "pruner.scale=dynamic", "pruner.scope=global"],
        *(
            pytest.param(settings, marks=pytest.mark.slow)  # in CI tests/test_faults.py kills several kinds
            for settings in (
                ["pruner.name=colt", "pruner.prune_rate=0.7"],
                ["pruner.name=frozen_slt"],
                ["pruner.name=jackpot"],
                ["pruner.name=continuous_sparsification", "pruner.rounds=2", "pruner.rewind=1ep"],
                ["pruner.name=rigl", "pruner.interval=5"],
                ["pruner.name=gradual", "pruner.interval=5"],
            )
        ),
    ],
    ids=lambda settings: settings[0].partition("=")[2],
)
def test_every_kind_of_search_continues_within_a_run_to_the_same_ticket(tmp_path, monkeypatch, settings):
    """Stopped in the middle of a run, after its first epoch, and in the next one where there is one."""
    common = ["training.epochs=2", "pruner.sparsity=0.8", "training.checkpoint_interval=0", "controls=[]", *settings]

    said = io.StringIO()

    def run(folder):
        return tt.search("digits_imp", [*common, f"output={folder}"], console=Console(file=said, width=200))

    expected = run(tmp_path / "whole")
    evaluate = trainer_module.Trainer.evaluate
    for stop in (2, 3):
        seen = {"epochs": 0}

        def counted(self, loader, run, ema=None, seen=seen, stop=stop):
            seen["epochs"] += loader is self.val_loader
            if seen["epochs"] == stop:
                raise Stop
            return evaluate(self, loader, run, ema)

        with monkeypatch.context() as patch:
            patch.setattr(trainer_module.Trainer, "evaluate", counted)
            with contextlib.suppress(Stop):
                run(tmp_path / "stopped")
    result = run(tmp_path / "stopped")
    assert "goes on after 1 of 2 epochs" in said.getvalue()
    assert result.ticket.fingerprint == expected.ticket.fingerprint
    scores = [[row["metrics"]["test_top1"] for row in one.rows] for one in (result, expected)]
    assert scores[0] == scores[1]


@pytest.mark.parametrize("name", ["plot", pytest.param("write_summary", marks=pytest.mark.slow)])
def test_stopped_after_the_last_training_it_only_reports(whole, tmp_path, monkeypatch, name):
    def stop(*_):
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(experiment, name, stop)
        with pytest.raises(Stop):
            search(tmp_path)
    trained = sorted(path.name for path in tmp_path.glob("*/run.json"))
    result, text = search(tmp_path)
    assert "round_02 is finished; skipped" in text
    assert [row["name"] for row in result.rows] == ["round_00", "round_01", "round_02"]
    assert sorted(path.name for path in tmp_path.glob("*/run.json")) == trained
    assert result.ticket.fingerprint == whole[0].ticket.fingerprint
    metrics = tt.load_ticket(tmp_path / "digits_imp.ticket").metadata["metrics"]
    assert metrics["test_top1"] == whole[0].rows[-1]["metrics"]["test_top1"]


@pytest.mark.slow  # tests/test_faults.py kills five times in the continuous run
def test_killed_it_continues_to_the_same_ticket(whole, tmp_path):
    command = [sys.executable, "-m", "timm_tickets", "search", "digits_imp"]
    for setting in [*SHORT, f"output={tmp_path}"]:
        command += ["--set", setting]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (tmp_path / "round_00" / "run.json").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "result.json").exists()
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "continuing" in out
    assert "1 finished runs skipped" in out
    ticket = tt.load_ticket(tmp_path / "digits_imp.ticket")
    expected, _ = whole
    assert ticket.fingerprint == expected.ticket.fingerprint
    assert not list(tmp_path.rglob(".*"))


def test_late_rewinding_goes_on_in_the_schedule(tmp_path):
    result, _ = search(tmp_path, "pruner.rewind=1ep", "pruner.sparsity=0.6")
    steps = [row["steps"] for row in result.rows]
    per_epoch = steps[0] // 2
    assert steps == [2 * per_epoch, per_epoch]
    assert result.ticket.metadata["start_epoch"] == 1


def test_a_pruner_without_runs_gets_a_dense_control(tmp_path):
    recipe = tmp_path / "oneshot.yaml"
    text = (Path(__file__).parent.parent / "recipes" / "digits_imp.yaml").read_text()
    recipe.write_text(text.replace("name: imp", "name: magnitude").replace("  prune_rate: 0.2\n", ""))
    console = Console(file=io.StringIO())
    overrides = ["training.epochs=1", "pruner.sparsity=0.5", f"output={tmp_path / 'run'}"]
    result = tt.search(recipe, overrides, console=console)
    assert [(row["name"], row["sparsity"]) for row in result.rows] == [
        ("dense", 0),
        ("round_00", pytest.approx(0.5, abs=1e-5)),
    ]
    assert result.rows[0]["metrics"] != result.rows[1]["metrics"]
    without = tt.search(recipe, [*overrides[:2], "controls=[]", f"output={tmp_path / 'no'}"], console=console)
    assert [row["name"] for row in without.rows] == ["round_00"]
    assert without.ticket.fingerprint == result.ticket.fingerprint


def test_a_dense_run_on_some_of_the_classes_is_not_the_dense_network(tmp_path):
    overrides = ["pruner.name=colt", "pruner.sparsity=0.2", "training.epochs=1", "controls=[]", f"output={tmp_path}"]
    result = tt.search("digits_imp", overrides, console=Console(file=io.StringIO()))
    assert result.rows[0]["sparsity"] == 0  # the first part's first run
    assert "dense" not in result.ticket.metadata


def test_training_a_ticket_and_the_dense_network(whole, tmp_path):
    expected, _ = whole
    console = Console(file=io.StringIO(), width=200)
    ticket = expected.folder / "digits_imp.ticket"
    result = tt.train("digits_imp", ticket, [*SHORT, f"output={tmp_path / 'a'}"], console=console)
    assert result.rows[0]["sparsity"] == pytest.approx(0.8, abs=1e-5)
    trained = timm.models.load_state_dict(result.folder / "round_00" / "model.safetensors")
    for name, mask in result.ticket.masks.items():
        assert not trained[name][~mask].any()
    again = tt.train("digits_imp", ticket, [*SHORT, f"output={tmp_path / 'a'}"], console=console)
    assert again.rows == result.rows
    with pytest.raises(tt.SettingError, match="experiment: training of ticket"):
        tt.train("digits_imp", expected.folder / "round_01" / "round_01.ticket", [*SHORT, f"output={tmp_path / 'a'}"])
    dense = tt.train("digits_imp", None, [*SHORT, f"output={tmp_path / 'b'}"], console=console)
    assert dense.rows[0]["sparsity"] == 0
    # The dense run is the search's first round: the same seeds, so the same weights.
    left, right = (
        timm.models.load_state_dict(folder / "round_00" / "model.safetensors")
        for folder in (dense.folder, expected.folder)
    )
    assert all(torch.equal(left[name], right[name]) for name in right)


def test_a_ticket_of_another_architecture_is_refused(whole, tmp_path):
    with pytest.raises(tt.TicketError, match="'test_resnet', the model is 'test_vit'"):
        tt.train(
            "digits_imp",
            whole[0].folder / "digits_imp.ticket",
            ["model.model=test_vit", f"output={tmp_path / 'x'}"],
        )
    assert not (tmp_path / "x").exists()


def test_nan_stops_says_the_step_and_keeps_the_last_good_state(tmp_path, monkeypatch):
    original = tt.Training.loss

    def poisoned(self, criterion, output, target):
        loss = original(self, criterion, output, target)
        return loss * math.nan if self.index == 1 and self.step == 25 else loss

    with monkeypatch.context() as patch:
        patch.setattr(tt.Training, "loss", poisoned)
        with pytest.raises(tt.TrainingError, match=r"round_01: the loss is not finite at step 25 .*last_good"):
            search(tmp_path)
    good = timm.models.load_state_dict(tmp_path / "round_01" / "last_good.safetensors")
    assert all(value.isfinite().all() for value in good.values())
    assert (tmp_path / "round_00" / "run.json").exists()
    _, text = search(tmp_path)  # what was finished is still there
    assert "1 finished runs skipped" in text


def test_a_folder_that_cannot_be_written_is_told_before_training(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    began = time.monotonic()
    with pytest.raises(OSError, match=r"cannot write .*recipe\.yaml"):
        search(tmp_path / "file" / "run")
    assert time.monotonic() - began < 5


def test_a_disk_that_fills_loses_nothing(whole, tmp_path, monkeypatch):
    original = os.fsync
    calls = {"left": 17}

    def filling(number):
        calls["left"] -= 1
        if calls["left"] < 0:
            raise OSError(28, os.strerror(28))
        return original(number)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", filling)
        with pytest.raises(OSError, match=r"cannot write .*No space left on device; nothing written before is lost"):
            search(tmp_path)
    assert not list(tmp_path.rglob(".*"))
    result, _ = search(tmp_path)
    assert result.ticket.fingerprint == whole[0].ticket.fingerprint


@pytest.mark.filterwarnings("ignore:Using backward")  # adahessian's second derivative
@pytest.mark.parametrize(
    "settings",
    [
        ["training.opt=adamw", "training.lr=0.001", "training.clip_grad=1.0", "training.grad_accum_steps=2"],
        ["training.mixup=0.2", "training.cutmix=1.0", "training.smoothing=0.1", "training.model_ema=true"],
        ["training.opt=lookahead_sgd", "training.sched=multistep", "training.decay_milestones=[1]"],
        [
            "training.amp=true",
            "training.amp_dtype=bfloat16",
            "training.channels_last=false",
            "training.sched=step",
        ],
        [
            "training.torchcompile=eager",
            "training.smoothing=0.1",
            "training.sched=none",
            "data.workers=2",
            "data.cache=none",
        ],
        pytest.param(
            ["training.opt=adahessian", "training.lr=0.05", "training.epochs=1", "data.val_fraction=0.3"],
            marks=pytest.mark.slow,
        ),
        ["training.bce_loss=true", "training.smoothing=0.1", "pruner.scope=layerwise", "pruner.rewind=3it"],
        ["model.model=test_vit", "model.drop_path=0.1", "training.layer_decay=0.8", "training.batch_size=512"],
    ],
    ids=lambda settings: settings[0],
)
def test_trainings_of_every_kind_leave_exact_tickets(tmp_path, settings):
    more = ["training.epochs=1", "pruner.sparsity=0.7", "pruner.prune_rate=0.7", *settings]
    result, _ = search(tmp_path, *more)
    assert result.ticket.sparsity == pytest.approx(0.7, abs=1e-5)
    for file in result.folder.glob("round_01/model*.safetensors"):
        trained = timm.models.load_state_dict(file)
        for name, mask in result.ticket.masks.items():
            assert not trained[name][~mask].any(), (file, name)
    assert len(list(result.folder.glob("round_01/model*.safetensors"))) == 1 + ("model_ema" in str(settings))


def test_a_torchvision_style_folder_of_images_is_searched(tmp_path):
    """The way of real data sets: timm's own reader, validation held out, another number of classes."""
    from PIL import Image

    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 40), ("test", 8)):
        for label in range(3):
            where = tmp_path / "images" / split / f"class{label}"
            where.mkdir(parents=True)
            for i in range(count):
                pixels = torch.randint(0, 60, (32, 32, 3), generator=generator, dtype=torch.uint8)
                pixels[..., label] += 150
                Image.fromarray(pixels.numpy()).save(where / f"{i}.png")
    result, _ = search(
        tmp_path / "run",
        "data.dataset=folder",
        f"data.data_dir={tmp_path / 'images'}",
        "training.batch_size=16",
    )
    assert result.ticket.metadata["model"]["num_classes"] == 3
    assert result.rows[-1]["metrics"]["test_top1"] > 60
    assert json.loads((result.folder / "result.json").read_text())["rows"]


def test_data_that_is_not_there_is_named(tmp_path):
    with pytest.raises(tt.SettingError, match=r"data: .*torch/cifar10"):
        search(tmp_path, "data.dataset=torch/cifar10", f"data.data_dir={tmp_path}")
    assert Path(tmp_path).exists()


@pytest.fixture
def pictures(tmp_path):
    """Settings for a search on 18 pictures, three steps an epoch; their folder is ``root`` beside it."""
    root = make(tmp_path / "root")
    return [
        "data.dataset=folder",
        f"data.data_dir={root}",
        "data.val_split=val",
        "training.batch_size=6",
        "pruner.sparsity=0.6",
    ]


@pytest.mark.filterwarnings("ignore:rigl", "ignore:frozen_slt")  # layers that so few steps empty
@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["pruner.epochs=1"], {"dense": 2, "round_00": 1, "round_01": 2}),
        (["pruner.epochs=3", "retrain.epochs=1"], {"dense": 1, "round_00": 3, "round_01": 1}),
        (["pruner.epochs=2"], {"round_00": 2, "round_01": 2}),
        (["pruner.epochs=3", "retrain.epochs=3"], {"round_00": 3, "round_01": 3}),
        (["pruner.name=rigl", "pruner.epochs=3"], {"dense": 3, "round_00": 3, "round_01": 3}),
        (["pruner.name=frozen_slt", "pruner.epochs=1"], {"dense": 1, "round_00": 1, "round_01": 1}),
        (["pruner.name=magnitude", "pruner.epochs=9", "retrain.epochs=1"], {"dense": 1, "round_00": 1}),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_the_dense_network_is_trained_as_long_as_the_ticket(tmp_path, pictures, settings, expected):
    if not settings[0].startswith("pruner.name"):
        settings = [*settings, "pruner.prune_rate=0.6"]
    text = io.StringIO()
    common = ["training.epochs=2", "training.checkpoint_interval=0", f"output={tmp_path / 'run'}", *pictures]
    result = tt.search("digits_imp", [*common, *settings], console=Console(file=text, width=80))
    assert {row["name"]: row["epochs"] for row in result.rows} == expected
    steps = {row["name"]: row["steps"] for row in result.rows}
    assert all(steps[name] in (0, 3 * epochs) for name, epochs in expected.items())  # 0: scored, trained in the search
    dense, length = result.rows[0], list(expected.values())[-1]
    assert (dense["sparsity"], dense["epochs"], dense["steps"]) == (0, length, 3 * length)
    assert result.ticket.metadata["dense"] == dense["metrics"]
    table = list(csv.DictReader((result.folder / "summary.csv").open()))
    assert {row["name"]: int(row["epochs"]) for row in table} == expected
    assert (" epochs " in text.getvalue()) == (len({*expected.values()}) > 1)
    assert "…" not in text.getvalue()  # the table has room in 80 columns
    assert "no dense network to compare with" not in text.getvalue()


def test_without_a_dense_network_as_long_none_is_compared_with(tmp_path, pictures, monkeypatch):
    drawn = {}
    monkeypatch.setattr(experiment, "plot", lambda rows, path, title, dense: drawn.update(rows=rows, dense=dense))
    settings = [*pictures, "pruner.epochs=1", "pruner.prune_rate=0.4", "controls=[]"]
    result, text = search(tmp_path / "run", *settings)
    assert [(row["name"], row["epochs"]) for row in result.rows] == [("round_00", 1), ("round_01", 1), ("round_02", 2)]
    assert "dense" not in result.ticket.metadata
    why = "round_00 was trained for 1 epoch, the ticket for 2 epochs; with controls=[dense], one is trained as long"
    assert f"no dense network to compare with: {why}" in text
    assert drawn["dense"] is None
    seeds = tt.search_seeds("digits_imp", [0, 1], [*SHORT, *settings, f"output={tmp_path / 'seeds'}"])
    assert all("dense" not in one.ticket.metadata for one in seeds)
    assert {row["dense_test_top1"] for row in csv.DictReader((tmp_path / "seeds" / "seeds.csv").open())} == {""}


def test_the_plot_joins_what_was_trained_equally_long():
    metrics = {"val_top1": 50.0}
    rows = [
        {
            "name": name,
            "sparsity": sparsity,
            "epochs": epochs,
            "all_images": whole,
            "metrics": {**metrics, "test_top1": top1},
        }
        for name, sparsity, epochs, whole, top1 in (
            ("dense", 0.0, 5, True, 90.0),
            ("round_00", 0.0, 2, True, 70.0),
            ("round_01_part_0", 0.5, 2, False, 99.0),
            ("round_01", 0.5, 2, True, 60.0),
            ("round_02", 0.75, 5, True, 80.0),
        )
    ]

    def lines(dense):
        (axes,) = report.figure(rows, "a title", dense).axes
        return {one.get_label(): one for one in axes.lines}

    found = lines(rows[0])
    assert list(found) == [
        "test, after 5 epochs",
        "validation, after 5 epochs",
        "test, after 2 epochs",
        "validation, after 2 epochs",
        "dense, test",
    ]
    curve, others = found["test, after 5 epochs"], found["test, after 2 epochs"]
    assert (list(curve.get_xdata()), list(curve.get_ydata())) == ([1.0, 0.25], [90.0, 80.0])
    assert (list(others.get_xdata()), list(others.get_ydata())) == ([1.0, 0.5], [70.0, 60.0])
    assert (curve.get_linestyle(), others.get_linestyle()) == ("-", "None")
    assert (curve.get_markerfacecolor(), others.get_markerfacecolor()) == ("C0", "none")
    assert set(found["dense, test"].get_ydata()) == {90.0}
    assert "dense, test" not in lines(None)
    del rows[1:4]
    assert list(lines(None)) == ["test", "validation"]


def test_images_that_have_changed_since_a_search_began_are_noticed(tmp_path, pictures, monkeypatch):
    folder, gone = tmp_path / "run", tmp_path / "root" / "train" / "bee" / "4.png"

    def stop(*_):
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(experiment, "plot", stop)
        with pytest.raises(Stop):
            search(folder, *pictures)
    gone.unlink()
    with pytest.raises(tt.SettingError) as error:
        search(folder, *pictures)
    assert (
        f"{folder} was begun with other images:\n  train: 18 images there, 17 now; class 'bee': 6 there, 5 now\n"
        in (str(error.value))
    )
    assert "--restart" in str(error.value)
    assert (folder / "round_01" / "run.json").exists()
    result, text = search(folder, *pictures, restart=True)
    assert "17 images to train on" in text
    assert result.ticket.sparsity == pytest.approx(0.6, abs=1e-4)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["data.test_split=tset"], "data.test_split: 'tset' is unknown"),
        (["data.test_split=train"], "18 of the 18 images are in data.train_split too"),
        (["training.batch_size=1"], "training.batch_size: 1 and the images of this run leave one to a step"),
        (["data.input_img_mode=L"], "mode L has 1 channels, and the model takes 3"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_data_that_cannot_be_trained_on_leaves_the_folder_free(tmp_path, pictures, settings, words):
    with pytest.raises(tt.SettingError, match=words):
        search(tmp_path / "run", *pictures, *settings)
    assert not (tmp_path / "run").exists()
    with pytest.raises(tt.SettingError, match=words):
        tt.train("digits_imp", None, [*SHORT, *pictures, *settings, f"output={tmp_path / 'run'}"])
    assert not (tmp_path / "run").exists()


def test_a_part_that_leaves_one_image_a_step_is_refused(tmp_path, pictures):
    shutil.rmtree(tmp_path / "root")
    make(tmp_path / "root", dict.fromkeys(("train", "val", "test"), 1))
    settings = [*pictures, "pruner.name=colt", "pruner.partitions=3"]  # of one class each
    with pytest.raises(tt.SettingError, match=r"training.batch_size: 6 and the images of this run leave one to a step"):
        search(tmp_path / "run", *settings)


def test_an_image_that_cannot_be_scored_is_found_before_anything_is_trained(tmp_path, pictures):
    (tmp_path / "root" / "test" / "cat" / "1.png").write_bytes(b"no image")
    with pytest.raises(tt.SettingError, match=r"1 of 12 images .* cannot be scored.*\n.*cat/1.png cannot be decoded"):
        search(tmp_path / "run", *pictures)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "settings",
    [
        [],
        ["data.cache=none"],
        pytest.param(["pruner.name=colt", "data.workers=1", "data.cache=none"], marks=pytest.mark.slow),
    ],
    ids=["imp", "one by one", "colt"],
)
def test_with_unreadable_images_a_search_still_goes_on_to_the_same_ticket(tmp_path, pictures, monkeypatch, settings):
    """timm puts the next image in their place, of another class at a class's end; COLT died of that."""
    for name in ("ant/5", "bee/5", "cat/2"):
        (tmp_path / "root" / "train" / f"{name}.png").write_bytes(b"no image")
    settings = [*pictures, *settings, "controls=[]"]
    with pytest.raises(tt.TrainingError, match=r"data.unreadable: 1 of 18 training images .* share of 0.01"):
        search(tmp_path / "refused", *settings)
    settings.append("data.unreadable=0.2")
    expected, text = search(tmp_path / "whole", *settings)
    (told,) = [line for line in text.splitlines() if line.startswith("3 of 18 training images cannot be decoded")]
    assert all(f"/{name}.png" in told for name in ("ant/5", "bee/5", "cat/2"))
    loss, seen = tt.Training.loss, {"losses": 0}

    def halting(self, *args):
        seen["losses"] += 1
        if seen["losses"] == 5:
            raise Stop
        return loss(self, *args)

    monkeypatch.setattr(tt.Training, "loss", halting)
    with pytest.raises(Stop):
        search(tmp_path / "halted", *settings)
    result, _ = search(tmp_path / "halted", *settings)
    assert result.ticket.fingerprint == expected.ticket.fingerprint


def test_a_picture_that_is_removed_while_it_trains_is_named_and_put_back_it_continues(tmp_path, pictures, monkeypatch):
    pictures = [*pictures, "data.cache=none"]  # a cache would not notice
    expected, _ = search(tmp_path / "whole", *pictures)
    gone = tmp_path / "root" / "train" / "bee" / "4.png"
    taken = gone.read_bytes()
    fit = trainer_module.Trainer.fit

    def removing(self, run, *args):
        if run.index == 1:
            gone.unlink()
        return fit(self, run, *args)

    with monkeypatch.context() as patch:
        patch.setattr(trainer_module.Trainer, "fit", removing)
        with pytest.raises(tt.TrainingError, match=rf"^{gone} cannot be read: No such file .*same command continues$"):
            search(tmp_path / "run", *pictures)
    gone.write_bytes(taken)
    result, text = search(tmp_path / "run", *pictures)
    assert "1 finished runs skipped" in text
    assert result.ticket.fingerprint == expected.ticket.fingerprint
