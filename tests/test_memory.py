"""What a search holds in memory, by torch's own storages: benchmarks/memory.py has the bytes of every method."""

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

import timm_tickets as tt
from timm_tickets import masks as m
from timm_tickets.gates import Gate
from timm_tickets.run import End
from timm_tickets.scores import magnitude


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
        m.prune(full, magnitude(weights), round(0.9 * count), scope)
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
    for run in pruner:
        rounds.add(run.round)
        optimizer = run.attach(torch.optim.SGD(model.parameters(), 0.1))
        model(torch.randn(4, 8)).sum().backward()
        optimizer.step()
        assert sum(type(one) is End for one in gc.get_objects()) == run.part
    assert len(rounds) > 1
