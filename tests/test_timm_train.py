"""timm's tasks under a ticket or a pruner, and an unedited script under `timm-tickets run`."""

import gc
import logging
import re

import pytest
import timm
import timm.optim
import timm.task
import torch
from commands import call
from outline import TRAIN, checkpoint_of, rows, run_script, save_ticket, unmodified
from timm.layers import convert_splitbn_model
from timm.task import ClassificationTask, FeatureDistillationTask, LogitDistillationTask, TokenDistillationTask
from timm.utils import CheckpointSaver

import timm_tickets as tt
from timm_tickets.integrations.launcher import Launcher

IMP = {"sparsity": 0.75, "prune_rate": 0.5}
CRITERION = torch.nn.CrossEntropyLoss()


def fresh(name="test_resnet", classes=10, **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=classes, **kwargs)


def saved(folder, **kwargs):
    save_ticket(folder, **kwargs)
    return folder / "model.ticket"


def of(model, **kwargs):
    return tt.wrap(ClassificationTask(model, CRITERION), **kwargs)


def launched(folder, monkeypatch, launcher, *args, script=None):
    """Run an unedited script, the outline of train.py where not given, in a folder with pictures."""
    monkeypatch.chdir(folder)
    if not (folder / "data").exists():
        run_script("'--data-dir'", monkeypatch, folder)
    (folder / "train.py").write_text(script or unmodified(TRAIN))
    launcher.run(folder / "train.py", list(args))
    return launcher.task


def trained(task, steps=4, rate=0.05, **kwargs):
    """Train a task on a few random images, with an EMA."""
    torch.manual_seed(3)
    optimizer = torch.optim.SGD(task.get_trainable_module().parameters(), rate)
    data = torch.utils.data.TensorDataset(torch.randn(8, 3, 32, 32), torch.arange(8) % 4)
    loader = torch.utils.data.DataLoader(data, batch_size=4)
    if hasattr(task, "attach"):
        optimizer, loader = task.attach(optimizer, loader)
    task.setup_ema(decay=0.5)
    losses, step = [], 0
    for _ in range(steps // len(loader)):
        for images, labels in loader:
            step += 1
            out = task.train()(images, labels)
            out["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
            task.update_ema(step=step)
            losses.append(out["loss"].item())
    return losses


def tasks(kind):
    teacher = fresh("test_vit", 4, img_size=32)
    if kind == "logit":
        return LogitDistillationTask(fresh(classes=4), teacher, CRITERION)
    if kind == "feature":
        return FeatureDistillationTask(fresh(classes=4), teacher, CRITERION)
    small = {"img_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 2}
    return TokenDistillationTask(fresh("deit_tiny_distilled_patch16_224", 4, **small), teacher, CRITERION)


@pytest.mark.parametrize("kind", ["logit", "feature", "token"])
def test_wrap_takes_any_task(kind):
    plain = tasks(kind)
    dense = tt.wrap(tasks(kind), pruner="gradual", sparsity=0, epochs=2)
    assert trained(plain) == trained(dense)
    task = tasks(kind)
    kept = {name: value.clone() for name, value in task.teacher.state_dict().items()}
    wrapped = tt.wrap(task, pruner="gradual", sparsity=0.6, interval=1, epochs=2)
    assert wrapped is task
    assert isinstance(task, type(plain))
    assert type(task).__name__ == type(plain).__name__
    trained(task)
    assert task.run.complete
    assert task.sparsity == pytest.approx(0.6, abs=1e-3)
    assert all(torch.equal(value, kept[name]) for name, value in task.teacher.state_dict().items())
    plain_keys = list(plain.get_checkpoint_state()["state_dict"])
    for key in ("state_dict", "state_dict_ema"):
        state = task.get_checkpoint_state(ema=key == "state_dict_ema")
        assert list(state[key]) == plain_keys
        assert all(not state[key][name][~mask].any() for name, mask in task.subnet.mask.items())
    state = task.get_checkpoint_state()
    own = set(plain.get_task_state())
    assert own | {"run", "what", "finished", "progress"} == set(state["task_state"])
    other = tt.wrap(tasks(kind), pruner="gradual", sparsity=0.6, interval=1, epochs=2)
    other.load_checkpoint_state(state["state_dict"], state["task_state"])
    assert other.run.step == 4
    assert all(torch.equal(other.subnet.mask[name], mask) for name, mask in task.subnet.mask.items())


def test_wrap_refuses_what_is_no_task_or_has_one():
    with pytest.raises(tt.SettingError, match="none of timm's training tasks"):
        tt.wrap(fresh(), pruner="random", sparsity=0.5)
    task = of(fresh(), pruner="random", sparsity=0.5)
    with pytest.raises(tt.SettingError, match="already"):
        tt.wrap(task, pruner="random", sparsity=0.5)


def test_classes_cannot_be_cut_from_a_distillation(tmp_path):
    with pytest.raises(tt.SettingError, match="set split=samples"):
        tt.wrap(tasks("logit"), pruner="colt", sparsity=0.5, epochs=1, folder=tmp_path)


@pytest.mark.parametrize("given", ["ticket", "gradual"])
def test_launched_unedited_trains_as_edited(given, tmp_path, monkeypatch):
    edited, other = tmp_path / "edited", tmp_path / "launched"
    for folder in (edited, other):
        saved(folder)
    code = TRAIN
    if given == "gradual":
        code = TRAIN.replace('ticket="model.ticket"', 'pruner="gradual", sparsity=0.7, epochs=args.epochs')
    run_script(code, monkeypatch, edited)
    monkeypatch.chdir(other)
    make = timm.optim.create_optimizer_v2
    ticket, pruner = ("model.ticket", None) if given == "ticket" else (None, "gradual")
    launched(other, monkeypatch, Launcher(ticket, pruner, {} if ticket else {"sparsity": 0.7}))
    assert timm.optim.create_optimizer_v2 is make
    assert (edited / "output/summary.csv").read_bytes() == (other / "output/summary.csv").read_bytes()
    assert float(rows(other)[-1]["eval_sparsity"]) == pytest.approx(0.7, abs=1e-4)
    one, two = checkpoint_of(edited), checkpoint_of(other)
    assert all(torch.equal(one["state_dict_ema"][key], two["state_dict_ema"][key]) for key in one["state_dict_ema"])


def test_launched_searches_go_on_by_calls_and_late_rewinding_is_honoured(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    final = tmp_path / "search" / "final.ticket"
    calls = []
    while not final.exists():
        launcher = Launcher(None, "imp", IMP | {"rewind": "1ep"}, tmp_path / "search")
        task = launched(tmp_path, monkeypatch, launcher, "--output", f"output{len(calls)}")
        calls.append((task.run.name, task.run.start_epoch, task.run.position, task.run.step))
    assert calls == [("round_00", 0, 3, 12), ("round_01", 1, 3, 8)]
    assert "run 2 of 2 (round_01)" in caplog.text
    assert f"its ticket is {final}" in caplog.text
    assert "start_epoch is set to 1" in caplog.text
    assert "rewound to epoch 1" in call("info", final).output
    task = launched(tmp_path, monkeypatch, Launcher(str(final), None, {}), "--output", "last")
    assert task.start_epoch == 1
    assert [row["epoch"] for row in rows_of(tmp_path / "last")] == ["1", "2"]
    launched(tmp_path, monkeypatch, Launcher(str(final), None, {}), "--output", "whole", "--start-epoch", "0")
    assert [row["epoch"] for row in rows_of(tmp_path / "whole")] == ["0", "1", "2"]
    # With our lines, whoever calls the script says where it begins; the first step is the last one where he does not.
    edited = TRAIN.replace('"model.ticket"', f'"{final}"')
    with pytest.raises(tt.SettingError, match="--start-epoch 1"):
        run_script(edited, monkeypatch, tmp_path)
    assert run_script(edited, monkeypatch, tmp_path, "--start-epoch", "1")["task"].sparsity == pytest.approx(
        0.75, abs=1e-3
    )


def rows_of(output):
    (output.parent / "output").unlink(missing_ok=True)
    (output.parent / "output").symlink_to(output)
    return rows(output.parent)


def test_launched_colt_trains_on_its_part(tmp_path, monkeypatch):
    script = unmodified(TRAIN).replace("losses.append", "assert set(target.tolist()) <= {0, 1, 2, 3, 4}; losses.append")
    script = script.replace("num_classes=10", "num_classes=4").replace("{0, 1, 2, 3, 4}", "{0, 1}")
    launcher = Launcher(None, "colt", {"sparsity": 0.5, "prune_rate": 0.5}, tmp_path / "search")
    task = launched(tmp_path, monkeypatch, launcher, "--epochs", "1", script=script)
    assert (task.run.name, task.run.step) == ("round_00_part_0", 2)
    assert (tmp_path / "search/round_00_part_0/run.json").exists()
    launcher = Launcher(None, "colt", {"sparsity": 0.5, "prune_rate": 0.5}, tmp_path / "other")
    with pytest.raises(tt.SettingError, match="leave out --use-multi-epochs-loader"):
        launched(tmp_path, monkeypatch, launcher, "--use-multi-epochs-loader", script=script)


SCRIPTS = {
    "nothing": "print('trained')",
    "no task": "import torch, timm\nfrom timm.optim import create_optimizer_v2\n"
    "create_optimizer_v2(timm.create_model('test_resnet'), 'sgd')",
    "own optimizer": "import torch, timm\nfrom timm.task import ClassificationTask\n"
    "task = ClassificationTask(timm.create_model('test_resnet'), torch.nn.CrossEntropyLoss())\n"
    "torch.optim.SGD(task.parameters(), 0.1)\ntask(torch.randn(2, 3, 32, 32), torch.tensor([0, 1]))",
    "outline": unmodified(TRAIN),
}


@pytest.mark.parametrize(
    ("script", "args", "said"),
    [
        ("nothing", ["--ticket", "model.ticket"], "trained no ticket, for it made no training task of timm.task"),
        ("no task", ["--ticket", "model.ticket"], "makes its optimizer before any training task"),
        ("own optimizer", ["--ticket", "model.ticket"], "no optimizer by timm.optim.create_optimizer_v2"),
        ("nothing", [], "either --ticket FILE"),
        ("nothing", ["--ticket", "no.ticket"], "there is no ticket at no.ticket"),
        ("nothing", ["--pruner", "gradul"], "did you mean 'gradual'"),
        ("nothing", ["--pruner", "gradual"], "pruner.sparsity: is not set"),
        ("absent", ["--ticket", "model.ticket"], "there is no file"),
        ("outline", ["--pruner", "gradual", "--set", "sparsity=0.5", "--set", "epochs=7"], "schedule has 3.*with 7"),
        ("outline", ["--pruner", "imp", "--set", "sparsity=0.5"], "imp needs 4 trainings.*--folder"),
        ("outline", ["--pruner", "snip", "--set", "sparsity=0.5"], "reads the gradients"),
        ("outline", ["--pruner", "imp", "--set", "sparsity=0.5", "--set", "rewind=3it", "--folder", "s"], "'1ep'"),
        ("outline", ["--ticket", "model.ticket", "--folder", "s"], "folder: is a pruner's setting"),
        ("outline", ["--ticket", "model.ticket", "--start", "mine"], "'mine' is not valid"),
    ],
)
def test_the_launcher_never_trains_something_else_in_silence(script, args, said, tmp_path, monkeypatch):
    saved(tmp_path)
    run_script("'--data-dir'", monkeypatch, tmp_path)
    if script in SCRIPTS:
        (tmp_path / "script.py").write_text(SCRIPTS[script])
    done = call("run", *args, "script.py")
    assert done.exit_code == 2
    error = done.stderr.split("error: ")[1]
    assert re.search(said, error, re.DOTALL), error
    assert not (tmp_path / "output" / "summary.csv").exists()


def test_what_a_launched_script_raises_is_its_own(tmp_path, monkeypatch):
    saved(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "script.py").write_text("import sys\nraise ValueError(sys.argv)")
    done = call("run", "--ticket", "model.ticket", "script.py", "--epochs", "3", "--ticket")
    assert isinstance(done.exception, ValueError)
    assert done.exception.args[0] == ["script.py", "--epochs", "3", "--ticket"]


def test_epochs_are_those_of_the_script():
    with pytest.raises(tt.SettingError, match=r"epochs=args\.epochs"):
        of(fresh(), pruner="gradual", sparsity=0.5)
    assert of(fresh(), pruner="magnitude", sparsity=0.5).run is None
    model = fresh()
    pruner = tt.create_pruner("gradual", model, sparsity=0.5)
    with pytest.raises(tt.SettingError, match="trains 4 and the pruner was created for 20; create it with epochs=4"):
        of(model, pruner=pruner, epochs=4)


def test_the_launcher_counts_warmup_and_cooldown(tmp_path, monkeypatch):
    script = unmodified(TRAIN).replace("args = parser", "parser.set_defaults(warmup_prefix=True)\nargs = parser")
    launcher = Launcher(None, "gradual", {"sparsity": 0.5})
    args = ("--epochs", "1", "--warmup-epochs", "1", "--cooldown-epochs", "1")
    task = launched(tmp_path, monkeypatch, launcher, *args, script=script)
    assert (task.run.schedule_epochs, len(rows(tmp_path))) == (3, 3)


def test_a_run_that_ends_too_early_says_what_it_has_reached(tmp_path, caplog):
    task = of(fresh(), pruner="gradual", sparsity=0.8, interval=1, epochs=10, folder=tmp_path)
    trained(task, steps=8)
    reached = f"{task.sparsity:.4f}"
    with pytest.raises(tt.TrainingError, match=f"ended at epoch 4 of 10, at sparsity {reached} of the asked 0.8"):
        task.check_end()
    assert not caplog.messages
    task = of(fresh(), pruner="gradual", sparsity=0.8, interval=1, epochs=10)
    trained(task, steps=8)
    del task
    gc.collect()
    assert [f"ended at epoch 4 of 10, at sparsity {reached} of the asked 0.8" in said for said in caplog.messages] == [
        True
    ]


@pytest.mark.parametrize("more", [0, 1])
def test_a_run_is_written_down_however_many_epochs_follow(more, tmp_path, caplog):
    task = of(fresh(), pruner="imp", **IMP, epochs=2, folder=tmp_path)
    trained(task, steps=4 + 2 * more)
    task.get_checkpoint_state()
    task.check_end()
    assert (tmp_path / "round_00" / "run.json").exists()
    assert of(fresh(), pruner="imp", **IMP, epochs=2, folder=tmp_path).run.name == "round_01"


@pytest.mark.parametrize("resumed", [False, True])
def test_timms_best_is_of_the_asked_sparsity(resumed, tmp_path):
    def begun():
        task = of(fresh(), pruner="gradual", sparsity=0.8, epochs=4)
        optimizer = torch.optim.SGD(task.get_trainable_module().parameters(), 0.1)
        saver = CheckpointSaver(
            task.trainable_module, optimizer, checkpoint_dir=str(tmp_path), task=task, max_history=2
        )
        return task, saver

    def best():
        return torch.load(tmp_path / "model_best.pth.tar", weights_only=True)["epoch"]

    task, saver = begun()
    for epoch, metric in enumerate((80, 90)):
        saver.save_checkpoint(epoch, metric)
    assert best() == 1
    if resumed:
        history = saver.checkpoint_files, saver.best_metric, saver.best_epoch
        state = task.get_checkpoint_state()
        task, saver = begun()
        task.load_checkpoint_state(state["state_dict"], state["task_state"])
        saver.checkpoint_files, saver.best_metric, saver.best_epoch = history  # as timm 1.0.31 does
    sparse = tt.create_pruner("random", fresh(), sparsity=0.8).ticket.masks
    task.subnet.set_mask_(sparse)
    assert saver.save_checkpoint(2, 10) == (10, 2)
    assert best() == 2
    assert saver.save_checkpoint(3, 20) == (20, 3)
    assert saver.save_checkpoint(4, 15) == (20, 3)
    assert best() == 3
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-3.pth.tar", "checkpoint-4.pth.tar"}


@pytest.mark.parametrize(
    ("then", "now", "said"),
    [
        (
            {"pruner": "gradual", "sparsity": 0.6},
            {"pruner": "gradual", "sparsity": 0.7},
            "sparsity: 0.6 there, 0.7 now",
        ),
        ({"pruner": "set", "sparsity": 0.6}, {"pruner": "rigl", "sparsity": 0.6}, "name: set there, rigl now"),
        ({"pruner": "set", "sparsity": 0.6}, {"ticket": True}, "there, None now"),
        ({"ticket": True}, {"pruner": "magnitude", "sparsity": 0.7}, "name: None there, magnitude now"),
    ],
)
def test_resuming_compares_what_is_trained(then, now, said, tmp_path):
    def begun(given):
        given = {"ticket": saved(tmp_path)} if "ticket" in given else given | {"epochs": 3}
        return of(fresh(), **given)

    state = begun(then).get_checkpoint_state()
    with pytest.raises(tt.SettingError, match=said):
        begun(now).load_checkpoint_state(state["state_dict"], state["task_state"])
    begun(then).load_checkpoint_state(state["state_dict"], state["task_state"])
    if then.get("pruner") == "magnitude":
        of(fresh(), **then, epochs=5).load_checkpoint_state(state["state_dict"], state["task_state"])


def test_whose_weights_a_training_starts_from(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    path = saved(tmp_path)
    ticket, own = tt.load_ticket(path), fresh().state_dict()
    of(model := fresh(), ticket=path)
    assert torch.equal(model.state_dict()["fc.weight"], ticket.values["fc.weight"])
    assert "from the ticket's weights" in caplog.messages[-1]
    of(model := fresh(), ticket=path, start="model")
    assert torch.equal(model.state_dict()["fc.weight"], own["fc.weight"])
    assert all(torch.equal(model.state_dict()[name] != 0, mask) for name, mask in ticket.masks.items())
    assert "from the model's own weights" in caplog.messages[-1]
    with pytest.raises(tt.TicketError, match="transfer_"):
        of(fresh(classes=3), ticket=path)
    of(model := fresh(classes=3), ticket=path, start="transfer")
    assert all(torch.equal(model.state_dict()[name] != 0, mask) for name, mask in ticket.masks.items())
    assert torch.equal(model.state_dict()["conv1.0.weight"], ticket.values["conv1.0.weight"])


def test_a_ticket_goes_on_split_normalisation_and_back(tmp_path):
    ticket = tt.load_ticket(saved(tmp_path))
    plain = ticket.apply_(fresh())
    split = ticket.apply_(convert_splitbn_model(fresh(), 3))
    expected = convert_splitbn_model(plain, 3).state_dict()
    assert any(".aux_bn.1." in name for name in expected)
    assert all(torch.equal(value, expected[name]) for name, value in split.state_dict().items())
    found = tt.Ticket.of(split, ticket.masks)
    again = found.apply_(fresh())
    assert all(torch.equal(value, split.state_dict()[name]) for name, value in again.state_dict().items())
    two = found.apply_(convert_splitbn_model(fresh(), 2))
    assert [name for name in expected if ".aux_bn.1." not in name] == list(two.state_dict())


@pytest.mark.skipif(not hasattr(ClassificationTask, "create_evaluator"), reason="timm before 1.0.31 has no evaluators")
def test_the_evaluator_has_the_sparsity(tmp_path):
    evaluator = of(fresh(), ticket=saved(tmp_path)).create_evaluator()
    evaluator.update(torch.randn(8, 10), torch.arange(8))
    assert evaluator.compute()["sparsity"] == pytest.approx(0.7, abs=1e-4)
