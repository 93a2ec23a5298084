"""What leans on private parts of other libraries: each test says what changed, where a new version breaks it."""

from types import SimpleNamespace

import pytest
import timm
import torch
import torch_pruning as tp
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from packaging.version import Version
from timm.optim import create_optimizer_v2
from torch import nn
from torch._dynamo.utils import counters

import timm_tickets as tt
from timm_tickets.core import private


def test_accelerate_reads_the_number_of_processes_from_its_shared_dictionaries():
    state = PartialState()
    (shared, _), count = private.accelerate_states(), state.num_processes
    try:
        shared["num_processes"] = 7
        assert state.num_processes == 7, "Accelerate no longer shares PartialState._shared_state: see processes.apart"
    finally:
        shared["num_processes"] = count


def test_accelerate_takes_another_precision_once_its_state_is_reset():
    for precision in ("bf16", "no"):
        private.allow_precision(precision)
        found = Accelerator(mixed_precision=precision).mixed_precision
        assert found == precision, "Accelerate keeps its first precision: _reset_state no longer resets it"
    assert "_mixed_precision" in AcceleratorState._shared_state, "Accelerate's state no longer names _mixed_precision"


def test_accelerate_lets_go_of_a_loader():
    accelerator = Accelerator()
    loader = torch.utils.data.DataLoader([torch.zeros(1)])
    accelerator.prepare_data_loader(loader)
    assert len(accelerator._dataloaders) == 1, "Accelerate no longer keeps its loaders in _dataloaders"
    private.forget_loaders_(accelerator)
    assert accelerator._dataloaders == []


def test_torch_takes_another_default_group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    world = torch.distributed.group.WORLD
    other = torch.distributed.new_group([0])
    try:
        private.set_world_(other)
        assert torch.distributed.group.WORLD is other, "torch.distributed.group.WORLD can no longer be set"
        assert torch.distributed.distributed_c10d._get_default_group() is other, "torch no longer reads it from there"
    finally:
        private.set_world_(world)
        torch.distributed.destroy_process_group()


def test_what_a_failed_recording_leaves_in_torch_is_let_go_of(monkeypatch):
    told = []
    card = SimpleNamespace(clone_state=lambda: "as it was before", graphsafe_set_state=told.append)
    assert all(hasattr(torch.Generator, name) for name in vars(card)), "torch's generators no longer have these"
    monkeypatch.setattr(torch.cuda, "default_generators", (None, card))
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda *args: told.append(args), raising=False)
    private.forget_capture_(torch.device("cuda", 1), (0, 7))
    assert told == ["as it was before", (1, (0, 7))]


def test_torch_counts_changes_in_place():
    tensor = torch.zeros(2)
    before = private.changes_of(tensor)
    tensor.add_(1)
    assert private.changes_of(tensor) > before, "torch.Tensor._version no longer counts changes in place"


def test_the_model_inside_a_compiled_one_is_found():
    model = nn.Linear(2, 2)
    compiled = torch.compile(model, backend="eager")
    assert private.inside_compiled(compiled) is model, "torch.compile's wrapper no longer has _orig_mod"
    assert private.inside_compiled(model) is None


def test_a_recurrent_module_reads_its_flat_weights():
    module = nn.GRU(2, 2)
    private.forget_flat_weights_(module)
    assert [w.requires_grad for w in module._flat_weights] == [False] * 4, "nn.RNNBase no longer keeps _flat_weights"
    assert module(torch.zeros(1, 1, 2))[0].shape == (1, 1, 2)


@pytest.mark.parametrize("name", ["lookahead_sgd", "sgd"])
def test_the_optimizer_inside_timms_lookahead_is_found(name):
    optimizer = create_optimizer_v2(timm.create_model("test_resnet"), name, lr=0.1)
    inside = private.inside_lookahead(optimizer)
    if name == "sgd":
        assert inside is None
    else:
        assert isinstance(inside, torch.optim.SGD), "timm's Lookahead no longer has _base_optimizer"


def test_a_model_that_was_scored_reads_the_biases_of_a_ticket():
    models, images = [], torch.randn(2, 3, 64, 64)
    for seed in range(2):
        torch.manual_seed(seed)
        models.append(timm.create_model("efficientvit_m0", img_size=64, num_classes=2).eval())
        for parameter in models[-1].parameters():
            if parameter.ndim < 4:  # also the norms that let nothing of attention through as they are made
                nn.init.normal_(parameter)
    with torch.no_grad():
        model, scored = models
        scored(images)
        kept = [module.attention_bias_cache for module in scored.modules() if hasattr(module, "attention_bias_cache")]
        assert all(kept), "timm no longer keeps biases in attention_bias_cache"
        ticket = tt.create_pruner("magnitude", model, sparsity=0.5).ticket
        assert torch.equal(ticket.apply_(scored)(images), model(images))


def test_torch_prunings_groups_know_their_graph():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    graph = tp.DependencyGraph().build_dependency(model, torch.zeros(1, 2))
    group = graph.get_pruning_group(model[0], tp.prune_linear_out_channels, [0])
    assert private.graph_of(group) is graph, "torch_pruning.Group no longer keeps its graph in _DG"


def test_a_regulariser_of_torch_prunings_needs_no_graph_of_its_own():
    """That it adds what it adds on its own groups is in tests/test_torch_pruning.py."""
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    own = tp.pruner.GroupNormPruner(model, torch.zeros(1, 2), tp.importance.MagnitudeImportance())
    made = private.regulariser(tp.pruner.GroupNormPruner, own.DG, own._groups, own.importance, reg=own.reg, cnt=0)
    read = {name for name in vars(own) if name in tp.pruner.GroupNormPruner.regularize.__wrapped__.__code__.co_names}
    assert read <= vars(made).keys(), "torch-pruning's regularize reads more than core/private.py sets"
    assert own._groups, "torch-pruning's regularising pruners no longer keep their groups in _groups"


def test_a_function_with_gradients_in_it_is_one_graph_and_what_cannot_be_says_so():
    class Loss:
        weight = torch.ones(2, requires_grad=True)

        def gradient(self, x):
            return torch.autograd.grad((self.weight * x).sum(), [self.weight])[0]

        def asking(self, x):
            torch._dynamo.graph_break()
            return x

    if Version(torch.__version__) < Version("2.11"):
        assert not private.traces_gradients()
        return
    assert private.traces_gradients(), "torch no longer has trace_autograd_ops"
    x = torch.tensor([2.0, 3.0])
    counters.clear()
    assert private.compiled(Loss().gradient, "eager", one_graph=True)(x).tolist() == [2, 3]
    assert counters["stats"]["unique_graphs"] == 1
    with pytest.raises(private.untraceable()):
        private.compiled(Loss().asking, "eager", one_graph=True)(x)
    assert private.compiled(Loss().asking, "eager", one_graph=False)(x).tolist() == [2, 3]
