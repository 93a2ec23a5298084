"""What README.md and docs/ show is run as it stands, but for a smaller model and fewer epochs."""

import re
import warnings
from pathlib import Path

import pytest
import timm
import torch
from commands import call
from pictures import make
from timm.task import ClassificationTask
from torch.utils.data import DataLoader, TensorDataset

import timm_tickets as tt

ROOT = Path(__file__).parent.parent
PAGES = {str(path.relative_to(ROOT)): path.read_text() for path in (ROOT / "README.md", *ROOT.glob("docs/*.md"))}


def blocks(page, language="python"):
    return re.findall(rf"```{language}\n(.*?)```", PAGES[page], re.DOTALL)


def small(code):
    for text, shorter in (("resnet18", "test_resnet"), ("epochs=90", "epochs=3"), ("sparsity=0.95", "sparsity=0.3")):
        code = code.replace(text, shorter)
    return code


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
