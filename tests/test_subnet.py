import copy

import pytest
import timm
import torch
from accelerate import Accelerator
from timm.optim import create_optimizer_v2, list_optimizers
from torch import nn
from torch.nn.utils import parametrize

from timm_tickets import shuffled_masks
from timm_tickets.core.masks import cut, full_masks
from timm_tickets.core.scores import random
from timm_tickets.sparse.optimizers import plain_optimizer, reset_
from timm_tickets.sparse.prunable import prunable_names
from timm_tickets.sparse.subnet import Subnet
from timm_tickets.sparse.wrappers import plain_model


def _masked_in_place(parameter, mask):
    parameter.grad.mul_(mask)


def half_masks(model, seed=0):
    weights = Subnet(model, prunable_names(model)).weights()
    full = full_masks(weights)
    return cut(full, random(weights, seed), -(-sum(v.numel() for v in full.values()) // 2))


def batches(count, size=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        yield (
            torch.randn(size, 3, 32, 32, generator=generator),
            torch.randint(0, 10, (size,), generator=generator),
        )


def step(model, optimizer, images, labels, clip=None):
    loss = nn.functional.cross_entropy(model(images), labels)
    loss.backward()
    if clip:
        nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


class Masked(nn.Module):
    def __init__(self, mask):
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight):
        return weight * self.mask


@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("opt", ["momentum", "adamw"])
def test_in_place_masks_equal_a_parametrized_twin_bit_for_bit(model, opt, clip):
    twin = copy.deepcopy(model)
    masks = half_masks(model)
    for name, mask in masks.items():
        parametrize.register_parametrization(twin.get_submodule(name.removesuffix(".weight")), "weight", Masked(mask))
    subnet = Subnet(model, tuple(masks))
    subnet.set_mask_(masks)
    ours, theirs = (create_optimizer_v2(m, opt, lr=0.05, weight_decay=0.01) for m in (model, twin))
    subnet.hold_(ours)
    for images, labels in batches(6):
        assert step(model, ours, images, labels, clip) == step(twin, theirs, images, labels, clip)
    for name in masks:
        assert torch.equal(model.get_parameter(name), twin.get_submodule(name.removesuffix(".weight")).weight)
    buffers = dict(twin.named_buffers())
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())


def test_one_of_the_two_hooks_alone_is_not_enough(model):
    """The weights' alone: clipping counts pruned gradients. The gradients' alone: old momentum moves pruned weights."""
    masks = half_masks(model)
    name = next(iter(masks))
    only_weights = copy.deepcopy(model)
    for one, hold in ((model, True), (only_weights, False)):
        subnet = Subnet(one, tuple(masks))
        subnet.set_mask_(masks)
        optimizer = torch.optim.SGD(one.parameters(), 0.1)
        if hold:
            subnet.hold_(optimizer)
        for images, labels in batches(1):
            step(one, optimizer, images, labels, clip=0.01)
        subnet.apply_()
    assert not torch.equal(model.get_parameter(name), only_weights.get_parameter(name))

    subnet.release_()
    model = only_weights
    only_gradients = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for images, labels in batches(1):
        step(model, only_gradients, images, labels)  # dense: momentum everywhere
    subnet.set_mask_(masks)
    model.get_parameter(name).register_post_accumulate_grad_hook(lambda p: _masked_in_place(p, masks[name]))
    for images, labels in batches(1):
        step(model, only_gradients, images, labels)
    assert model.get_parameter(name)[~masks[name]].any()


# These need a GPU or a package that is not installed.
_NAMES = [name for name in list_optimizers() if not name.startswith(("bnb", "fused"))]


@pytest.mark.parametrize("name", [*_NAMES, "lookahead_adamw"])
@pytest.mark.filterwarnings("ignore")
def test_every_timm_optimizer_keeps_masks_and_can_be_reset(name):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
    optimizer = create_optimizer_v2(model, name, lr=0.05, weight_decay=0.1)
    start = copy.deepcopy(model.state_dict())
    mask = {"0.weight": torch.rand(5, 6, generator=torch.Generator().manual_seed(1)) > 0.5}
    subnet = Subnet(model, ("0.weight",))
    ends = []
    for _ in range(2):  # the second time with the same optimizer, reset
        model.load_state_dict(start)
        subnet.set_mask_(mask)
        reset_(plain_optimizer(optimizer))
        subnet.hold_(optimizer)
        torch.manual_seed(5)
        for i in range(14):
            x = torch.randn(9, 6, generator=torch.Generator().manual_seed(i))
            loss = model(x).square().mean()
            loss.backward(create_graph=getattr(optimizer, "is_second_order", False))
            optimizer.step()
            optimizer.zero_grad()
            assert not model[0].weight[~mask["0.weight"]].any()
        ends.append(copy.deepcopy(model.state_dict()))
    assert not torch.equal(ends[0]["0.weight"], start["0.weight"])
    if name != "adahessian":  # draws from a generator of its own, which goes on
        assert all(torch.equal(ends[0][key], ends[1][key]) for key in start)


@pytest.mark.parametrize(
    "schedule",
    [
        lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4),
        lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.3, total_steps=5),
    ],
)
def test_an_optimizer_used_again_begins_each_schedule_at_its_beginning(model, schedule):
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    rates = []
    for _ in range(2):
        reset_(optimizer)
        assert not any(value.any() for state in optimizer.state.values() for value in state.values())
        scheduler = schedule(optimizer)
        scheduler_rates = []
        for images, labels in batches(4):
            scheduler_rates.append(optimizer.param_groups[0]["lr"])
            step(model, optimizer, images, labels)
            scheduler.step()
        rates.append(scheduler_rates)
    assert rates[0] == rates[1]
    assert max(rates[1]) >= 0.1


def test_reset_leaves_hyper_parameters_as_the_user_set_them(model):
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for rate in (0.1, 0.05):
        optimizer.param_groups[0]["lr"] = rate
        reset_(optimizer)
        assert optimizer.param_groups[0]["lr"] == rate


def test_who_attaches_last_holds(model):
    masks = half_masks(model)
    other = shuffled_masks(masks, 3)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for one in (masks, other):
        subnet = Subnet(model, tuple(one))
        subnet.set_mask_(one)
        subnet.hold_(optimizer)
    for images, labels in batches(2):
        step(model, optimizer, images, labels)
    for name, mask in other.items():
        weight = model.get_parameter(name)
        assert not weight[~mask].any()
        assert weight[mask & ~masks[name]].any()  # what only the first mask pruned trains again


def test_released_hooks_are_gone(model):
    masks = half_masks(model)
    subnet = Subnet(model, tuple(masks))
    subnet.set_mask_(masks)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    subnet.hold_(optimizer)
    subnet.release_()
    for images, labels in batches(1):
        step(model, optimizer, images, labels)
    name = next(iter(masks))
    assert model.get_parameter(name)[~masks[name]].any()


def test_masks_hold_through_accelerate_and_compile_wrappers(model):
    masks = half_masks(model)
    accelerator = Accelerator(cpu=True)
    wrapped, optimizer = accelerator.prepare(
        torch.compile(model, backend="eager"), torch.optim.AdamW(model.parameters())
    )
    subnet = Subnet(wrapped, tuple(masks))
    assert subnet.model is model
    assert plain_model(wrapped) is model
    subnet.set_mask_(masks)
    subnet.hold_(optimizer)
    for images, labels in batches(2):
        step(wrapped, optimizer, images, labels)
    assert all(not model.get_parameter(name)[~mask].any() for name, mask in masks.items())
    assert any(model.get_parameter(name)[mask].any() for name, mask in masks.items())


def test_no_key_class_or_module_changes(model):
    fresh = timm.create_model("test_resnet", num_classes=10)
    masks = half_masks(model)
    subnet = Subnet(model, tuple(masks))
    subnet.set_mask_(masks)
    subnet.hold_(torch.optim.SGD(model.parameters(), 0.1))
    assert list(model.state_dict()) == list(fresh.state_dict())
    assert [type(a) for a in model.modules()] == [type(b) for b in fresh.modules()]
