"""torch.compile: one graph a model, and none again when masks, scales or the schedule of a soft mask change."""

import pytest
import timm
import torch

import timm_tickets as tt
from timm_tickets.sparse.gates import SigmoidGate

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of torch's own tracer
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*have a score above zero"),
]


class Graphs:
    """A backend that runs what it is given as it is, and counts it."""

    def __init__(self):
        self.count = 0

    def __call__(self, graph, inputs):
        self.count += 1
        return graph.forward


def compiled(model):
    torch._dynamo.reset()
    graphs = Graphs()
    # fullgraph: a break of the graph is an error.
    return torch.compile(model, backend=graphs, fullgraph=True, dynamic=False), graphs


def step(model, optimizer, seed):
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(seed))
    model(images).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def build(name):
    torch.manual_seed(0)
    more = {"img_size": 64} if name == "test_vit" else {}
    return timm.create_model(name, num_classes=4, **more).train()


families = pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext"])


@families
def test_masks_in_place(name):
    model = build(name)
    run, graphs = compiled(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    subnet = tt.Subnet(run, tt.prunable_names(run))
    masks = subnet.mask
    for seed in range(4):
        subnet.set_mask_(tt.shuffled_masks({n: torch.rand(m.shape) > 0.5 for n, m in masks.items()}, seed))
        subnet.hold_(optimizer)  # anew, as each run of a search does
        step(run, optimizer, seed)
        assert all(not w[~subnet.mask[n]].any() for n, w in subnet.weights().items())
        subnet.set_mask_(tt.shuffled_masks(subnet.mask, seed))  # moved while held, as in RigL
        step(run, optimizer, seed)
        assert all(not w[~subnet.mask[n]].any() for n, w in subnet.weights().items())
    assert graphs.count == 1


@pytest.mark.filterwarnings(
    "ignore:.*was trained without the method's penalty"
)  # masks that harden are what counts here
@families
@pytest.mark.parametrize(
    ("method", "rate", "settings"),
    [
        ("edge_popup", 0.3, {"scale": "dynamic", "scope": "global"}),
        ("frozen_slt", 0.3, {}),
        ("continuous_sparsification", 0.01, {"rounds": 2, "rewind": "0ep"}),
    ],
)
def test_learned_gates(name, method, rate, settings):
    model = build(name)
    pruner = tt.create_pruner(method, model, sparsity=0.5, epochs=2, **settings)
    run, graphs = compiled(model)
    seen, betas = [pruner.subnet.mask], set()
    for one in pruner:
        one.batches_per_epoch = 2
        optimizer = one.attach(torch.optim.SGD(model.parameters(), rate))
        for seed in range(4):
            step(run, optimizer, seed)
            seen.append(pruner.subnet.mask)
            betas |= {gate.beta.item() for gate in pruner.subnet.gates.values() if isinstance(gate, SigmoidGate)}
    assert graphs.count == 1
    if method == "continuous_sparsification":
        assert len(betas) > 3
    else:
        assert any(not torch.equal(mask, seen[1][name]) for name, mask in seen[-1].items())


def test_the_graph_is_the_plain_models():
    """Masks in place add no operation."""
    counts = []

    def backend(graph, inputs):
        counts.append(len(graph.graph.nodes))
        return graph.forward

    for masked in (False, True):
        torch._dynamo.reset()
        model = build("test_resnet")
        if masked:
            ticket = tt.create_pruner("magnitude", model, sparsity=0.5).ticket
            ticket.attach(model, torch.optim.SGD(model.parameters(), 0.01))
        torch.compile(model, backend=backend, fullgraph=True)(torch.randn(2, 3, 32, 32))
    assert counts[0] == counts[1]
