"""No step asks the device: by `asks_nothing` and `Card` of tests/support/no_sync.py."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from no_sync import CARD, Card, OnCard, asks_nothing, on_card_
from support.every_method import METHODS, OPTIMIZERS, Row, fresh, ids, marked, pruner_of
from torch import nn

import timm_tickets as tt
from timm_tickets.sparse.blind import Reached

VALUES = torch.tensor([1.0, -2.0, 3.0])
ASKING = {
    "cpu": lambda t: t.cpu(),
    "to": lambda t: t.to("cpu"),
    "other device": lambda t: t.to(torch.device("meta" if t.device.type == "cpu" else "cpu")),
    "item": lambda t: t.sum().item(),
    "bool": lambda t: bool(t.any()),
    "int": lambda t: int(t.sum()),
    "list": lambda t: t.tolist(),
    "numpy": lambda t: t.numpy(),
    "nonzero": lambda t: t.nonzero(),
    "by mask": lambda t: t[t > 0],
    "put by mask": lambda t: t.clone().index_put_((t > 0,), torch.zeros_like(t[0])),
    "masked_select": lambda t: t.masked_select(t > 0),
    "unique": lambda t: t.unique(),
    "bincount": lambda t: t.abs().long().bincount(),
    "repeat": lambda t: t.repeat_interleave(t.abs().long()),
}


@pytest.mark.parametrize("ask", ASKING.values(), ids=ASKING)
def test_what_waits_for_a_card_is_refused(ask):
    with asks_nothing(), pytest.raises(AssertionError, match="a card would be waited for"):
        ask(VALUES)
    with Card() as card:
        values = OnCard(VALUES)
        with card.step(), pytest.raises((AssertionError, RuntimeError, TypeError)):
            ask(values)


def test_a_plain_step_is_let_through_and_tensors_of_two_devices_are_not():
    model, images = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten()), torch.randn(2, 3, 4, 4)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    with asks_nothing():
        nn.functional.cross_entropy(model(images), torch.tensor([0, 1])).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    with Card() as card, card.step():
        doubled = OnCard(VALUES) * 2
        with pytest.raises(AssertionError, match="two devices"):
            OnCard(VALUES) + VALUES
    assert doubled.content.tolist() == [2, -4, 6]


# What asks now and then, each third step here: RigL keeps a dense gradient on the host, where its memory is promised to
# be.
SELDOM = {"rigl": {"interval": 3}}
# These train nothing, or read gradients and step back; torch-pruning's regularisers ask at every step, in its own code.
STEPLESS = {"magnitude", "random", "synflow", "snip", "grasp", "tp_lamp", "tp_random", "tp_taylor"}
TRAINING = [row for row in METHODS if row.name not in STEPLESS and "reg" not in row.name]
# Another row of the same method differs in where its mask is cut.
AGAIN = [row for row in TRAINING if row.name in {one.name for one in TRAINING[: TRAINING.index(row)]}]


def in_steps(row, watched, images, labels):
    """Train a first run, within `watched` once it has looked whether gradients reach its layers."""
    torch.manual_seed(0)
    model = fresh()
    pruner = pruner_of(row, model, **SELDOM.get(row.name, {}))
    if type(images) is OnCard:
        on_card_(model)
    run, criterion = next(pruner), nn.CrossEntropyLoss()
    optimizer = run.attach(OPTIMIZERS["sgd"](model.parameters()))
    run.batches_per_epoch = 8
    model.train()
    if run.classes:  # whether labels are of them is looked at as the loss is taken
        run.request = replace(run.request, classes=None)
    for step in range(1, 6):
        with nullcontext() if step <= Reached.STEPS or (row.name in SELDOM and step % 3 != 2) else watched():
            run.loss(criterion, model(images), labels).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
    return run


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("row", [marked(replace(row, slow=row.slow or row in AGAIN)) for row in TRAINING], ids=ids)
def test_no_step_of_any_method_asks(row):
    run = in_steps(row, asks_nothing, torch.randn(4, 3, 32, 32), torch.arange(4))
    assert run.step == 5


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["gradual", "edge_popup", "frozen_slt", "jackpot", "continuous_sparsification"])
def test_masks_scores_and_counts_stay_on_the_card(name, monkeypatch):
    monkeypatch.setattr(torch.__future__, "get_overwrite_module_params_on_conversion", lambda: True)
    row = next(row for row in METHODS if row.name == name)
    images, labels = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.arange(4)
    with monkeypatch.context() as way:  # the same masks as by the CPU
        way.setattr("timm_tickets.core.topk.on_host", lambda _: False)
        plain = in_steps(row, nullcontext, images, labels)
    with Card() as card:
        run = in_steps(row, card.step, OnCard(images), OnCard(labels))
        assert all(mask.device == CARD for mask in run.subnet.device_mask().values())
        masks = run.subnet.mask
    assert all(type(mask) is torch.Tensor and torch.equal(mask, plain.subnet.mask[n]) for n, mask in masks.items())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["edge_popup", "frozen_slt", "jackpot", "continuous_sparsification"])
@pytest.mark.filterwarnings("ignore")
def test_scores_that_are_not_finite_are_told_when_a_run_ends(name, bad, monkeypatch):
    """On the CPU the next cut refuses NaN; a card is not asked by it."""
    monkeypatch.setattr("timm_tickets.core.topk.on_host", lambda _: False)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    pruner = pruner_of(Row(name, {"classifier": True}), model, sparsity=0.5)
    run = next(pruner)
    run.batches_per_epoch = 2
    optimizer = run.attach(torch.optim.SGD(model.parameters(), 0.1))
    gate = pruner.subnet.gates["1.weight"]
    with torch.no_grad():
        gate.score.view(-1)[0] = bad
    for _ in range(2):
        run.loss(lambda output, _: output.square().sum(), model(torch.ones(2, 4)), None)
        optimizer.step()
    with pytest.raises(tt.TrainingError, match=r"round_00: the learned scores of 1\.weight are not finite.*lower the"):
        next(pruner)
