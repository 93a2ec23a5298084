"""Every method with settings that keep tests short, and the loop that trains it. A new method is one row here."""

import functools
from dataclasses import dataclass, field
from typing import Any

import pytest
import timm
import torch
from torch.utils.data import DataLoader, TensorDataset

import timm_tickets as tt
from timm_tickets.structure import units

# Jackpots warn of a model that was never trained; late rewinding of a run of one epoch; timm's zeros of what is before
# them; high sparsities of emptied layers (tests/test_collapse.py); a few steps do not move every mask.
EXPECTED_WARNINGS = (
    "ignore:jackpot",
    "ignore:.*without passing its rewind point",
    "ignore:.*no gradient reaches",
    "ignore:.*layers are pruned to nothing",
    "ignore:.*has not moved its mask",
    "ignore:.*have a score above zero",
)


@dataclass(frozen=True)
class Row:
    """A method: its name, settings that keep the test short, and settings that must be refused.

    Attributes:
        trained: Whether its ticket holds trained values, if only biases and norms; else it holds those of the start.
        slow: Whether the continuous run leaves it out, as another row has the same search.
    """

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    refused: tuple[dict[str, Any], ...] = ()
    trained: bool = False
    slow: bool = False


METHODS = [
    Row(
        "imp",
        {"prune_rate": 0.6},
        ({"prune_rate": 0}, {"prune_rate": 1}, {"scope": "rows"}, {"rewind": "2 epochs"}),
    ),
    Row("imp", {"prune_rate": 0.6, "scope": "layerwise", "rewind": "1it"}, trained=True),
    Row("colt", {"prune_rate": 0.6}, ({"partitions": 1}, {"prune_rate": 0}, {"split": "pixels"}, {"partitions": 5})),
    Row("colt", {"prune_rate": 0.6, "partitions": 3, "split": "samples", "scope": "layerwise"}),
    Row("magnitude", {}, ({"scope": "rows"}, {"distribution": "even"}, {"distribution": "erk"})),
    Row("magnitude", {"scope": "layerwise", "distribution": "erk"}),
    Row("snip", {}, ({"batches": 0},)),
    Row("grasp", {}, ({"batches": 0},)),
    Row("synflow", {"iterations": 3, "input_size": (3, 32, 32)}, ({"iterations": 0}, {"input_size": (3, 32)})),
    Row("gradual", {"interval": 1, "epochs": 2}, ({"interval": 0}, {"end": 0}, {"begin": 0.9}), trained=True),
    Row("set", {"interval": 1, "epochs": 2}, ({"drop_rate": 0}, {"scope": "global"}, {"until": 2}), trained=True),
    Row("rigl", {"interval": 2, "epochs": 2}, ({"drop_rate": 1}, {"interval": 0}), trained=True),
    Row("edge_popup", {}, ({"scale": "some"}, {"weights": "zeros"}, {"weight_decay": -1}), trained=True),
    Row("edge_popup", {"scope": "global", "scale": "dynamic", "weights": "kaiming_normal"}, trained=True),
    Row("frozen_slt", {}, ({"frozen": 1}, {"freezing": "even"}, {"pruned": 0.95, "locked": 0.01}), trained=True),
    Row("frozen_slt", {"frozen": 0.7, "freezing": "erk", "scope": "layerwise"}, trained=True),
    Row("jackpot", {}, ({"fall": "fast"}, {"low_score": 0}), trained=True),
    Row("continuous_sparsification", {"rounds": 2}, ({"rounds": 0}, {"s0": 3}, {"final_beta": 1}, {"meet": "luck"})),
    Row("continuous_sparsification", {"parallel": (0.05, -0.05)}),
    Row("random", {}, ({"seed": -1},)),
    Row("random", {"scope": "layerwise"}),
    Row(
        "tp_magnitude",
        {"rounds": 2, "rewind": "0ep"},
        ({"granularity": "weight"}, {"granularity": "2:4"}, {"rounds": -1}, {"rewind": "2 epochs"}),
    ),
    Row("tp_lamp", {}, ({"p": 0}, {"scope": "rows"})),
    Row("tp_random", slow=True),
    Row("tp_taylor", {}, ({"batches": 0},)),
    Row("tp_bn_scale", {}, ({"rounds": 0}, {"reg": -1}), trained=True, slow=True),
    Row("tp_group_norm", {}, ({"alpha": -1},), trained=True, slow=True),
    Row("tp_growing_reg", {"interval": 1}, ({"interval": 0}, {"delta_reg": -1}), trained=True),
]
SPARSITY = 0.9
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=5e-4),
    "adamw": lambda p: torch.optim.AdamW(p, 1e-3, weight_decay=0.05),
}


def of_channels(row):
    """Whether a method cuts whole channels, and so comes only near its sparsity, from above."""
    return row.name.startswith("tp_")


units_find = units.find_groups


@functools.cache
def _of_test_resnet(*wanted):
    return units_find(fresh(), *wanted, removable=True)


def found(model, *wanted, **_):
    """`find_groups`, once for test_resnet: the groups of one architecture are always the same."""
    if model.pretrained_cfg["architecture"] != "test_resnet":
        return units_find(model, *wanted, removable=True)
    return _of_test_resnet(*wanted)


def ids(row):
    return "-".join([row.name, *(str(value) for value in row.settings.values())])


def marked(row, *more):
    return pytest.param(row, *more, marks=pytest.mark.slow if row.slow else ())


every_method = pytest.mark.parametrize("row", [marked(row) for row in METHODS], ids=ids)


def fresh(seed=0, classes=4):
    torch.manual_seed(seed)
    return timm.create_model("test_resnet", num_classes=classes)


def loader():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(24, 3, 32, 32, generator=generator)
    return DataLoader(TensorDataset(images, torch.arange(24) % 4), batch_size=8)


def pruner_of(row, model, **more):
    return tt.create_pruner(row.name, model, **({"sparsity": SPARSITY, "epochs": 1} | row.settings | more))


def train_run(run, model, optimizer="sgd", check=None, epochs=None):
    """A user's loop, with clipping."""
    optimizer = run.attach(OPTIMIZERS[optimizer](model.parameters()))
    criterion = torch.nn.CrossEntropyLoss()
    model.train()
    for _ in range(epochs or run.epochs):
        for images, labels in run.subset(loader()):
            loss = run.loss(criterion, model(images), labels)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
            if check:
                check()


def searched(row, model, **more):
    pruner = pruner_of(row, model, **more)
    for run in pruner:
        train_run(run, model)
    return pruner
