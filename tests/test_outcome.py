"""What an experiment leaves for others: the trained model in plain timm, the best one, the log of epochs, trackers."""

import csv
import io
import os
import stat
from types import SimpleNamespace

import pytest
import timm
import torch
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file
from support.pictures import CLASSES, make

import timm_tickets as tt
from timm_tickets.experiments import report, trackers
from timm_tickets.experiments import search as experiment
from timm_tickets.experiments.dry_run import dry_run
from timm_tickets.training import best, trainer
from timm_tickets.training.epoch_log import COLUMNS, EPOCHS


class Stop(BaseException):
    pass


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make(tmp_path_factory.mktemp("pictures") / "root")


@pytest.fixture
def search(root, tmp_path):
    """A function that searches on 18 pictures, two epochs of three steps a training; its result and what it printed."""

    def run(*more, folder=tmp_path / "run", **looks):
        text = io.StringIO()
        common = ["data.dataset=folder", f"data.data_dir={root}", "data.val_split=val", "training.batch_size=6"]
        common += ["training.epochs=2", "training.checkpoint_interval=0", f"output={folder}"]
        common += ["pruner.sparsity=0.6", "pruner.prune_rate=0.6"] * all("pruner.name" not in one for one in more)
        console = Console(file=text, width=80, **looks)
        return tt.search("digits_imp", [*common, *more], console=console), text.getvalue()

    return run


def rows(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def correct(folder, root, classes=CLASSES):
    """Percent of the test pictures that the folder's model gets right, by timm and the class names alone."""
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    mode, names = "L" if model.pretrained_cfg["input_size"][0] == 1 else "RGB", model.pretrained_cfg["label_names"]
    paths = [path for path in sorted((root / "test").glob("*/*.png")) if path.parent.name in classes]
    with torch.no_grad():
        images = torch.stack([transform(Image.open(path).convert(mode)) for path in paths])
        found = [names[label] for label in model(images).argmax(1)]
    return 100 * sum(name == path.parent.name for name, path in zip(found, paths, strict=True)) / len(paths)


@pytest.mark.filterwarnings("ignore:.*no gradient reaches", "ignore:frozen_slt", "ignore:gradual")
@pytest.mark.parametrize(
    ("settings", "classes", "source"),
    [
        (["data.crop_pct=0.8", "data.interpolation=nearest"], CLASSES, "model"),
        (["training.model_ema=true", "training.model_ema_decay=0.5"], CLASSES, "model_ema"),
        (["model.in_chans=1"], CLASSES, "model"),
        (["data.classes=[2,0]"], ("cat", "ant"), "model"),
        (["model.model=test_vit", "model.drop=0.1", "training.lr=0.01"], CLASSES, "model"),
        (["model.model=cifar_resnet20", "model.model_kwargs.widths=[4,4,8]"], CLASSES, "model"),
        (["pruner.name=frozen_slt", "pruner.sparsity=0.5"], CLASSES, "model"),
        (["pruner.name=gradual", "pruner.sparsity=0.5", "pruner.interval=2"], CLASSES, "model"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_plain_timm_loads_the_trained_model_and_scores_as_the_search_did(search, root, settings, classes, source):
    result, text = search(*settings)
    folder, last = result.folder, result.rows[-1]
    assert correct(folder, root, classes) == pytest.approx(last["metrics"]["test_top1"], abs=1e-3)
    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert model.pretrained_cfg["label_names"] == list(classes)
    data, mine = timm.data.resolve_model_data_config(model, use_test_size=True), model.pretrained_cfg
    assert (*data["input_size"][1:], data["mean"][0]) == (32, 32, 0.3)
    assert not {"url", "hf_hub_id", "test_input_size", "test_crop_pct"} & {key for key in mine if mine[key] is not None}
    for name, mask in result.ticket.masks.items():
        assert not model.get_parameter(name)[~mask].any()
    assert os.path.samefile(folder / "model.safetensors", folder / last["name"] / f"{source}.safetensors")
    assert f'timm.create_model("local-dir:{folder}", pretrained=True)' in text
    assert ("import timm, timm_tickets" in text) == ("cifar" in settings[0])
    for name in ("model.safetensors", "config.json", "digits_imp.ticket", "summary.csv", "epochs.csv", "accuracy.png"):
        assert name in text
        assert (folder / name).is_file()


def test_a_file_system_without_hard_links_gets_a_copy(search, monkeypatch):
    def refused(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    folder = search()[0].folder
    copy, source = folder / "model.safetensors", folder / "round_01" / "model.safetensors"
    assert not os.path.samefile(copy, source)
    assert copy.read_bytes() == source.read_bytes()


@pytest.mark.parametrize("command", ["train", "transfer"])
def test_train_and_transfer_leave_a_model_too(search, root, tmp_path, command):
    result, _ = search("controls=[]")
    ticket, folder = result.folder / "digits_imp.ticket", tmp_path / "other"
    more = [f"output={folder}", "data.dataset=folder", f"data.data_dir={root}", "data.val_split=val"]
    more += ["training.batch_size=6", "training.epochs=1"]
    text = io.StringIO()
    console = Console(file=text, width=80)
    if command == "train":
        found = tt.train("digits_imp", ticket, more, console=console)
    else:
        found = tt.transfer("digits_imp", ticket, more, controls=["dense"], console=console)
    (row,) = [row for row in found.rows if row["name"] != "dense"]
    assert correct(folder, root) == pytest.approx(row["metrics"]["test_top1"], abs=1e-3)
    assert f"the trained model: {row['name']}" in text.getvalue()
    assert {one["run"] for one in rows(folder / EPOCHS)} == {one["name"] for one in found.rows}
    if command == "train":
        text.truncate(0)
        tt.train("digits_imp", ticket, more, console=console)
        assert "nothing to do" in text.getvalue()


def test_files_of_a_search_have_the_permissions_that_the_umask_gives(search):
    before = os.umask(0o027)
    try:
        folder = search("training.keep_best=true")[0].folder
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*") if path.is_file()}
    assert {*modes.values()} == {0o640}
    assert {"model.safetensors", "config.json", "model_best.safetensors", "epochs.csv"} < modes.keys()


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_model_that_is_gone_or_changed_is_put_back_without_a_training(search, name):
    folder = search()[0].folder
    before = (folder / name).read_bytes()
    (folder / name).unlink()
    for told in (rf"{name} is missing; it is made again", rf"{name} is damaged \(its checksum differs\)"):
        with pytest.warns(UserWarning, match=told):
            assert "round_01 is finished; skipped" in search()[1]
        assert (folder / name).read_bytes() == before
        (folder / name).unlink()  # or the round's own, which is the same file, would change with it
        (folder / name).write_bytes(before[:-1])


def test_a_model_of_somebody_else_s_is_not_overwritten_and_restart_deletes_only_ours(search, tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "config.json").write_text("precious")
    with pytest.raises(tt.SettingError, match=r"config.json was not written by timm-tickets; choose another output="):
        search(folder=mine)
    assert [path.name for path in mine.iterdir()] == ["config.json"]
    folder = search("training.keep_best=true")[0].folder
    experiment.check_folder(folder, tt.load_recipe(folder / "recipe.yaml"), "search", restart=True)
    assert not list(folder.iterdir())


# The best epoch


def test_the_best_epoch_is_kept_on_request_and_said(search, root, monkeypatch):
    evaluate, states, scores = trainer.Trainer.evaluate, [], [50.0, 90.0, 60.0]

    def scripted(self, loader, run, ema=None):
        found = evaluate(self, loader, run, ema)
        if loader is self.val_loader:
            states.append({name: value.clone() for name, value in run.subnet.model.state_dict().items()})
            found["top1"] = scores[(len(states) - 1) % 3]
        return found

    monkeypatch.setattr(trainer.Trainer, "evaluate", scripted)
    result, text = search("training.keep_best=true", "training.epochs=3")
    for number, row in enumerate(result.rows):
        path = result.folder / row["name"] / best.BEST
        assert best.told_of(path) == {"val_top1": "90.0000", "epoch": "2"}
        assert (row["metrics"]["val_top1_best"], row["metrics"]["val_epoch_best"]) == (90, 2)
        saved = load_file(path)
        assert all(torch.equal(saved[name], value) for name, value in states[3 * number + 1].items())
    assert os.path.samefile(result.folder / best.BEST, result.folder / "round_01" / best.BEST)
    assert "(best 90.00, epoch 2)" in text
    assert "its weights after epoch 2, the best" in " ".join(text.split())
    timm.create_model("test_resnet", num_classes=3, checkpoint_path=result.folder / best.BEST)
    result, text = search("training.epochs=3", folder=result.folder.parent / "without")
    assert not list(result.folder.rglob(best.BEST))
    assert "the best epoch on validation was 2 of 3 (val 90.00); training.keep_best=true" in text


def test_only_epochs_with_the_last_mask_are_compared(tmp_path):
    """The best epoch of a method that prunes as it trains is mostly the dense one."""
    subnet = SimpleNamespace(mask={"a": torch.tensor([True, True])}, state=lambda: {"a": torch.zeros(2)})
    run = SimpleNamespace(request=tt.Run(after_step=lambda run: None), subnet=subnet)
    (tmp_path / best.BEST).write_text("of an earlier training")
    done = {}
    kept = best.Best(run, tmp_path, done, continued=False)
    assert not (tmp_path / best.BEST).exists()
    found = []
    for epoch, (keep, top1) in enumerate([(True, 90.0), (False, 60.0), (False, 55.0), (False, 60.0), (False, 61.0)]):
        subnet.mask = {"a": torch.tensor([True, keep])}
        kept = best.Best(run, tmp_path, done, continued=True)  # as if the process were another one each time
        kept.look(epoch, {"top1": top1}, None)
        found.append(best.told_of(tmp_path / best.BEST)["epoch"])
    assert found == ["1", "2", "2", "2", "5"]


# The log


def timeless(path):
    return [{key: value for key, value in row.items() if key not in ("seconds", "time")} for row in rows(path)]


@pytest.mark.parametrize("stop", [2, 4, 6, 9])
def test_a_search_that_is_stopped_anywhere_has_every_epoch_once_in_its_log(search, tmp_path, monkeypatch, stop):
    expected = search(folder=tmp_path / "whole")[0].folder / EPOCHS
    assert [(row["run"], row["epoch"]) for row in rows(expected)] == [
        (name, epoch) for name in ("round_00", "round_01") for epoch in "12"
    ]
    assert tuple(rows(expected)[0]) == COLUMNS
    loss, seen = tt.Training.loss, {"losses": 0}

    def halting(self, *args):
        seen["losses"] += 1
        if seen["losses"] == stop:
            raise Stop
        return loss(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(tt.Training, "loss", halting)
        with pytest.raises(Stop):
            search()
    assert sum(len(rows(path)) for path in (tmp_path / "run").glob(f"*/{EPOCHS}")) == (stop - 1) // 3
    assert timeless(search()[0].folder / EPOCHS) == timeless(expected)


def test_a_kill_between_the_log_and_the_checkpoint_leaves_no_row_twice(search, tmp_path, monkeypatch):
    expected = search(folder=tmp_path / "whole")[0].folder / EPOCHS
    look = trainer.Saving.look

    def stopping(self, update=None):
        if update is None:  # an epoch's end: its row is written, the checkpoint not
            raise Stop
        look(self, update)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Saving, "look", stopping)
        with pytest.raises(Stop):
            search()
    assert len(rows(tmp_path / "run" / "round_00" / EPOCHS)) == 1
    assert timeless(search()[0].folder / EPOCHS) == timeless(expected)


def test_the_log_s_loss_is_the_mean_over_the_epoch(search, monkeypatch):
    loss, seen = tt.Training.loss, []

    def recorded(self, *args):
        found = loss(self, *args)
        seen.append(found.item())
        return found

    monkeypatch.setattr(tt.Training, "loss", recorded)
    logged = rows(search()[0].folder / EPOCHS)
    for number, row in enumerate(logged):
        assert float(row["train_loss"]) == pytest.approx(sum(seen[3 * number : 3 * number + 3]) / 3, rel=1e-4)
    assert [float(row["sparsity"]) for row in logged] == pytest.approx([0, 0, 0.6, 0.6], abs=1e-4)
    assert all(0 < float(row["lr"]) <= 0.05 for row in logged)


def test_a_damaged_log_is_told_and_nothing_else_depends_on_it(search, tmp_path, monkeypatch):
    evaluate, seen = trainer.Trainer.evaluate, {"epochs": 0}

    def halting(self, loader, run, ema=None):
        seen["epochs"] += loader is self.val_loader
        if seen["epochs"] == 2:
            raise Stop
        return evaluate(self, loader, run, ema)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "evaluate", halting)
        with pytest.raises(Stop):
            search()
    (tmp_path / "run" / "round_00" / EPOCHS).write_text('run,epoch\n"half a')
    with pytest.warns(UserWarning, match=r"round_00/epochs.csv is damaged .* nothing else depends on it"):
        folder = search()[0].folder
    assert [(row["run"], row["epoch"]) for row in rows(folder / EPOCHS)][:2] == [("round_00", "2"), ("round_01", "1")]


@pytest.mark.parametrize(("looks", "term", "lines"), [({}, "xterm", 4), ({"force_terminal": True}, "dumb", 4)])
def test_each_epoch_is_a_line_where_no_bar_can_be_drawn(search, monkeypatch, looks, term, lines):
    monkeypatch.setenv("TERM", term)
    _, text = search(**looks)
    told = [line for line in text.splitlines() if line.startswith("round_0") and "  epoch " in line]
    assert len(told) == lines
    assert all("loss" in line and "val" in line and "lr" in line for line in told)
    assert "\x1b[?25l" not in text  # no bar


def test_a_terminal_has_bars_and_no_line_an_epoch(search, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    _, text = search(force_terminal=True)
    assert "  epoch 1/2  loss" not in text
    assert "\x1b[?25l" in text


# Trackers


class Mine(GeneralTracker):
    name, requires_logging_directory, seen = "mine", True, []

    def __init__(self, run_name, logging_dir):
        super().__init__()
        self.seen.append((run_name, logging_dir))

    @property
    def tracker(self):
        return self.seen

    def store_init_configuration(self, values):
        self.seen.append(values)

    def log(self, values, step=None, **_):
        if values["sparsity"] and self.fails:
            raise ConnectionError("the network is gone")
        self.seen.append((step, values))

    def finish(self):
        self.seen.append("end")


@pytest.fixture
def mine(monkeypatch):
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "mine", Mine)
    monkeypatch.setattr(Mine, "seen", [])
    monkeypatch.setattr(Mine, "fails", False, raising=False)
    return Mine


def test_accelerate_s_trackers_get_every_epoch_and_the_settings(search, mine, tmp_path):
    search("training.log_with=mine")
    first, settings, *logged, end = mine.seen
    assert first == ("digits_imp", str(tmp_path / "run" / "trackers"))
    assert settings["training.lr"] == 0.05
    assert all(isinstance(value, bool | int | float | str) for value in settings.values())
    assert [(step, values["run"], values["epoch"]) for step, values in logged] == [
        (1, "round_00", 1),
        (2, "round_00", 2),
        (3, "round_01", 1),
        (4, "round_01", 2),
    ]
    assert {"train_loss", "val_top1", "val_loss", "lr", "sparsity"} < logged[0][1].keys()
    assert end == "end"


def test_a_tracker_that_fails_is_told_once_and_ends_no_training(search, mine, monkeypatch):
    monkeypatch.setattr(mine, "fails", True)
    with pytest.warns(UserWarning, match="mine has failed .*network is gone.*; the training goes on") as told:
        result, _ = search("training.log_with=[mine]")
    assert len(told) == 1
    assert len(rows(result.folder / EPOCHS)) == 4


def test_a_tracker_that_cannot_be_had_is_named_before_anything_is_trained(search, tmp_path, monkeypatch):
    monkeypatch.setattr(trackers, "get_available_trackers", list)
    with pytest.raises(tt.SettingError, match=r"training.log_with: comet_ml is not installed .*pip install comet-ml"):
        search("training.log_with=comet_ml")
    assert not (tmp_path / "run").exists()
    with pytest.raises(tt.SettingError, match=r"training.log_with: tensorbord: .*|did you mean 'tensorboard'"):
        search("training.log_with=tensorbord")


def test_what_is_kept_and_logged_does_not_make_another_experiment(search, mine):
    before = tt.load_recipe("digits_imp").hash
    assert tt.load_recipe("digits_imp", ["training.log_with=mine", "training.keep_best=true"]).hash == before


# The dry run


@pytest.mark.filterwarnings(
    "ignore:.*no gradient reaches", "ignore:frozen_slt", "ignore:gradual", "ignore:colt", "ignore:snip"
)
@pytest.mark.parametrize(
    "settings",
    [
        ["pruner.prune_rate=0.4"],
        ["pruner.name=gradual"],
        ["pruner.name=frozen_slt", "training.grad_accum_steps=2"],
        ["pruner.name=snip"],
        ["pruner.name=magnitude", "retrain.epochs=1"],
        ["pruner.name=colt", "pruner.prune_rate=0.5"],
    ],
    ids=lambda settings: settings[0],
)
def test_a_dry_run_says_what_the_search_takes_and_leaves_nothing(search, root, tmp_path, monkeypatch, settings):
    monkeypatch.chdir(tmp_path)
    common = ["data.dataset=folder", f"data.data_dir={root}", "data.val_split=val", "training.batch_size=6"]
    common += ["training.epochs=2", "pruner.sparsity=0.6", "output=run"]
    text = io.StringIO()
    found = dry_run("digits_imp", [*common, *settings], console=Console(file=text, width=80))
    assert not list(tmp_path.iterdir())
    assert "nothing was trained or written" in text.getvalue()
    assert ("at least" in text.getvalue()) == found.at_least == ("colt" in settings[0])
    result, _ = search("pruner.sparsity=0.6", *settings)
    trained = [row for row in result.rows if row["steps"] or row["name"] == result.rows[-1]["name"]]
    measured = (
        len(trained) + ("snip" in settings[0]),  # whose reading is a run and no row
        sum(row["epochs"] for row in trained if row["steps"]),
        sum(row["steps"] for row in trained),
    )
    used = sum(path.stat().st_size for path in result.folder.rglob("*.*") if path.stat().st_nlink == 1)
    if found.at_least:
        assert all(least <= real for least, real in zip((found.runs, found.epochs, found.steps), measured, strict=True))
    else:
        assert (found.runs, found.epochs, found.steps) == measured
        assert used <= found.disk + 200_000 <= 3 * used  # plots and records beside the weights
    assert found.seconds > 0


def test_the_table_of_a_search_has_room_in_80_columns():
    text = io.StringIO()
    metrics = {"val_top1_best": 100.0, "val_top1": 100.0, "test_top1": 100.0, "seconds": 1234.5, "val_top1_soft": None}
    numbers = {
        "round": 0,
        "part": 0,
        "sparsity": 0.5,
        "layer_min": 0.1,
        "layer_max": 0.9,
        "steps": 1,
        "metrics": metrics,
    }
    rows = [{**numbers, "name": f"round_00_part_{i}", "epochs": 160 + i} for i in range(2)]
    for some in (rows, rows[:1]):
        report.print_table(some, Console(file=text, width=80))
    assert "…" not in text.getvalue()
    assert text.getvalue().count("round_00_part_0") == 2
