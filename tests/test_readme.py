"""The README's Python is run as it stands, but for a smaller model and fewer epochs."""

import re
import warnings
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import timm_tickets as tt

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def small(code):
    for text, shorter in (("resnet18", "test_resnet"), ("epochs=90", "epochs=3"), ("sparsity=0.95", "sparsity=0.3")):
        code = code.replace(text, shorter)
    return code


@pytest.mark.usefixtures("unregister")
def test_the_loop_the_ticket_and_the_new_pruner_work_as_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = TensorDataset(torch.randn(16, 3, 32, 32), torch.arange(16) % 10)
    names = {"loader": DataLoader(data, batch_size=8), "criterion": torch.nn.CrossEntropyLoss()}
    loop, load, tweaks, task, method = BLOCKS
    assert len(loop.strip().splitlines()) <= 16
    exec(small(loop), names)
    ticket = tt.load_ticket("test_resnet.ticket")
    assert ticket.sparsity == pytest.approx(0.3, abs=1e-5)
    assert ticket.metadata["start_epoch"] == 2
    exec(small(load), names)
    exec(tweaks.replace("90", "1"), names)  # one epoch: two steps
    for images, labels in names["loader"]:
        assert any(module._forward_hooks for module in names["model"].modules())
        names["criterion"](names["model"](images), labels).backward()
        names["optimizer"].step()
    assert not any(module._forward_hooks for module in names["model"].modules())
    assert all(not names["model"].get_parameter(name)[~mask].any() for name, mask in ticket.masks.items())
    names |= {"device": torch.device("cpu"), "loader_train": names["loader"]}
    exec(small(task), names)
    for images, labels in names["loader_train"]:
        names["task"].train()(images, labels)["loss"].backward()
        names["optimizer"].step()
    assert all(not names["model"].get_parameter(name)[~mask].any() for name, mask in ticket.masks.items())
    exec(method, names)
    pruner = tt.create_pruner("train_then_prune", names["model"], sparsity=0.5)
    for run in pruner:
        optimizer = run.attach(torch.optim.SGD(names["model"].parameters(), 0.1))
        for images, labels in run.subset(names["loader"]):
            run.loss(names["criterion"], names["model"](images), labels).backward()
            optimizer.step()
    assert pruner.ticket.sparsity == pytest.approx(0.5, abs=1e-5)
    kept = {}
    for collapse in ("prevent", "warn"):  # a cut as the README writes it minds this setting
        small_layers = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
        torch.nn.init.constant_(small_layers[0].weight, 1e-3)
        torch.nn.init.constant_(small_layers[1].weight, 1.0)
        pruner = tt.create_pruner("train_then_prune", small_layers, sparsity=0.5, collapse=collapse)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # nothing is trained here, and a layer is emptied
            assert [run.name for run in pruner] == ["round_00"]
        kept[collapse] = [int(mask.sum()) for mask in pruner.ticket.masks.values()]
    assert kept == {"prevent": [1, 15], "warn": [0, 16]}
