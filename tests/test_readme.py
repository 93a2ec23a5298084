"""What README.md and docs/ show is run as it stands, but for a smaller model, fewer images and epochs.

A page is run from top to bottom, in a folder that has what all pages speak of: its commands in this process, its Python
in one namespace, its YAML written to the file that it names. A new page is run without a word here. What is not run
stands in `NOT_RUN` or `ELSEWHERE`, with the reason or the test that runs it.
"""

import re
import shlex
import shutil
import warnings
from pathlib import Path

import pytest
import timm
import torch
from commands import call
from outline import TRAIN, unmodified
from packaging.version import Version
from pictures import make
from timm.task import ClassificationTask
from torch.utils.data import DataLoader, TensorDataset

import timm_tickets as tt

ROOT = Path(__file__).parent.parent
PAGES = {str(path.relative_to(ROOT)): path.read_text() for path in (ROOT / "README.md", *ROOT.glob("docs/*.md"))}


# Lines of a shell that begin so, and why they are not run.
NOT_RUN = {
    "python3 -m venv": ".ci/run does, in a new virtual environment",
    "timm-tickets leaderboard": "tests/test_leaderboard.py does; the shipped one takes hours",
    "timm-tickets speed": "tests/test_deploy.py does; each engine takes a process of its own",
}
# Pages whose Python, as many blocks as there are, another test runs and looks at.
ELSEWHERE = {
    "README.md": "test_the_loop_and_its_ticket, test_own_images",
    "docs/new_pruner.md": "test_a_pruner_of_your_own",
    "docs/ticket_format.md": "tests/test_ticket_format.py",
    "docs/timm_train.md": "test_the_loop_and_its_ticket",
    "docs/torch_pruning.md": "tests/test_torch_pruning.py",
    "docs/your_loop.md": "test_the_loop_and_its_ticket",
}
SMALLER = {"resnet18": "test_resnet", "epochs=90": "epochs=3", "epochs 90": "epochs 2", "sparsity=0.95": "sparsity=0.3"}
LESS = {"training.epochs": 1, "training.batch_size": 8, "data.workers": 0, "model.model": "test_resnet"}
LESS |= {"data.img_size": 32, "data.dataset": "folder", "data.data_dir": "photos", "data.val_fraction": 0.5}


def blocks(page, language="python"):
    return re.findall(rf"```{language}\n(.*?)```", PAGES[page], re.DOTALL)


def small(code):
    for text, shorter in SMALLER.items():
        code = code.replace(text, shorter)
    return code


def sets(words, settings):
    """Options for the settings that a command does not give itself."""
    given = {word.partition("=")[0] for word in words}
    return [word for key, value in settings.items() if key not in given for word in ("--set", f"{key}={value}")]


def smaller(words, later):
    """A command that takes little; a search whose results nobody reads later on the page is only dry.

    Of several processes there is one here; tests/test_parallel.py and tests/test_groups.py have more.
    """
    name = words[0]
    if name in ("search", "train", "transfer"):
        output = next((word[7:] for word in words if word.startswith("output=")), f"output/{Path(words[1]).stem}")
        if name == "search" and "--dry-run" not in words and output in later:
            return words + sets(words, LESS | {"pruner.prune_rate": 0.5})
        words += sets(words, LESS)
        words += ["--control", "none"] * (name == "transfer")
        words += ["--dry-run"] * (name == "search" and "--dry-run" not in words)
    if name == "run":
        words = small(" ".join(words)).split()
        if "imp" in words:
            words[1:1] = ["--set", "prune_rate=0.9"]
    if name == "push":  # without a network
        words[-1] = "local-dir:pushed"
    return words


def run(line, later):
    """A line of a shell: a command of ours, on one process or several, perhaps into a file."""
    words = shlex.split(line.removesuffix("|| break"), comments=True)
    if not words:  # a comment
        return
    if words[0] == "torchrun":
        words = ["timm-tickets", *words[words.index("-m") + 2 :]]
    into = words[words.index(">") + 1] if ">" in words else None
    words = words[: words.index(">")] if into else words
    assert words[0] == "timm-tickets", f"{line}: nothing here runs this; see NOT_RUN"
    done = call(*smaller(words[1:], later), COLUMNS="120")
    if "--to onnx" in line and Version(torch.__version__) < Version("2.7"):  # docs/faster.md says so
        assert "a later torch may" in done.output
        return
    assert done.exit_code == 0, f"{line}: {done.output}"
    if into:
        Path(into).write_text(done.stdout)


def run_all(lines, later):
    """Lines of a shell, and a loop until a file is there."""
    while lines:
        line = lines.pop(0)
        if line.startswith(tuple(NOT_RUN)):
            continue
        if loop := re.fullmatch(r"until \[ -e (\S+) \]; do", line):
            end = lines.index("done")
            shutil.rmtree(Path(loop[1]).parent, ignore_errors=True)  # of another command of the page
            for _ in range(9):
                run_all(lines[:end], later)
                if Path(loop[1]).exists():
                    break
            assert Path(loop[1]).exists(), line
            del lines[: end + 1]
        else:
            run(line, "".join(lines) + later)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with what the pages speak of: images, recipes, tickets, a training script, run folders."""
    folder = tmp_path_factory.mktemp("place")
    make(folder / "photos", {"train": 8, "val": 2, "test": 2}, "abcdefghij", side=32)  # as many classes as digits
    (folder / "images").symlink_to(folder / "photos")
    (folder / "photos.yaml").write_text(*blocks("README.md", "yaml"))
    (folder / "mine.yaml").write_text(call("recipe", "digits_imp").stdout)
    (folder / "train.py").write_text(unmodified(TRAIN))
    output = folder / "output"
    for name, pruner in (("digits_imp", "random"), ("digits_imp_channels", "magnitude")):  # which train once
        settings = LESS | {"output": output / name, "data.data_dir": folder / "photos", "pruner.name": pruner}
        done = call("search", name, *sets([], settings))
        assert done.exit_code == 0, done.output
    shutil.copytree(output / "digits_imp", output / "imp")
    shutil.copytree(output / "digits_imp_channels", output / "random")
    for seed, name in enumerate(("one", "other", "test_resnet")):
        model = timm.create_model("test_resnet", num_classes=10)
        tt.create_pruner("random", model, sparsity=0.7, seed=seed).ticket.save(folder / f"{name}.ticket")
    colt = output / "colt_cifar100_resnet18"
    colt.mkdir()
    shutil.copy(folder / "one.ticket", colt / f"{colt.name}.ticket")
    return folder


@pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks(page, "sh") or (blocks(page) and page not in ELSEWHERE)]
)
def test_what_a_page_shows_runs(page, place, names, tmp_path, monkeypatch):
    shutil.copytree(place, tmp_path / "place", symlinks=True)
    monkeypatch.chdir(tmp_path / "place")
    ticket = tt.load_ticket("output/digits_imp_channels/digits_imp_channels.ticket")
    names |= {"ticket": ticket, "model": ticket.apply_(timm.create_model("test_resnet", num_classes=10))}
    parts = re.split(r"(?m)^```(\w+)\n(.*?)^```$", PAGES[page], flags=re.DOTALL)
    for number in range(1, len(parts), 3):
        language, code = parts[number : number + 2]
        if language == "sh":
            lines = [line.strip() for line in code.replace("\\\n", " ").splitlines()]
            run_all(lines, "".join(parts[number + 2 :]))
        elif language == "yaml" and (name := re.match(r"# (\S+\.yaml)\n", code)):
            Path(name[1]).write_text(code)
        elif language == "python" and page not in ELSEWHERE:
            exec(small(code), names)


def test_no_block_is_of_a_language_that_nobody_runs_or_reads():
    opened = {name for text in PAGES.values() for name in re.findall(r"(?m)^ *```(\w*)", text)}
    assert opened <= {"", "sh", "python", "yaml", "toml", "text"}
    with pytest.raises(AssertionError, match=r"accelerate launch train\.py: nothing here runs this; see NOT_RUN"):
        run("accelerate launch train.py", "")


def test_nothing_is_left_out_that_is_not_there():
    shown = [line.strip() for page in PAGES for code in blocks(page, "sh") for line in code.splitlines()]
    assert all(any(line.startswith(one) for line in shown) for one in NOT_RUN)
    assert all(blocks(page) for page in ELSEWHERE)


@pytest.fixture
def names(tmp_path, monkeypatch):
    """What the pages' code finds around it."""
    monkeypatch.chdir(tmp_path)
    data = TensorDataset(torch.randn(16, 3, 32, 32), torch.arange(16) % 10)
    return {"loader": DataLoader(data, batch_size=8), "criterion": torch.nn.CrossEntropyLoss(), "timm_tickets": tt}


def test_a_page_is_read_at_once_and_its_links_lead_somewhere():
    assert len(PAGES["README.md"].splitlines()) <= 150
    assert max(len(text.splitlines()) for text in PAGES.values()) <= 150
    for page, text in PAGES.items():
        for link, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", text):
            target = (ROOT / page).parent / link
            assert target.exists(), f"{page}: {link}"
            titles = (
                [title.lower().replace(" ", "-") for title in re.findall(r"(?m)^#+ (.*)$", target.read_text())]
                if anchor
                else []
            )
            assert not anchor or anchor in titles, f"{page}: {link}#{anchor}"


def test_the_loop_and_its_ticket(names):
    _, loop, load = blocks("README.md")
    assert len(loop.strip().splitlines()) <= 16
    exec(small(loop), names)
    ticket = tt.load_ticket("test_resnet.ticket")
    assert ticket.sparsity == pytest.approx(0.3, abs=1e-5)
    assert ticket.metadata["start_epoch"] == 2
    exec(small(load), names)
    (tweaks,) = blocks("docs/your_loop.md")
    exec(tweaks.replace("90", "1"), names)  # one epoch: two steps
    for images, labels in names["loader"]:
        assert any(module._forward_hooks for module in names["model"].modules())
        names["criterion"](names["model"](images), labels).backward()
        names["optimizer"].step()
    assert not any(module._forward_hooks for module in names["model"].modules())
    assert all(not names["model"].get_parameter(name)[~mask].any() for name, mask in ticket.masks.items())
    (task,) = blocks("docs/timm_train.md")
    model = timm.create_model("test_resnet", num_classes=10)
    names |= {"task": ClassificationTask(model, torch.nn.CrossEntropyLoss()), "loader_train": names["loader"]}
    names |= {"optimizer": torch.optim.SGD(model.parameters(), 0.1, momentum=0.9), "metrics": {}}
    exec(small(task), names)
    for images, labels in names["loader_train"]:
        names["task"].train()(images, labels)["loss"].backward()
        names["optimizer"].step()
    assert all(not model.get_parameter(name)[~mask].any() for name, mask in ticket.masks.items())
    assert names["metrics"]["sparsity"] == pytest.approx(0.3, abs=1e-5)


@pytest.mark.usefixtures("unregister")
def test_a_pruner_of_your_own(names):
    (method,) = blocks("docs/new_pruner.md")
    exec(method, names)
    model = timm.create_model("test_resnet", num_classes=10)
    pruner = tt.create_pruner("train_then_prune", model, sparsity=0.5)
    for run in pruner:
        optimizer = run.attach(torch.optim.SGD(model.parameters(), 0.1))
        for images, labels in run.subset(names["loader"]):
            run.loss(names["criterion"], model(images), labels).backward()
            optimizer.step()
    assert pruner.ticket.sparsity == pytest.approx(0.5, abs=1e-5)
    kept = {}
    for collapse in ("prevent", "warn"):  # a cut as the page writes it minds this setting
        small_layers = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
        torch.nn.init.constant_(small_layers[0].weight, 1e-3)
        torch.nn.init.constant_(small_layers[1].weight, 1.0)
        pruner = tt.create_pruner("train_then_prune", small_layers, sparsity=0.5, collapse=collapse)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # nothing is trained here, and a layer is emptied
            assert [run.name for run in pruner] == ["round_00"]
        kept[collapse] = [int(mask.sum()) for mask in pruner.ticket.masks.values()]
    assert kept == {"prevent": [1, 15], "warn": [0, 16]}


def test_own_images(tmp_path, monkeypatch):
    """The recipe as written, on class folders, from the command to the model in plain timm."""
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "photos", {"train": 20, "test": 8}, side=32)
    (recipe,) = blocks("README.md", "yaml")
    assert len(recipe.strip().splitlines()) <= 12
    (tmp_path / "photos.yaml").write_text(recipe)
    less = ["model.model=test_resnet", "training.epochs=2", "data.img_size=32", "data.workers=0"]
    less += ["pruner.prune_rate=0.7", "pruner.sparsity=0.7", "training.batch_size=16"]
    done = call("search", "photos.yaml", *(word for setting in less for word in ("--set", setting)))
    assert done.exit_code == 0, done.output
    (load, *_) = blocks("README.md")
    names = {"timm": timm}
    exec(load.replace("digits_imp", "photos"), names)
    ticket = tt.load_ticket("output/photos/photos.ticket")
    assert ticket.sparsity == pytest.approx(0.7, abs=1e-4)
    for name, mask in ticket.masks.items():
        weight = names["model"].get_parameter(name)
        assert not weight[~mask].any()
        assert weight[mask].any()
