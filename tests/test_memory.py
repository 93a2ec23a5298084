"""What a search holds in memory, by torch's own storages: benchmarks/memory.py has the bytes of every method."""

import copy
import gc
import math
import weakref

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

import timm_tickets as tt
from timm_tickets.core import masks as m
from timm_tickets.core.scores import magnitude, random
from timm_tickets.pruning.run_end import End
from timm_tickets.sparse.gates import Gate, SigmoidGate, SigmoidSum


class Made(TorchDispatchMode):
    """Bytes of the live storages that were made within, and the most there were."""

    def __init__(self):
        super().__init__()
        self.live, self.peak = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {one.untyped_storage()._cdata for one in tree_iter((args, kwargs)) if isinstance(one, torch.Tensor)}
        for one in tree_iter(out):
            storage = one.untyped_storage() if isinstance(one, torch.Tensor) else None
            if storage is not None and storage._cdata not in self.live and storage._cdata not in given:
                key = storage._cdata
                self.live[key] = storage.nbytes(), weakref.ref(storage, lambda _, key=key: self.live.pop(key))
        self.peak = max(self.peak, sum(size for size, _ in self.live.values()))
        return out


@pytest.mark.parametrize("scope", ["global", "layerwise"])
def test_a_cut_takes_little_more_than_the_masks_it_makes(scope):
    weights = {str(layer): torch.randn(256, 256) for layer in range(64)}
    full = m.full_masks(weights)
    count = m.total(full)
    with Made() as made:
        m.cut(full, magnitude(weights), round(0.1 * count), scope)
    assert made.peak < 2.5 * count


def test_a_gate_keeps_nothing_for_its_backward_but_what_is_there():
    weight, gate = torch.randn(512, 512), Gate(torch.randn(512, 512), torch.ones(512, 512) > 0, by_magnitude=True)
    with Made() as made:
        out = gate(weight)
    assert sum(size for size, _ in made.live.values()) == out.nbytes
    out.sum().backward()
    assert torch.equal(gate.score.grad, gate.score.sign() * weight)


@pytest.mark.parametrize("name", ["imp", "colt"])
def test_what_a_round_ended_with_is_gone_while_the_next_is_trained(name):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    model.num_classes = 2
    pruner = tt.create_pruner(name, model, sparsity=0.8, prune_rate=0.3, epochs=1, exclude=("1.*",))
    rounds = set()
    gc.collect()  # what other tests have left
    for run in pruner:
        rounds.add(run.round)
        optimizer = run.attach(torch.optim.SGD(model.parameters(), 0.1))
        run.loss(
            lambda output, _: output.sum(), model(torch.randn(4, 8)), torch.full((4,), (run.classes or [0])[0])
        ).backward()
        optimizer.step()
        assert sum(type(one) is End and len(one.state) > 0 for one in gc.get_objects()) == run.part
    assert len(rounds) > 1


def two_layers():
    model = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 2))
    model.num_classes = 2
    return model


def searched(name, model, folder=None, **settings):
    pruner = tt.create_pruner(name, model, folder=folder, sparsity=0.8, epochs=1, exclude=("1.*",), **settings)
    for run in pruner:
        run.batches_per_epoch = 4
        optimizer = run.attach(torch.optim.SGD(model.parameters(), 0.1, momentum=0.9))
        for _ in range(4):
            loss = run.loss(lambda output, _: output.square().sum(), model(torch.ones(4, 256)), torch.zeros(4))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return pruner


@pytest.mark.filterwarnings("ignore:jackpot", "ignore:.*has not moved its mask")
@pytest.mark.parametrize("name", ["edge_popup", "jackpot", "gradual", "set", "rigl"])
def test_a_search_that_ends_trained_keeps_no_state_to_rewind_to(name, monkeypatch):
    starts = []
    monkeypatch.setattr(
        tt.Training, "_stepped", lambda run, old=tt.Training._stepped: (starts.append(run.subnet.start), old(run))
    )
    pruner = searched(name, two_layers())
    assert starts == [None] * 4
    assert pruner.ticket.sparsity == pytest.approx(0.8, abs=1e-4)


def test_a_rewind_point_takes_the_place_of_the_start():
    model = two_layers()
    given = model[0].weight.detach().clone()
    pruner = tt.create_pruner("imp", model, sparsity=0.5, prune_rate=0.5, epochs=1, rewind="2it", exclude=("1.*",))
    run = next(pruner)
    optimizer, seen = run.attach(torch.optim.SGD(model.parameters(), 0.1)), []
    for _ in range(3):
        model(torch.ones(4, 256)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append((model[0].weight.detach().clone(), pruner.subnet.start["0.weight"]))
    assert torch.equal(seen[0][1], given)
    assert torch.equal(seen[1][1], seen[1][0])
    assert torch.equal(seen[2][1], seen[1][0])
    assert next(pruner, None) is None
    assert torch.equal(pruner.ticket.values["0.weight"], seen[1][0] * pruner.ticket.masks["0.weight"])


def test_a_search_s_ticket_takes_the_place_of_its_start():
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(16)))
    pruner = tt.create_pruner("random", model, sparsity=0.8)
    assert list(pruner) == []
    with Made() as made:
        ticket = pruner.ticket
    assert made.peak < 2 * 5 * 64 * 64  # a layer and its mask, of sixteen
    for name, mask in ticket.masks.items():
        assert torch.equal(ticket.values[name], model.get_parameter(name).detach())
        assert torch.equal(ticket.values[name] != 0, mask)
    ticket.values["0.bias"] = torch.ones(64)
    assert torch.equal(pruner.ticket.values["0.bias"], model[0].bias)


def test_the_first_state_is_read_from_the_folder(tmp_path):
    model = two_layers()
    given = model[0].weight.detach().clone()
    pruner = searched("gradual", model, tmp_path)
    assert torch.equal(pruner.first_state["0.weight"], given)
    assert not torch.equal(model[0].weight, given)
    again = tt.create_pruner("gradual", two_layers(), folder=tmp_path, sparsity=0.8, epochs=1, exclude=("1.*",))
    assert torch.equal(again.first_state["0.weight"], given)  # before it is iterated
    homeless = searched("gradual", two_layers())
    with pytest.raises(tt.SettingError, match="create the pruner with one"):
        homeless.first_state  # noqa: B018


def test_masks_are_held_only_where_something_is_pruned():
    model = two_layers()
    subnet = tt.Subnet(model, ("0.weight", "1.weight"))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    with Made() as made:
        subnet.hold_(optimizer)
    assert not made.live
    mask = torch.ones(256, 256, dtype=torch.bool).triu()
    subnet.set_mask_({"0.weight": mask, "1.weight": torch.ones(2, 256, dtype=torch.bool)})
    for _ in range(2):
        model(torch.randn(4, 256)).square().sum().backward()
        optimizer.step()
    assert torch.equal(model[0].weight != 0, mask)
    assert bool((optimizer.state[model[0].weight]["momentum_buffer"][~mask] == 0).all())
    assert set(subnet._holder._held) == {"0.weight"}


def test_a_penalty_keeps_no_sigmoids_and_has_their_gradient_bit_for_bit():
    score, beta = torch.randn(512, 512, requires_grad=True), torch.tensor(3.7)
    (torch.sigmoid(beta * score).sum() * 0.3).backward()
    expected, score.grad = score.grad, None
    with Made() as made:
        out = SigmoidSum.apply(beta, score)
    assert sum(size for size, _ in made.live.values()) == out.nbytes
    (out * 0.3).backward()
    assert torch.equal(score.grad, expected)


def test_the_penalty_reaches_the_scores_last_and_not_before_the_layers_let_go():
    def step(early):
        model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(16)))
        pruner = tt.create_pruner("continuous_sparsification", model, sparsity=0.8, epochs=1, rewind="0ep")
        run = next(pruner)
        run.batches_per_epoch = 4
        run.attach(torch.optim.SGD(model.parameters(), 0.1))
        for gate in pruner.subnet.gates.values():
            gate._sum = gate._sum if early else None
        with Made() as made:
            loss = run.loss(lambda output, _: output.square().sum(), model(torch.ones(4, 64)), torch.zeros(4))
            loss.backward()
        return made.peak, [gate.score.grad for gate in pruner.subnet.gates.values()]

    torch.manual_seed(0)
    peak, gradients = step(early=True)
    torch.manual_seed(0)
    late, expected = step(early=False)
    assert all(map(torch.equal, gradients, expected))
    assert peak < 0.8 * late


def test_a_sum_made_before_its_scores_changed_is_not_used():
    gate = SigmoidGate(torch.zeros(3), torch.ones(3, dtype=torch.bool))
    gate.harden_(2.0)
    with torch.no_grad():
        gate.score.fill_(1)
    assert gate.sum().item() == pytest.approx(3 / (1 + math.exp(-2)))
    gate.harden_(2.0)
    gate.score = nn.Parameter(torch.full((3,), 2.0))  # as wrappers do
    assert gate.sum().item() == pytest.approx(3 / (1 + math.exp(-4)))


def test_random_scores_are_the_same_in_whatever_order_they_are_read():
    weights = {name: torch.empty(3, 5) for name in "abc"}
    one, other = random(weights, 7), random(weights, 7)
    backward = {name: other[name] for name in "cab"}
    assert all(torch.equal(one[name], backward[name]) and torch.equal(one[name], other[name]) for name in "abc")
    assert not torch.equal(one["a"], one["b"])


def test_a_model_behind_soft_gates_can_be_copied_between_two_steps():
    model = two_layers()
    pruner = tt.create_pruner("continuous_sparsification", model, sparsity=0.8, epochs=1, rewind="0ep")
    run = next(pruner)
    run.batches_per_epoch = 4
    optimizer = run.attach(torch.optim.SGD(model.parameters(), 0.1))
    run.loss(lambda output, _: output.square().sum(), model(torch.ones(4, 256)), torch.zeros(4)).backward()
    optimizer.step()
    twin = copy.deepcopy(model)
    assert torch.equal(twin(torch.ones(1, 256)), model(torch.ones(1, 256)))
