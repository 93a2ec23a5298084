"""Gradual pruning, SET and RigL: schedules, drop and grow."""

from itertools import pairwise

import pytest
import timm
import torch
from torch import nn

import timm_tickets as tt
from timm_tickets.core.masks import exchange


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


def trained(pruner, steps, batches_per_epoch, lr=0.05):
    """A run of so many steps on noise; the sparsities and the masks after each."""
    run, model = next(pruner), pruner.subnet.model
    optimizer = run.attach(torch.optim.SGD(model.parameters(), lr))
    run.batches_per_epoch = batches_per_epoch
    sparsities, masks = [], []
    for _ in range(steps):
        loss = run.loss(nn.functional.cross_entropy, model(torch.randn(4, 3, 32, 32)), torch.arange(4))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        sparsities.append(pruner.subnet.sparsity)
        masks.append(pruner.subnet.mask)
    return sparsities, masks


def moves(masks):
    """The steps, from 1, at which a mask differs from the one before."""
    return [i for i, (a, b) in enumerate(pairwise(masks), 2) if any(not torch.equal(a[name], b[name]) for name in a)]


@pytest.mark.filterwarnings("ignore:.*no gradient reaches")
@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        ("set", {}, [10, 20]),  # once an epoch of 10 steps, but not at the end
        ("rigl", {}, [2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22]),  # a tenth of the 22.5 steps until 0.75
        ("gradual", {}, [*range(2, 23), 23]),  # a twentieth of 22.5: at every step
        ("set", {"interval": 7}, [7, 14, 21, 28]),
    ],
)
def test_the_default_interval_follows_the_runs_length(model, name, settings, expected):
    """With an interval of 100 steps nothing would ever move in these 30."""
    pruner = tt.create_pruner(name, model, sparsity=0.9, epochs=3, **settings)
    _, masks = trained(pruner, 30, 10)
    assert moves(masks) == expected
    assert next(pruner, None) is None  # and nothing is warned of


@pytest.mark.filterwarnings("ignore:.*no gradient reaches")
def test_the_default_interval_is_a_hundred_steps_in_long_runs(model):
    run = next(tt.create_pruner("rigl", model, sparsity=0.9, epochs=100))
    run.batches_per_epoch = 400
    assert run.every(None, 0.075) == 100
    assert run.every(7, 0.075) == 7
    run.step, run.batches = 10, 40  # four batches a step
    assert (run.steps_per_epoch, run.every(None, 0.001)) == (100, 10)


@pytest.mark.parametrize("name", ["set", "rigl"])
def test_a_mask_that_never_moved_is_told(model, name):
    pruner = tt.create_pruner(name, model, sparsity=0.9, epochs=1, interval=100)
    trained(pruner, 10, 10)
    with pytest.warns(UserWarning, match="round_00 has not moved its mask in 10 steps.*interval") as told:
        assert next(pruner, None) is None
    assert told[0].filename == __file__


def test_gradual_says_what_was_pruned_after_the_training(model):
    pruner = tt.create_pruner("gradual", model, sparsity=0.9, epochs=10)
    sparsities, _ = trained(pruner, 10, 10)
    assert sparsities[-1] == pytest.approx(0.9 * (1 - (1 - 0.09 / 0.75) ** 3), abs=1e-4)  # at step 9
    with pytest.warns(UserWarning, match="gradual|schedule") as told:
        assert next(pruner, None) is None
    texts = [str(one.message) for one in told]
    assert any("trained up to epoch 1 of a schedule of 10" in text for text in texts)
    assert any(f"ended at sparsity {sparsities[-1]:.4f}, not at the asked 0.9" in text for text in texts)
    assert pruner.sparsity == pytest.approx(0.9, abs=1e-5)


@pytest.mark.parametrize("name", ["set", "rigl"])
def test_the_first_layer_stays_whole_where_asked(model, name):
    pruner = tt.create_pruner(name, model, sparsity=0.9, epochs=1, interval=1, distribution="uniform", dense_first=True)
    _, masks = trained(pruner, 5, 10)
    first, *others = masks[-1].values()
    assert first.all()
    assert pruner.subnet.sparsity == pytest.approx(0.9, abs=1e-5)
    densities = [mask.float().mean().item() for mask in others]
    assert max(densities) - min(densities) < 0.01
    assert moves(masks)
    with pytest.raises(
        tt.SettingError, match=r"pruner\.dense_first: \d+ weights are to be pruned, and the other layers"
    ):
        list(tt.create_pruner(name, timm.create_model("test_resnet"), sparsity=0.9999, dense_first=True))


@pytest.mark.parametrize("set_to_none", [True, False])
def test_rigl_forgets_the_gradients_of_a_step_that_a_scaler_skipped(set_to_none):
    """In fp16 the first steps overflow: what they left would make the next exchange die of NaN, or grow at random."""
    torch.manual_seed(0)
    model = Line()
    pruner = tt.create_pruner("rigl", model, sparsity=0.5, interval=1, drop_rate=0.5, until=1.0, epochs=1)
    run = next(pruner)
    optimizer = run.attach(torch.optim.SGD(model.parameters(), 0.01))
    run.batches_per_epoch = 100
    pruner.subnet.tap_(True)
    bad = torch.full((1, 8), torch.inf) if not set_to_none else torch.full((1, 8), 1000.0)
    run.loss(lambda output, _: output.sum(), model(bad), None).backward()
    optimizer.zero_grad(set_to_none=set_to_none)  # the scaler has skipped the step
    run.loss(lambda output, _: output.sum(), model(torch.arange(1.0, 9.0)[None]), None).backward()
    seen = pruner.subnet.dense_gradients()["layer.weight"].flatten().tolist()
    assert seen == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]
    optimizer.step()
    assert pruner.subnet.sparsity == 0.5


@pytest.mark.parametrize("name", ["set", "rigl"])
def test_layers_keep_their_density_while_masks_move(model, name):
    pruner = tt.create_pruner(name, model, sparsity=0.9, interval=2, until=1.0, epochs=1)
    run = next(pruner)
    optimizer = run.attach(torch.optim.SGD(model.parameters(), 0.05, momentum=0.9))
    run.batches_per_epoch = 6
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
