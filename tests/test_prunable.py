"""What may be pruned is found by what a parameter does, not by the model's name."""

import copy

import pytest
import timm
import torch
from support.commands import call
from timm.layers import CondConv2d
from torch import nn

import timm_tickets as tt
from timm_tickets.sparse.prunable import classifier_names, inspect_model


def on_meta(name):
    with torch.device("meta"):
        return timm.create_model(name)


class Raw(nn.Module):
    """Parameters of every role, most of them without a layer of their own."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.depthwise = nn.Conv2d(4, 4, 3, groups=4)
        self.linear = nn.Linear(4, 4)
        self.tied = nn.Linear(4, 4, bias=False)
        self.tied.weight = self.linear.weight
        self.lookup = nn.Embedding(5, 4)
        self.unembed = nn.Linear(4, 5, bias=False)
        self.unembed.weight = self.lookup.weight
        self.attention = nn.MultiheadAttention(4, 2)
        self.rnn = nn.LSTM(4, 3, bidirectional=True, batch_first=True)
        self.experts = CondConv2d(4, 4, 3, num_experts=2)
        self.norm = nn.LayerNorm((5, 4))
        self.proj = nn.Parameter(torch.randn(6, 4))
        self.q_kernel = nn.Parameter(torch.randn(4, 4))
        self.pos_embed = nn.Parameter(torch.randn(1, 5, 4))
        self.rel_pos_h = nn.Parameter(torch.randn(5, 4))
        self.attention_biases = nn.Parameter(torch.randn(2, 5))
        self.reg_token = nn.Parameter(torch.randn(1, 3, 4))
        self.layer_gamma = nn.Parameter(torch.randn(2, 4))
        self.w_g = nn.Parameter(torch.randn(4, 1))

    def forward(self, x):
        x = self.tied(self.linear(x + self.pos_embed)).relu()
        return self.rnn(x @ self.q_kernel)[0] @ self.proj


PRUNABLE = {
    **{"conv.weight": "convolution", "depthwise.weight": "convolution", "linear.weight": "linear"},
    **{"attention.in_proj_weight": "projection", "attention.out_proj.weight": "linear"},
    **{f"rnn.weight_{part}_l0{way}": "recurrent" for part in ("ih", "hh") for way in ("", "_reverse")},
    **{"experts.weight": "experts", "proj": "matrix", "q_kernel": "matrix"},
}
LEFT = {
    **{"lookup.weight": "embedding", "norm.weight": "scale", "norm.bias": "scale", "pos_embed": "positions"},
    **{"rel_pos_h": "positions", "attention_biases": "bias", "reg_token": "tokens", "layer_gamma": "scale"},
    **{"w_g": "vector", "conv.bias": "vector"},
}


def test_each_role_is_told():
    parts = {part.name: part for part in inspect_model(Raw())}
    assert {name: part.kind for name, part in parts.items() if not part.why_not} == PRUNABLE
    for name, kind in LEFT.items():
        assert parts[name].kind == kind
        assert parts[name].why_not
    assert list(parts) == [name for name, _ in Raw().named_parameters()]


def test_a_parametrized_weight_is_left_to_whoever_parametrized_it():
    model = nn.Sequential(nn.Linear(3, 3), nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)))
    assert tt.prunable_names(model) == ["0.weight"]


@pytest.mark.parametrize(
    ("name", "leaf", "least"),
    [("efficientnet_cc_b0_4e", "conv_pw.weight", 0.95), ("sequencer2d_s", "rnn_h.weight_hh_l0_reverse", 0.99)],
)
def test_experts_and_recurrent_weights_of_timm(name, leaf, least):
    model = on_meta(name)
    names = tt.prunable_names(model)
    assert any(one.endswith(leaf) for one in names)
    parts = inspect_model(model, classifier=True)
    assert sum(p.size for p in parts if not p.why_not) / sum(p.size for p in parts) > least


def test_a_classifier_may_be_a_name_a_tuple_or_missing():
    assert classifier_names(on_meta("test_resnet")) == ("fc",)
    crossvit = on_meta("crossvit_tiny_240")
    assert classifier_names(crossvit) == ("head.0", "head.1")
    assert not any(name.startswith("head.") for name in tt.prunable_names(crossvit))
    encoder = on_meta("test_vit")
    encoder.reset_classifier(0)
    encoder.pretrained_cfg = {**encoder.pretrained_cfg, "classifier": None}  # as timm's encoders have it
    assert classifier_names(encoder) == ()
    assert tt.prunable_names(encoder)


def test_a_classifier_that_another_module_holds_too_is_found():
    model = on_meta("test_resnet")
    model.conv1.head = model.fc
    assert not any("head" in name or "fc" in name for name in tt.prunable_names(model))


def step(model, optimizer, x):
    model(x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.filterwarnings("ignore:.*trained up to epoch 1 of a schedule of 20", "ignore:.*has not moved its mask")
def test_gates_on_raw_tied_and_recurrent_weights():
    """Behind a gate a pruned weight has no say, wherever the model reads it; the model can be copied meanwhile."""
    torch.manual_seed(0)
    model, other = Raw(), Raw()
    keys, order = list(model.state_dict()), [name for name, _ in model.named_parameters()]
    x = torch.randn(2, 5, 4)
    used = ("linear.*", "rnn.*", "proj", "q_kernel")
    pruner = tt.create_pruner("edge_popup", model, sparsity=0.5, weights="given", include=used)
    for run in pruner:
        run.batches_per_epoch = 1
        optimizer = run.attach(torch.optim.SGD(model.parameters(), 0.1))
        step(model, optimizer, x)
        logits = model(x)
        with torch.no_grad():
            for name, weight in pruner.subnet.weights().items():
                weight.add_(~pruner.subnet.mask[name] * 3.0)
        assert torch.equal(model(x), logits)
        assert torch.equal(copy.deepcopy(model)(x), logits)  # as an average of the weights does
    assert torch.equal(copy.deepcopy(model)(x), logits)
    assert torch.equal(model(x), logits)
    assert model.tied.weight is model.linear.weight
    assert list(model.state_dict()) == keys
    assert [name for name, _ in model.named_parameters()] == order
    assert torch.equal(pruner.ticket.apply_(other)(x), logits)


def test_masks_in_place_on_raw_tied_and_recurrent_weights(tmp_path):
    torch.manual_seed(0)
    model = Raw()
    ticket = tt.create_pruner("magnitude", model, sparsity=0.5).ticket
    assert all(torch.equal(value, ticket.values[name]) for name, value in model.state_dict().items())
    x = torch.randn(2, 5, 4)
    logits = model(x)
    ticket.save(tmp_path / "raw.ticket")
    assert torch.equal(tt.load_ticket(tmp_path / "raw.ticket").apply_(Raw())(x), logits)
    optimizer = ticket.attach(model, torch.optim.AdamW(model.parameters(), 0.1))
    for _ in range(2):
        step(model, optimizer, x)
        assert all(not model.get_parameter(name)[~mask].any() for name, mask in ticket.masks.items())
    assert not torch.equal(model(x), logits)


def test_a_ticket_made_of_a_model_is_masked_under_every_name_of_a_weight():
    model = Raw()
    masks = {"linear.weight": torch.eye(4, dtype=torch.bool)}
    ticket = tt.Ticket.of(model, masks)
    assert torch.equal(ticket.values["tied.weight"], ticket.values["linear.weight"])
    assert not ticket.values["tied.weight"][~masks["linear.weight"]].any()


def inspect(*args):
    return call("inspect", *args, COLUMNS="200")


def test_inspect_shows_layers_shares_and_reasons():
    out = inspect("test_vit").output
    for words in ("blocks.0.attn.qkv.weight", "linear", "192x64", "pos_embed", "looked up or added", "classifier"):
        assert words in out, words
    lines = out.splitlines()
    parts = inspect_model(on_meta("test_vit"))
    prunable = [part for part in parts if not part.why_not]
    (whole,) = (line for line in lines if f"{len(prunable)} layers" in line)
    share = sum(part.size for part in prunable) / sum(part.size for part in parts)
    assert whole.split()[-1] == f"{share:.2%}"
    out = inspect("test_vit", "--exclude", "blocks.*", "--classifier", "--set", "num_classes=7").output
    assert "in exclude" in out
    assert "head.weight" in out
    assert "7x64" in out


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["test_vot"], "did you mean 'test_vit'"),
        (["test_vit", "--exclude", "blokcs.*"], "matches none"),
        (["test_vit", "--set", "num_classes"], "write key=value"),
        (["test_vit", "--set", "widht=3"], "cannot be built"),
    ],
)
def test_inspect_refuses_what_is_wrong_in_one_sentence(args, words):
    out = inspect(*args)
    assert out.exit_code == 2
    assert out.stderr.startswith("error: ")
    assert words in out.stderr
