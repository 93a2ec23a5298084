"""Gradual pruning, SET and RigL: schedules, drop and grow."""

import pytest
import torch
from torch import nn

import timm_tickets as tt
from timm_tickets.masks import exchange


def method(name, **settings):
    return tt.get_method(name)(**{"sparsity": 0.8, **settings})


def test_the_cubic_by_hand():
    # s (1 - (1 - p / 0.75)^3): at half of the way 0.8 * (1 - 1/8) = 0.7.
    gradual = method("gradual")
    assert [gradual.scheduled(p) for p in (0, 0.375, 0.75, 1)] == pytest.approx([0, 0.7, 0.8, 0.8])
    later = method("gradual", begin=0.5, end=1.0)
    assert [later.scheduled(p) for p in (0.2, 0.5, 0.75, 1)] == pytest.approx([0, 0, 0.7, 0.8])


def test_the_cosine_by_hand():
    # 0.3 / 2 (1 + cos(pi p / 0.75))
    rigl = method("rigl")
    assert [rigl.scheduled(p) for p in (0, 0.375, 0.75)] == pytest.approx([0.3, 0.15, 0])


def test_drop_and_grow_by_hand():
    mask = torch.tensor([True, True, True, False, False, False])
    weights = torch.tensor([0.1, 5.0, 3.0, 0.0, 0.0, 0.0])
    gradient = torch.tensor([0.2, 9.0, 9.0, 0.1, 0.7, 0.3])
    # 0.1 is dropped; of the pruned 0.7 is the largest gradient.
    assert exchange(mask, weights, gradient, 1).tolist() == [False, True, True, False, True, False]
    # 0.1 and 3 are dropped; the largest gradients among the pruned are then 9 (just dropped) and 0.7.
    assert exchange(mask, weights, gradient, 2).tolist() == [False, True, True, False, True, False]
    assert exchange(mask, weights, gradient, 0).tolist() == mask.tolist()


class Line(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 1, bias=False)

    def forward(self, x):
        return self.layer(x)


def test_rigl_grows_by_the_dense_gradient_from_zero_and_without_old_momentum():
    torch.manual_seed(0)
    model = Line()
    pruner = tt.create_pruner("rigl", model, sparsity=0.5, interval=2, drop_rate=0.5, until=1.0, epochs=1)
    run = next(pruner)
    optimizer = run.attach(torch.optim.SGD(model.parameters(), 0.01, momentum=0.9))
    run.batches_per_epoch = 100
    x = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]])  # dL/dw = x: the last weights have most
    old = pruner.subnet.mask["layer.weight"].flatten()
    for _ in range(2):
        run.loss(lambda output, _: output.sum(), model(x), None).backward()
        optimizer.step()
        optimizer.zero_grad()
    new = pruner.subnet.mask["layer.weight"].flatten()
    assert int(new.sum()) == int(old.sum()) == 4
    grown = new & ~old
    pruned_before = (~old).nonzero().flatten().tolist()
    expected = sorted(pruned_before, reverse=True)[: int(grown.sum())]
    assert sorted(grown.nonzero().flatten().tolist(), reverse=True) == expected
    assert grown.any()
    weight = model.layer.weight.detach().flatten()
    assert not weight[grown].any()
    assert not optimizer.state[model.layer.weight]["momentum_buffer"].flatten()[grown].any()


@pytest.mark.parametrize("name", ["set", "rigl"])
def test_layers_keep_their_density_while_masks_move(model, name):
    pruner = tt.create_pruner(name, model, sparsity=0.9, interval=2, until=1.0, epochs=1)
    run = next(pruner)
    optimizer = run.attach(torch.optim.SGD(model.parameters(), 0.05, momentum=0.9))
    run.batches_per_epoch = 20
    first = {n: mask.clone() for n, mask in pruner.subnet.mask.items()}
    for _ in range(6):
        run.loss(nn.functional.cross_entropy, model(torch.randn(4, 3, 32, 32)), torch.randint(0, 10, (4,))).backward()
        optimizer.step()
        optimizer.zero_grad()
        for n, mask in pruner.subnet.mask.items():
            assert int(mask.sum()) == int(first[n].sum())
            assert not model.get_parameter(n)[~mask].any()
    assert any(not torch.equal(mask, first[n]) for n, mask in pruner.subnet.mask.items())
    end = {n: value.clone() for n, value in model.state_dict().items()}
    assert next(pruner, None) is None
    assert all(torch.equal(value, end[n]) for n, value in pruner.ticket.values.items())  # the final weights


def test_gradual_sparsity_only_grows_and_meets_the_cubic(model):
    pruner = tt.create_pruner("gradual", model, sparsity=0.8, interval=5, epochs=2)
    run = next(pruner)
    optimizer = run.attach(torch.optim.SGD(model.parameters(), 0.05))
    run.batches_per_epoch = 10
    seen = []
    for _ in range(20):
        run.loss(nn.functional.cross_entropy, model(torch.randn(4, 3, 32, 32)), torch.randint(0, 10, (4,))).backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append(pruner.subnet.sparsity)
    expected = [pruner.method.scheduled(step / 20) for step in (5, 10, 15, 20)]
    assert [seen[i] for i in (4, 9, 14, 19)] == pytest.approx(expected, abs=1e-4)
    assert seen == sorted(seen)
    assert seen[3] == 0
    assert next(pruner, None) is None
    assert pruner.sparsity == pytest.approx(0.8, abs=1e-5)


def test_rigl_reads_the_whole_gradient_under_accumulation():
    torch.manual_seed(0)
    model = Line()
    pruner = tt.create_pruner("rigl", model, sparsity=0.5, interval=2, until=1.0, epochs=1)
    run = next(pruner)
    optimizer = run.attach(torch.optim.SGD(model.parameters(), 0.01))
    run.batches_per_epoch = 100
    seen = {}
    exchange_ = type(pruner.method).exchange_

    def watched(self, run, grow, rate):
        seen.update({name: value.flatten().tolist() for name, value in grow.items()})
        exchange_(self, run, grow, rate)

    type(pruner.method).exchange_ = watched
    try:
        for _ in range(2):
            for scale in (1.0, 10.0):  # dL/dw is the input: 1 and 10 a batch, 11 together, kept or pruned
                run.loss(lambda output, _: output.sum(), model(torch.full((1, 8), scale)), None).backward()
            optimizer.step()
            optimizer.zero_grad()
    finally:
        type(pruner.method).exchange_ = exchange_
    assert seen["layer.weight"] == [11.0] * 8
