"""Our lines in the scripts of tests/scripts/, each as a user would write it.

In a script, ``# +`` ends a line that was added and ``# was:`` a line that was changed, followed by what it was.
"""

from pathlib import Path

import pytest
import timm
import torch
from outline import SCRIPTS, TRAIN, checkpoint_of, rows, run_script, save_ticket, unmodified
from support import started
from timm.task import ClassificationTask
from timm.utils import CheckpointSaver, ModelEmaV3

import timm_tickets as tt

LOOPS = [name for name in SCRIPTS if name != "train"]


@pytest.fixture
def zeros_at_the_end(monkeypatch):
    """Counts the runs that ended with pruned weights, all of them zero before anything set them so."""
    counted = []
    finish = tt.Training.finish_

    def checked(run):
        for name, mask in run.subnet.mask.items():
            assert not run.subnet.model.get_parameter(name)[~mask].any(), f"{run.name}: {name}"
        counted.append(run.sparsity)
        return finish(run)

    monkeypatch.setattr(tt.Training, "finish_", checked)
    return counted


def test_the_plain_loop_has_at_most_six_added_lines():
    lines = SCRIPTS["plain"].splitlines()
    added, changed = sum(line.endswith("# +") for line in lines), sum("# was: " in line for line in lines)
    assert (added, changed) == (5, 2)
    assert "timm_tickets" not in unmodified(SCRIPTS["plain"])


def test_the_page_names_every_script():
    page = (Path(__file__).parent.parent / "docs" / "your_loop.md").read_text()
    assert not [name for name in LOOPS if name != "plain" and f"`{name}.py`" not in page]


@pytest.mark.parametrize("name", LOOPS)
def test_sparsity_0_changes_no_bit_and_more_leaves_exact_zeros(name, tmp_path, monkeypatch, zeros_at_the_end):
    script = SCRIPTS[name]
    assert 'backend="eager"' in script or name != "compiled"
    plain = run_script(unmodified(script), monkeypatch, tmp_path / "plain")
    assert len(plain["losses"]) >= 8
    dense = run_script(script.replace("sparsity=0.75", "sparsity=0"), monkeypatch, tmp_path / "dense")
    assert dense["losses"] == plain["losses"]
    assert dense["pruner"].sparsity == 0
    sparse = run_script(script, monkeypatch, tmp_path / "sparse")
    assert len(sparse["losses"]) >= len(plain["losses"])
    assert max(zeros_at_the_end) > 0.4
    ticket = tt.load_ticket(tmp_path / "sparse" / "model.ticket")
    assert ticket.sparsity == pytest.approx(0.75, abs=1e-4)
    if name == "ema":
        averaged = torch.load(tmp_path / "sparse" / "ema.pth", weights_only=True)
        assert all(not averaged[layer][~mask].any() for layer, mask in ticket.masks.items())
        assert all(averaged[layer][mask].all() for layer, mask in ticket.masks.items())
        mine = torch.load(tmp_path / "dense" / "ema.pth", weights_only=True)
        theirs = torch.load(tmp_path / "plain" / "ema.pth", weights_only=True)
        assert all(torch.equal(mine[key], theirs[key]) for key in theirs)


STOP = """
class Stop(list):
    def append(self, loss):
        super().append(loss)
        if pruner.run.index == 1 and len(self) == 14:
            raise SystemExit(0)
losses = Stop()
"""


def test_a_search_stopped_within_a_run_goes_on_in_another_process(tmp_path, monkeypatch):
    script = SCRIPTS["accelerated"]
    whole = run_script(script, monkeypatch, tmp_path / "whole")
    assert len(whole["losses"]) == 16
    folder = tmp_path / "stopped"
    folder.mkdir()
    # Stopped after 6 batches of the second run; its last state is from the second of the 4 of its first epoch.
    stopped = script.replace("losses = []", STOP)
    # The model that the second process creates is another; the search's own start counts. The order is the script's.
    resumed = script.replace("model = timm", "torch.manual_seed(1)\nmodel = timm")
    resumed = resumed.replace("losses = []", "torch.manual_seed(0)\nlosses = []")
    for code in (stopped, resumed + "torch.save(losses, 'losses.pt')"):
        done = started.run("-c", code, cwd=folder)
        assert done.returncode == 0, done.stderr
    saved = torch.load(folder / "state" / "round_01" / "custom_checkpoint_0.pkl", weights_only=True)
    assert saved["run"] == "round_01"
    assert torch.load(folder / "losses.pt", weights_only=True) == whole["losses"][-6:]
    one, other = (tt.load_ticket(where / "model.ticket") for where in (tmp_path / "whole", folder))
    assert one.fingerprint == other.fingerprint
    for run in ("round_00", "round_01"):
        one, other = (
            timm.models.load_state_dict(str(where / "search" / run / "model.safetensors"))
            for where in (tmp_path / "whole", folder)
        )
        assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.filterwarnings("ignore:.*been through a pruner")
def test_a_checkpoint_of_a_pruner_belongs_to_one_run(model, tmp_path):
    pruner = tt.create_pruner("imp", model, sparsity=0.75, prune_rate=0.5, folder=tmp_path)
    assert pruner.state_dict() == {"run": None}
    pruner.load_state_dict({"run": None})
    run = next(pruner)
    saved = pruner.state_dict()
    with pytest.raises(RuntimeError, match=r"after `run\.attach"):
        pruner.load_state_dict(saved)
    run.attach(torch.optim.SGD(model.parameters(), 0.1))
    with pytest.raises(ValueError, match="from within round_07, the search is at round_00"):
        pruner.load_state_dict(saved | {"run": "round_07"})
    homeless = tt.create_pruner("imp", model, sparsity=0.75, prune_rate=0.5)
    next(homeless)
    with pytest.raises(tt.SettingError, match="create the pruner with a folder"):
        homeless.state_dict()
    # One run: its start goes into the checkpoint.
    single = tt.create_pruner("imp", model, sparsity=0.75, prune_rate=0.75)
    next(single).attach(torch.optim.SGD(model.parameters(), 0.1))
    saved = single.state_dict()
    with torch.no_grad():
        model.fc.bias.add_(1)
    other = tt.create_pruner("imp", model, sparsity=0.75, prune_rate=0.75)
    next(other).attach(torch.optim.SGD(model.parameters(), 0.1))
    other.load_state_dict(saved)
    assert torch.equal(other.subnet.start["fc.bias"], single.subnet.start["fc.bias"])


ATTACH = "optimizer, loader_train = task.attach(optimizer, loader_train)  # +\n"
TICKET = 'ticket="model.ticket"'
PRUNERS = {
    "gradual": 'pruner="gradual", sparsity=0.7, interval=2, epochs=args.epochs',
    "set": 'pruner="set", sparsity=0.7, interval=2, epochs=args.epochs',
    "magnitude": 'pruner="magnitude", sparsity=0.7',
}
IMP = 'pruner="imp", sparsity=0.75, prune_rate=0.5, epochs=args.epochs, folder="search"'


def training(what):
    return TRAIN.replace(TICKET, what)


def test_the_task_adds_the_lines_that_the_page_names():
    lines = [line.strip().removesuffix("# +").strip() for line in TRAIN.splitlines() if line.endswith("# +")]
    assert len(lines) == 4
    assert "# was: " not in TRAIN
    page = (Path(__file__).parent.parent / "docs" / "timm_train.md").read_text()
    assert not [line for line in lines if line.partition(", ticket=")[0] not in page]


@pytest.mark.parametrize("name", ["gradual", "set", "magnitude"])
def test_a_task_at_sparsity_0_changes_no_bit(name, tmp_path, monkeypatch):
    plain = run_script(unmodified(TRAIN), monkeypatch, tmp_path / "plain")
    dense = run_script(training(PRUNERS[name].replace("0.7", "0")), monkeypatch, tmp_path / "dense")
    assert plain["losses"] == dense["losses"]
    assert [row | {"eval_sparsity": "0.0"} for row in rows(tmp_path / "plain")] == rows(tmp_path / "dense")
    assert len(rows(tmp_path / "plain")) == 3
    one, other = checkpoint_of(tmp_path / "plain"), checkpoint_of(tmp_path / "dense")
    for key in ("state_dict", "state_dict_ema"):
        assert list(one[key]) == list(other[key])
        assert all(torch.equal(one[key][name], other[key][name]) for name in one[key])


@pytest.mark.parametrize("name", ["ticket", "gradual", "set", "magnitude", "set attached late"])
def test_a_task_stopped_and_resumed_ends_as_one_that_was_not(name, tmp_path, monkeypatch):
    code = training(PRUNERS.get(name.split()[0], TICKET))
    if "late" in name:  # timm's order of resuming and building has changed between its versions
        assert ATTACH in code
        code = code.replace(ATTACH, "").replace("scheduler, num_epochs", f"{ATTACH}scheduler, num_epochs")
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    for folder in (whole, stopped):
        save_ticket(folder)
    task = run_script(code, monkeypatch, whole)["task"]
    save = CheckpointSaver.save_checkpoint

    def killed(saver, epoch, metric=None):
        save(saver, epoch, metric)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointSaver, "save_checkpoint", killed)
        with pytest.raises(KeyboardInterrupt):
            run_script(code, monkeypatch, stopped)
    assert len(rows(stopped)) == 1
    last = "output/last.pth.tar"
    # The checkpoint's weights and masks count, not those of the model that is created now.
    again = code.replace("model = timm", "torch.manual_seed(1)\nmodel = timm")
    resumed = run_script(again, monkeypatch, stopped, "--resume", last)["task"]
    assert rows(stopped) == rows(whole)
    assert float(rows(whole)[-1]["eval_sparsity"]) == pytest.approx(0.7, abs=1e-4)
    assert task.subnet.mask.keys() == resumed.subnet.mask.keys()
    for layer, mask in task.subnet.mask.items():
        assert torch.equal(mask, resumed.subnet.mask[layer])
    one, other = checkpoint_of(whole), checkpoint_of(stopped)
    for key in ("state_dict", "state_dict_ema"):
        for tensor, value in one[key].items():
            assert torch.equal(value, other[key][tensor])
        for layer, mask in task.subnet.mask.items():
            assert not one[key][layer][~mask].any()


def test_the_checkpoint_is_one_of_timms(tmp_path, monkeypatch):
    save_ticket(tmp_path)
    names = run_script(training(PRUNERS["gradual"]), monkeypatch, tmp_path)
    task, path = names["task"], str(tmp_path / "output" / "last.pth.tar")
    image = torch.randn(4, 3, 32, 32)
    plain = timm.create_model("test_resnet", num_classes=10)
    checkpoint = checkpoint_of(tmp_path)
    assert list(checkpoint["state_dict"]) == list(checkpoint["state_dict_ema"]) == list(plain.state_dict())
    assert set(checkpoint["task_state"]) == {"run", "what", "finished", "progress"}
    for use_ema in (False, True):
        expected = task.get_eval_model(ema=use_ema).eval()(image)
        timm.models.load_checkpoint(plain, path, use_ema=use_ema)
        assert torch.equal(plain.eval()(image), expected)
    # `--initial-checkpoint` and validate.py's `--checkpoint`; they take the averaged weights where there are any.
    created = timm.create_model("test_resnet", num_classes=10, checkpoint_path=path)
    assert torch.equal(created.eval()(image), task.get_eval_model(ema=True)(image))
    # `--pretrained --pretrained-path`
    overlay = {"file": path, "num_classes": 10}
    created = timm.create_model("test_resnet", pretrained=True, num_classes=10, pretrained_cfg_overlay=overlay)
    assert torch.equal(created.eval()(image), task.get_eval_model(ema=True)(image))


def test_runs_of_a_search_are_chained_by_its_folder(tmp_path, monkeypatch):
    code = training(IMP).replace("default=3", "default=2")
    sparsities, runs, final = [], [], tmp_path / "search" / "final.ticket"
    for call in range(3):
        assert final.exists() == (call == 2)
        task = run_script(code.replace('"output"', f'"output{call}"'), monkeypatch, tmp_path)["task"]
        runs.append(task.run and task.run.name)
        sparsities.append(round(task.sparsity, 3))
    assert runs == ["round_00", "round_01", None]
    assert sparsities == [0, 0.5, 0.75]
    # As in one loop of one's own: the same trainings, one after the other.
    last = timm.models.load_state_dict(str(tmp_path / "output0" / "last.pth.tar"), use_ema=False)
    written = timm.models.load_state_dict(str(tmp_path / "search" / "round_00" / "model.safetensors"))
    assert all(torch.equal(last[key], written[key]) for key in written)
    assert _same(tt.load_ticket(final).masks, task.pruner.ticket.masks)
    assert tt.load_ticket(final).fingerprint == task.pruner.ticket.fingerprint
    with pytest.raises(tt.SettingError, match="run: round_00 there, None now"):
        run_script(code, monkeypatch, tmp_path, "--resume", str(tmp_path / "output0" / "last.pth.tar"))


def test_what_a_task_cannot_train_is_refused(model, tmp_path):
    with pytest.raises(tt.SettingError, match="either a ticket"):
        tt.TicketTask(model)
    for name, what in (
        ("imp", "folder: imp needs"),
        ("edge_popup", "learns its masks"),
        ("snip", "reads the gradients"),
    ):
        fresh = timm.create_model("test_resnet", num_classes=10)
        with pytest.raises(tt.SettingError, match=what):
            tt.TicketTask(fresh, pruner=tt.create_pruner(name, fresh, sparsity=0.5))
    with pytest.raises(tt.SettingError, match="another model"):
        tt.TicketTask(
            timm.create_model("test_resnet", num_classes=10), pruner=tt.create_pruner("random", model, sparsity=0.5)
        )


def test_a_task_that_holds_no_mask_does_not_train(model, tmp_path):
    save_ticket(tmp_path)
    task = tt.TicketTask(model, ticket=tmp_path / "model.ticket", verbose=False).train()
    with pytest.raises(RuntimeError, match=r"task\.attach"):
        task(torch.randn(2, 3, 32, 32), torch.tensor([0, 1]))
    assert task.eval()(torch.randn(2, 3, 32, 32), torch.tensor([0, 1]))["loss"] > 0
    other = timm.create_model("test_resnet", num_classes=10)
    gradual = tt.TicketTask(other, pruner=tt.create_pruner("gradual", other, sparsity=0.5), verbose=False)
    with pytest.raises(tt.SettingError, match="loader: it has no length"):
        gradual.attach(torch.optim.SGD(other.parameters(), 0.1), iter(()))


def test_a_checkpoint_of_another_training_is_refused(model, tmp_path):
    for name, sparsity in (("one.ticket", 0.5), ("other.ticket", 0.6)):
        save_ticket(tmp_path, name, sparsity)
    one, other = (tt.TicketTask(model, ticket=tmp_path / f"{name}.ticket", verbose=False) for name in ("one", "other"))
    saved = one.get_checkpoint_state()
    with pytest.raises(tt.SettingError, match=r"ticket: [0-9a-f]+ there"):
        other.load_checkpoint_state(saved["state_dict"], saved["task_state"])
    dense = ClassificationTask(model, criterion=torch.nn.CrossEntropyLoss(), verbose=False).get_checkpoint_state()
    with pytest.raises(tt.SettingError, match="--initial-checkpoint"):
        one.load_checkpoint_state(dense["state_dict"], dense.get("task_state"))


@pytest.fixture
def one_process(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("pruner", [None, "set"])
def test_a_task_compiled_and_distributed_by_timm_holds_its_masks(model, tmp_path, pruner):
    save_ticket(tmp_path)
    if pruner is None:
        task = tt.TicketTask(model, ticket=tmp_path / "model.ticket", verbose=False)
    else:
        settings = {"sparsity": 0.7, "interval": 1, "epochs": 3}
        task = tt.TicketTask(model, pruner=tt.create_pruner(pruner, model, **settings), verbose=False)
    assert isinstance(task.setup_ema(decay=0.5), ModelEmaV3)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    task.compile(backend="eager")
    task.prepare_distributed()
    data = torch.utils.data.TensorDataset(torch.randn(8, 3, 32, 32), torch.arange(8))
    optimizer, loader = task.attach(optimizer, torch.utils.data.DataLoader(data, batch_size=4))
    begun = task.subnet.mask
    for epoch in range(3):
        for images, labels in loader:
            task.train()(images, labels)["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
            task.update_ema(epoch)
    assert _same(begun, task.subnet.mask) == (pruner is None)
    for key in ("state_dict", "state_dict_ema"):
        state = task.get_checkpoint_state(ema=key == "state_dict_ema")[key]
        assert list(state) == list(timm.create_model("test_resnet", num_classes=10).state_dict())
        assert all(not state[layer][~mask].any() for layer, mask in task.subnet.mask.items())


def _same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)
