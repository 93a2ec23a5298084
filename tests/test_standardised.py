"""Weight-standardised layers: the mask acts after the standardisation, in every kind of method."""

import pytest
import timm
import torch
from timm.layers import StdConv2d
from timm.layers.std_conv import ScaledStdConv2dSame, StdConv2dSame
from timm.models.resnetv2 import ResNetV2
from torch import nn
from torch.nn import functional

import timm_tickets as tt
from timm_tickets.sparse.standardised import _Masked


def build(name):
    torch.manual_seed(0)
    if name == "std_same":
        return nn.Sequential(StdConv2dSame(3, 8, 3, stride=2), nn.ReLU(), StdConv2dSame(8, 8, 3), nn.Flatten(1))
    if name == "scaled_same":
        return nn.Sequential(ScaledStdConv2dSame(3, 8, 3, stride=2), nn.ReLU(), ScaledStdConv2dSame(8, 8, 3))
    if name == "resnetv2":
        return ResNetV2(layers=(1, 1, 1, 1), channels=(128, 128, 128, 128), num_classes=4).eval()
    return timm.create_model(name, num_classes=4).eval()


def weight_of(layer):
    """The weight that the convolution really uses, read off by feeding unit images."""
    seen = {}
    original = functional.conv2d

    def spy(x, weight, *rest):
        seen["weight"] = weight.detach()
        return original(x, weight, *rest)

    functional.conv2d = spy
    try:
        layer(torch.zeros(1, layer.in_channels, 7, 7))
    finally:
        functional.conv2d = original
    return seen["weight"]


def standardised(model):
    return {f"{name}.weight": module for name, module in model.named_modules() if isinstance(module, _Masked)}


@pytest.mark.filterwarnings("ignore:.*layers are pruned to nothing")
@pytest.mark.parametrize("name", ["test_nfnet", "resnetv2", "std_same", "scaled_same"])
def test_what_is_pruned_is_zero_where_it_is_used(name):
    model = build(name)
    image = torch.randn(2, 3, 64, 64)
    before = model(image)
    keys = list(model.state_dict())
    pruner = tt.create_pruner("magnitude", model, sparsity=0.7, exclude=())
    assert torch.equal(model(image), before)  # nothing is pruned yet: the same function, bit for bit
    ticket = pruner.ticket
    layers = standardised(model)
    assert layers
    for key, layer in layers.items():
        used = weight_of(layer)
        assert not used[~ticket.masks[key]].any()
        assert not layer.weight[~ticket.masks[key]].any()
    assert any(weight_of(layer).any() for layer in layers.values())
    assert list(model.state_dict()) == keys
    after = model(image)
    with torch.no_grad():  # a pruned raw weight has no way to move the logits, not through the mean either
        for key, layer in layers.items():
            layer.weight.add_((~ticket.masks[key]) * 0.3)
    assert torch.equal(model(image), after)
    other = build(name)
    ticket.apply_(other)
    assert torch.equal(other(image), after)


def test_the_masked_weight_by_hand():
    layer = StdConv2d(4, 1, 1, eps=1e-12)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([3.0, 1.0, -1.0, 5.0]).view(1, 4, 1, 1))
    model = nn.Sequential(layer)
    subnet = tt.Subnet(model, ("0.weight",))
    subnet.set_mask_({"0.weight": torch.tensor([True, True, True, False]).view(1, 4, 1, 1)})
    # mask * w = (3, 1, -1, 0): mean 0.75, variance (5.0625 + 0.0625 + 3.0625 + 0.5625) / 4 = 2.1875.
    expected = [(value - 0.75) / 2.1875**0.5 for value in (3, 1, -1)]
    assert weight_of(layer).flatten().tolist() == pytest.approx([*expected, 0.0], rel=1e-5)


@pytest.mark.filterwarnings(
    "ignore:jackpot",
    "ignore:.*without passing its rewind point",
    "ignore:.*layers are pruned to nothing",
    "ignore:.*has not moved its mask",
    "ignore:.*have a score above zero",
)
@pytest.mark.parametrize("method", ["imp", "rigl", "edge_popup", "continuous_sparsification", "jackpot"])
def test_it_stays_so_through_every_kind_of_search_and_training(method):
    model = build("test_nfnet").train()
    more = {"rounds": 1} if method == "continuous_sparsification" else {}
    pruner = tt.create_pruner(method, model, sparsity=0.6, epochs=1, **more)

    def step(optimizer, loss=lambda criterion, output, target: criterion(output, target)):
        images, labels = torch.randn(4, 3, 64, 64), torch.tensor([0, 1, 2, 3])
        loss(nn.functional.cross_entropy, model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    for run in pruner:
        optimizer = run.attach(torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=1e-3))
        run.batches_per_epoch = 2
        for _ in range(2):
            step(optimizer, run.loss)
    ticket = pruner.ticket
    optimizer = ticket.attach(model, torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=1e-3))
    for _ in range(2):
        step(optimizer)
    for key, layer in standardised(model).items():
        assert not weight_of(layer)[~ticket.masks[key]].any()
        assert not layer.weight[~ticket.masks[key]].any()
    assert ticket.sparsity == pytest.approx(0.6, abs=1e-4)
