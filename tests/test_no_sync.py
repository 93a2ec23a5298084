"""No step asks the device: by `asks_nothing` and `Card` of tests/support/no_sync.py."""

import pytest
import torch
from no_sync import Card, OnCard, asks_nothing
from torch import nn

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
