"""Typical mistakes: what is typed, and what is said. Each answer names the setting, what was found and what to do."""

import inspect
import warnings

import pytest
import timm
import torch
import typer
from support.commands import call
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import timm_tickets as tt
from timm_tickets.training.trainer import Trainer

# Typer's answer to a command that is not there; 0.15.4 only says so.
SUGGESTS = "suggest_commands" in inspect.signature(typer.Typer).parameters


def model(name="test_resnet", **arguments):
    return timm.create_model(name, **{"num_classes": 10, **arguments})


def sgd(one):
    return torch.optim.SGD(one.parameters(), lr=0.1)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A working directory with a recipe, a ticket, trained weights in two formats, and a folder of one ticket."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A ticket, and trained weights in two formats, in a folder."""
    where = tmp_path_factory.mktemp("files")
    torch.save(model().state_dict(), where / "model.pth")
    tt.create_pruner("magnitude", model(), sparsity=0.5).ticket.save(where / "one.ticket")
    from safetensors.torch import save_file

    save_file(model("test_vit").state_dict(), where / "vit.safetensors")
    return where


WHOLE = "name: mine\nmodel: {model: test_resnet}\npruner: {name: imp, sparsity: 0.5}\n"
OTHER = "name: mine\nextends: digits_imp\n"

# Settings over those of digits_imp, and the words of the answer.
SETTINGS = [
    # the pruner's
    ("pruner.sparsity=95", "pruner.sparsity: 95 is not valid; it must be less than 1; 95 % is 0.95"),
    ("pruner.sparsity=95%", "pruner.sparsity: '95%' is not valid; it must be a number; 95 % is 0.95"),
    ("pruner.sparsity=1", "pruner.sparsity: 1 is not valid; it must be less than 1"),
    ("pruner.name=IMP", "'IMP' is unknown; did you mean 'imp'? Valid: colt, continuous_sparsification"),
    ("pruner.name=impp", "'impp' is unknown; did you mean 'imp'?"),
    ("pruner=imp", "pruner: 'imp' is not valid; it must be settings by name, such as pruner.name"),
    ("pruner.rewind=2", "pruner.rewind: '2' is not valid; write epochs as '2ep' or optimizer steps as '500it'"),
    ("pruner.rewind=2epochs", "'2epochs' is not valid; write epochs as '2ep'"),
    ("pruner.partitions=2", "pruner: 'partitions' is unknown; it is a setting of colt, not of imp; leave it out"),
    ("pruner.exclude=[layr*]", "exclude: 'layr*' matches none of the 15 prunable weights, which are named like"),
    ("pruner.exclude=*.convolution*", "exclude: '*.convolution*' matches none"),
    ("pruner.scope=local", "pruner.scope: 'local' is not valid; it must be 'global' or 'layerwise'"),
    # settings that are elsewhere, or nowhere
    ("sparsity=0.9", "setting: 'sparsity' is unknown; did you mean pruner.sparsity?"),
    ("training.workers=2", "training: 'workers' is unknown; did you mean data.workers?"),
    ("training.learning_rate=0.1", "'learning_rate' is unknown; did you mean training.lr?"),
    ("training.device=cuda", "training: 'device' is unknown; Accelerate takes a GPU where there is one"),
    ("training.epochs 1", "--set: 'training.epochs 1' is not valid; write key=value"),
    # the training's
    ("training.epochs=0", "training.epochs: 0 is not valid; it must be greater than or equal to 1"),
    ("training.epochs=1.5", "training.epochs: 1.5 is not valid; it must be a whole number"),
    ("training.lr=-1", "training.lr: -1 is not valid; it must be greater than 0"),
    ("training.lr=0,1", "training.lr: '0,1' is not valid; it must be a number"),
    ("training=lr", "training: 'lr' is not valid; it must be settings by name, such as training.epochs"),
    ("training.opt=adamm", "training.opt: optimizer: 'adamm' is unknown; did you mean 'adam'"),
    ("training.opt_args.nope=3", "training cannot be built as the recipe says: TypeError"),
    ("training.sched=cos", "training.sched: schedule: 'cos' is unknown; did you mean 'cosine'"),
    ("training.sched=wsd", "training.sched cannot be built"),
    ("training.amp=bfloat16", "training.amp: 'bfloat16' is not valid; it must be true or false"),
    ("training.amp_dtype=fp16", "training.amp_dtype: 'fp16' is not valid; it must be 'float16' or 'bfloat16'"),
    ("training.amp=true", "training.amp_dtype: float16 needs a GPU; set bfloat16, or training.amp=false"),
    ("training.torchcompile=nope", "training cannot be built"),
    ("training.clip_mode=max", "training.clip_mode: 'max' is not valid; it must be 'norm', 'value' or 'agc'"),
    ("retrain.tweaks=[label_smoothin]", "tweak: 'label_smoothin' is unknown; did you mean 'label_smoothing'"),
    # the model's
    ("model=test_vit", "model: 'test_vit' is not valid; it must be settings by name, such as model.model"),
    ("model.model=ResNet18", "model.model: architecture: 'ResNet18' is unknown; did you mean 'resnet18'?"),
    ("model.model_kwargs.widht=3", "model: 'test_resnet' cannot be built as the recipe says: TypeError"),
    ("model.num_classes=3", "model.num_classes: 3 is too few; the data has 10 classes"),
    ("model.in_chans=4", "data.input_img_mode: the images' mode RGB has 3 channels, and the model takes 4"),
    ("model.initial_checkpoint=x.pth", "model.initial_checkpoint: there is no file 'x.pth' in "),
    ("model.initial_checkpoint=.", "model.initial_checkpoint: '.' is a folder; name the file in it"),
    # the data's
    ("data.mean=[.3,.3]", "data.mean: has 2 values (0.3, 0.3), and the model takes 3 channels; give one value for"),
    ("data.std=[.3,.3]", "data.std: has 2 values (0.3, 0.3)"),
    ("data.mean=0.3", "data.mean: 0.3 is not valid; it must be a list, such as [0.3]"),
    ("data.in_chans=1", "data.in_chans: images of 1 channels cannot be had, as the model takes 3; leave it out"),
    ("data.num_classes=3", "data.num_classes: 3 is too few; the labels go up to 9"),
    ("data.img_size=[32,32]", "data.img_size: [32, 32] is not valid; it must be a whole number"),
    ("data.val_fraction=10", "data.val_fraction: 10 is not valid; it must be less than 1; 10 % is 0.1"),
    ("data.val_fraction=0.001", "data.val_fraction: 0.001 of 1437 images in 10 classes cannot be held out evenly"),
    ("data.train_split=val", "data.train_split: 'val' is unknown; Valid: test, train"),
    ("data.aa=nonsense", "data cannot be built as the recipe says"),
    ("data.data_dir=/images", "data.data_dir: '/images' would not be read, as the dataset 'digits' is embedded; set"),
    ("data.dataset=cifar10", "data.data_dir: is not set; dataset 'cifar10' is read from a folder that has one for"),
    ("data.dataset=CIFAR-10", "Did you mean 'torch/cifar10'?"),
    ("data.dataset=torch/cifar10", "data.data_dir: is not set, and torch/cifar10 is read from there; give a folder"),
    # the rest
    ("seed=-1", "seed: -1 is not valid; it must be greater than or equal to 0"),
    ("dense=false", "setting: 'dense' is unknown; it is one of the controls: controls=[] is what dense=false was"),
    ("name=a/b", "name: 'a/b' cannot name a folder; use letters, digits"),
    ("output=/proc/x", "output: the folder /proc/x cannot be made (No such file or directory); choose another one"),
    ("output=/dev/null/x", "cannot write /dev/null/x/recipe.yaml: Not a directory; nothing written before is lost"),
]


@pytest.mark.parametrize(("override", "words"), SETTINGS, ids=[override for override, _ in SETTINGS])
def test_a_wrong_setting(override, words):
    refused(["search", "digits_imp", "--set", override], words)


def refused(args, words, code=2):
    out = call(*args)
    assert out.exit_code == code, out.output
    assert words in out.stderr
    assert "Traceback" not in out.output
    return out


COMMANDS = [
    ("search digit_imp", "recipe: 'digit_imp' is unknown; did you mean 'digits_imp'"),
    ("search mine", "recipe: 'mine' is unknown; did you mean 'mine.yaml'?"),
    ("search mien.yaml", "recipe: there is no file 'mien.yaml'; did you mean 'mine.yaml'? Or give one that"),
    ("search nowhere/mine.yaml", "recipe: there is no file 'nowhere/mine.yaml'; give one that `timm-tickets recipe"),
    ("search .", "recipe: '.' is a folder, with mine.yaml in it"),
    ("search one.ticket", "one.ticket is not a recipe: it is no text in UTF-8; a ticket goes behind the recipe"),
    ("search digits_jackpot", "in {folder}; run `timm-tickets search digits_imp` first, in the same working directory"),
    ("search digits_imp --seeds 0-2", "seeds: '0-2' is not valid; give numbers with commas between, such as 0,1,2"),
    ("search digits_imp --seeds 1,1", "seeds: 1, 1 is not valid; give two different numbers or more"),
    ("search digits_imp --set model.model=test_vit --set data.img_size=33", "data.img_size: images of 33 x 33 pixels "
     "do not go through test_vit: Input height (33) should be divisible by patch size (16)"),
    ("search digits_imp --set model.initial_checkpoint=one.ticket", "'one.ticket' is no state dict of this model"),
    ("search digits_imp --set model.initial_checkpoint=vit.safetensors", "of this model with 10 classes: Error(s) in"),
    ("train digits_imp --ticket nowhere.ticket", "there is no ticket at nowhere.ticket"),
    ("train digits_imp --ticket .", ". is a folder and no ticket; name the one in it: one.ticket"),
    ("train digits_imp --ticket model.pth", "model.pth is a PyTorch checkpoint and not a ticket. Trained weights go"),
    ("train digits_imp --ticket one.ticket --set model.model=test_vit", "this ticket is for 'test_resnet', the model"),
    ("info vit.safetensors", "is a safetensors file but not a ticket: it has no 'timm_tickets' header. Trained"),
    ("info mine.yaml", "mine.yaml is not a ticket"),
    ("compare one.ticket", "compare: one ticket cannot be compared; give two or more"),
    ("transfer digits_imp one.ticket", "one.ticket is not a recipe"),
    ("transfer one.ticket digits_imp --control denze", "control: 'denze' is unknown; did you mean 'dense'?"),
    ("push one.ticket hub", "to: 'hub' is not valid; write hf-hub:user/name, or local-dir:path for a folder"),
    ("push one.ticket hf-hub:me", "to: 'hf-hub:me' is not valid; write hf-hub:user/name"),
    ("list impp", "pruner or tweak: 'impp' is unknown; did you mean 'imp'? Valid: colt"),
    ("inspect resnet1", "architecture: 'resnet1' is unknown; did you mean 'resnet"),
    ("inspect test_resnet --set num_classes=ten", "architecture: 'test_resnet' cannot be built with {{'num_classes': "
     "'ten'}}: TypeError"),
    ("inspect test_resnet --set num_classes", "--set: 'num_classes' is not valid; write key=value"),
    (f"inspect test_resnet --set a={'[' * 3000}", "they are more than 20 deep"),
    ("inspect test_resnet --include nope*", "include: 'nope*' matches none of the 15 prunable weights"),
    ("recipe nope", "recipe: 'nope' is unknown; give one that `timm-tickets recipe --list` shows"),
    ("serch digits_imp", "Did you mean 'search'?" if SUGGESTS else "No such command 'serch'"),
]  # fmt: skip


@pytest.mark.parametrize(("typed", "words"), COMMANDS, ids=[typed[:60] for typed, _ in COMMANDS])
def test_a_wrong_command(typed, words, folder, files):
    (folder / "mine.yaml").write_text(OTHER)
    for one in files.iterdir():
        (folder / one.name).symlink_to(one)
    refused(typed.split(), words.format(folder=folder))


RECIPES = [
    ("", "is not a recipe: it is empty; `timm-tickets recipe digits_imp` prints one to edit"),
    (f"{OTHER}training:\n\tlr: 0.1\n", "line 4, column 1: found character that cannot start any token; indent with sp"),
    (f"{OTHER}training:\n  lr: 0.1\n  lr: 0.2\n", "line 5, column 3: found duplicate key; name each setting once"),
    (f"{OTHER}training:\n  - lr: 0.1\n", "training holds settings by name, and not a list"),
    (f"{OTHER}training:\n  lr 0.1\n", "training: 'lr 0.1' is not valid; it must be settings by name, such as training"),
    (f"{OTHER}pruner:\n  include: *.conv*\n", "line 4, column 13: did not find expected alphabetic or numeric charact"
     "er; quote a wildcard: '*.conv*'"),
    (f"{OTHER}extend: x\n", "setting: 'extend' is unknown; did you mean extends?"),
    ("name: mine\n  model: x\n", "line 2, column 8: mapping values are not allowed in this context; indent what belo"),
    ("name: mine\nmodel:\npruner:\n", "model: is not set and has no default; set it"),
    ("name: mine\nmodel: test_resnet\npruner: imp\n", "pruner: 'imp' is not valid; it must be settings by name, such"),
    ("name: mine\nmodel: {model: test_resnet}\npruner: {name: imp}\n", "pruner.sparsity: is not set and has no defau"),
    ("name: mine\nmodel: {model: test_resnet}\npruner: {sparsity: 0.5}\n", "pruner.name: is not set; give a registere"),
    ("- name: mine\n", "it must hold settings by name, such as 'model:' and 'pruner:'"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "words"), RECIPES)
def test_a_wrong_recipe(text, words, folder):
    (folder / "mine.yaml").write_text(text)
    refused(["recipe", "mine.yaml"], words)


@pytest.mark.parametrize("include", ["'*.conv*'", "['*.conv*']"])
def test_one_wildcard_needs_no_list(include, folder):
    (folder / "mine.yaml").write_text(f"{OTHER}pruner:\n  include: {include}\n")
    assert tt.load_recipe("mine.yaml").pruner["include"] == ["*.conv*"]
    bare = include.replace("'", "")
    for one in (include, bare):
        assert tt.load_recipe("digits_imp", [f"pruner.include={one}"]).pruner["include"] == ["*.conv*"]
    assert tt.create_pruner("imp", model(), sparsity=0.5, include="*.conv*").subnet.names


@pytest.mark.parametrize("text", ["retrain: null\n", "training:\n", "data:\n", "retrain:\n"])
def test_an_empty_part_says_nothing(text, folder):
    for start in (WHOLE, OTHER):
        (folder / "mine.yaml").write_text(start)
        wanted = tt.load_recipe("mine.yaml")
        (folder / "mine.yaml").write_text(start + text)
        assert tt.load_recipe("mine.yaml") == wanted


# In one's own loop.
LOADER = DataLoader(TensorDataset(torch.zeros(20, 3, 32, 32), torch.arange(20) % 10), 10)


def searched(pruner, loss=True, loader=LOADER):
    for run in pruner:
        optimizer = run.attach(sgd(pruner.subnet.model))
        for images, labels in run.subset(loader):
            output = pruner.subnet.model(images)
            one = run.loss(nn.functional.cross_entropy, output, labels) if loss else output.sum()
            one.backward()
            optimizer.step()
            optimizer.zero_grad()
    return pruner.ticket


def imp(one=None, **settings):
    return tt.create_pruner("imp", one or model(), **{"sparsity": 0.5, "prune_rate": 0.5, "epochs": 1, **settings})


def yielding(value):
    class Own(tt.Method):
        def search(self, subnet):
            return None if value is None else iter_of(value)

    return tt.Pruner(Own(sparsity=0.5), model())


def iter_of(value):
    yield value


def ticket():
    return tt.create_pruner("magnitude", model(), sparsity=0.5).ticket


def attached(make):
    run = next(imp(one := model()))
    return run.attach(make(one))


SNIPPETS = {
    "name and model swapped": (
        lambda: tt.create_pruner(model(), "imp", sparsity=0.5),
        "model: a str is no model; write create_pruner(name, model, ...), the name first",
    ),
    "a model's name": (lambda: tt.create_pruner("imp", "resnet18", sparsity=0.5), "model: a str is no model"),
    "a model without weights": (lambda: imp(model().to("meta")), "model: its weights are on the meta device"),
    "capitals": (lambda: tt.create_pruner("IMP", model(), sparsity=0.5), "'IMP' is unknown; did you mean 'imp'?"),
    "per cent": (lambda: imp(sparsity=95), "pruner.sparsity: 95 is not valid; it must be less than 1; 95 % is 0.95"),
    "no sparsity": (lambda: tt.create_pruner("imp", model()), "pruner.sparsity: is not set and has no default"),
    "another pruner's setting": (lambda: imp(partitions=2), "it is a setting of colt, not of imp; leave it out"),
    "tweaks and model swapped": (
        lambda: tt.create_tweaks(["label_smoothing"], model()),
        "model: a list is no model; write create_tweaks(model, tweaks)",
    ),
    "one tweak": (lambda: tt.create_tweaks(model(), "label_smoothing"), "give a list of names, or settings by name"),
    "a folder that is a file": (lambda: imp(folder=__file__).ticket, "File exists; nothing written before is lost"),
    "another model's optimizer": (
        lambda: attached(lambda one: sgd(model())),
        "optimizer: it has none of this model's parameters, so it would train another model; build it from",
    ),
    "the model as optimizer": (lambda: attached(lambda one: one), "optimizer: a ResNet is no optimizer; give the one"),
    "the schedule as optimizer": (
        lambda: attached(lambda one: torch.optim.lr_scheduler.StepLR(sgd(one), 1)),
        "optimizer: a StepLR is no optimizer; give the one that you step",
    ),
    "snip without run.loss": (
        lambda: searched(tt.create_pruner("snip", model(), sparsity=0.5), loss=False),
        "round_00 is to read gradients, and does so in `run.loss`, which nobody called; take the loss from `run.loss(",
    ),
    "grasp without run.loss": (
        lambda: searched(tt.create_pruner("grasp", model(), sparsity=0.5), loss=False),
        "round_00 is to read gradients",
    ),
    "batches in a list": (
        lambda: searched(tt.create_pruner("colt", model(), sparsity=0.5), loader=list(LOADER)),
        "subset: a list does not give (image, class) for each index",
    ),
    "a method that yields a run": (
        lambda: searched(yielding(tt.Run())),
        "yields a Run, and a round is a list of runs: write `yield [Run()]` in its `search`",
    ),
    "a method that yields nothing": (lambda: searched(yielding([])), "yields an empty list, and a round is a list"),
    "a method without a yield": (lambda: searched(yielding(None)), "yields a NoneType, and a round is a list of runs"),
    "a ticket on a name": (lambda: ticket().apply_("test_resnet"), "model: a str is no model"),
    "a ticket's arguments swapped": (
        lambda: ticket().attach(sgd(model()), model()),
        "model: a SGD is no model; the model comes first, then the optimizer",
    ),
    "a ticket on another architecture": (
        lambda: ticket().apply_(model("test_vit")),
        "this ticket is for 'test_resnet', the model is 'test_vit'; create a 'test_resnet' instead",
    ),
    "a ticket on other classes": (
        lambda: ticket().apply_(model(num_classes=5)),
        "fc.weight is [10, 96] in the ticket and [5, 96] in the model; create the model with the ticket's num_classes",
    ),
    "a ticket rounded to integers": (lambda: ticket().save("x.ticket", dtype="int8"), "dtype: 'int8' is not valid"),
    "no such ticket": (lambda: tt.load_ticket("nowhere.ticket"), "there is no ticket at nowhere.ticket"),
    "neither ticket nor pruner": (
        lambda: tt.TicketTask(model=model(), criterion=nn.CrossEntropyLoss()),
        "task: give either a ticket to train, or a pruner to search with",
    ),
}


@pytest.mark.parametrize("mistake", SNIPPETS)
def test_a_mistake_in_a_loop_of_ones_own(mistake):
    """The package's own errors, which the command line shows as one message, or the operating system's."""
    run, words = SNIPPETS[mistake]
    with pytest.raises((tt.SettingError, tt.TicketError, tt.TrainingError, OSError, ValueError)) as error:
        run()
    assert words in str(error.value)
    assert type(error.value) is not KeyError


TOLD = {
    "a pruner that is not trained": (lambda: list(imp()), "round_00 ended without an optimizer step; train it on the"),
    "a ticket before the search": (lambda: imp().ticket, "imp: its search has not begun, so this is not its ticket"),
    "colt without run.loss": (
        lambda: searched(tt.create_pruner("colt", model(), sparsity=0.5, epochs=1, prune_rate=0.5), loss=False),
        "round_00_part_0 was trained without its classes alone, as nobody called `run.loss`; take the loss from",
    ),
    "a penalty without run.loss": (
        lambda: searched(tt.create_pruner("continuous_sparsification", model(), sparsity=0.5, epochs=1), loss=False),
        "round_00 was trained without the method's penalty, as nobody called `run.loss`",
    ),
    "rewinding past the end": (
        lambda: searched(imp(rewind="5ep")),
        "round_00 ended after 2 steps without passing its rewind point '5ep'; its last state is used instead",
    ),
}


@pytest.mark.parametrize("mistake", TOLD)
def test_what_goes_on_is_told(mistake):
    run, words = TOLD[mistake]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        run()
    assert any(words in str(one.message) for one in told), [str(one.message) for one in told]


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("training.batch_size=5000", "training.batch_size: 5,000 is more than there is; each step takes all 1,293"),
        (
            "pruner.rewind=15ep",
            "warning: pruner.rewind: a run of 15 epochs ends without passing its rewind point '15ep'",
        ),
    ],
)
def test_what_goes_on_is_told_before_it_takes_long(override, words, monkeypatch):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "fit", stopped)
    out = call("search", "digits_imp", "--set", override)
    assert out.exit_code == 130
    assert words in out.output.replace("\n", " ")


def test_a_gpu_that_is_too_small_is_one_message(monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(Trainer, "_fit", full)
    refused(["search", "digits_imp"], "training.batch_size: 64 images a step take more memory than the device has; set")


def test_an_error_of_ours_is_kept_whole_in_a_file_and_told_in_a_line(folder, monkeypatch):
    def broken(*_, **__):
        raise KeyError("a bug\x1b[2J")

    monkeypatch.setattr("tempfile.tempdir", str(folder))
    monkeypatch.setattr(Trainer, "_fit", broken)
    out = refused(["search", "digits_imp"], "error: unexpected KeyError: 'a bug\\x1b[2J'; the whole of it, for a", 1)
    (report,) = folder.glob("timm-tickets-*.txt")
    assert str(report) in out.stderr
    assert "Traceback" in report.read_text()
    assert "in broken" in report.read_text()
    monkeypatch.setattr("tempfile.tempdir", str(folder / "nowhere"))
    assert "Traceback" in call("search", "digits_imp", "--restart").stderr


def test_a_pretrained_ticket_of_another_architecture_than_its_tag_is_refused_without_the_weights(folder):
    state = model().state_dict()
    found = tt.Ticket(ticket().masks, state, {}, tt.Pretrained("test_vit.r160_in1k", state))
    found.save("forged.ticket")
    refused(["info", "forged.ticket"], "forged.ticket needs the pretrained weights 'test_vit.r160_in1k': ")
