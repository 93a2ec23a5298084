"""Channels and heads: found, tried on the model, and refused where they cannot go."""

import copy

import pytest
import timm
import torch
from support.commands import call
from torch import nn
from torch.nn import functional

import timm_tickets as tt
from timm_tickets.sparse.subnet import Subnet
from timm_tickets.structure.find import find_groups
from timm_tickets.structure.groups import halves
from timm_tickets.structure.verify import EQUAL, outputs, perturb_, randomised, tried


class Net(nn.Module):
    """Whatever is given, on images of 3 channels."""

    def __init__(self, forward, **layers):
        super().__init__()
        self.layers, self.run = nn.ModuleDict(layers), forward
        self.in_chans = 3

    def forward(self, x):
        return self.run(self.layers, x)


def conv(inputs, outputs, **settings):
    return nn.Conv2d(inputs, outputs, 3, padding=1, **settings)


def families(model, **settings):
    found = find_groups(model, **settings)
    return {one.name.replace("layers.", "").replace(".weight", ""): one.count for one in found.families}, found


def test_a_plain_chain_has_a_group_for_each_channel_between_two_layers():
    def forward(layers, x):
        return layers["c"](functional.relu(layers["n"](layers["b"](functional.relu(layers["a"](x))))))

    model = Net(forward, a=conv(3, 8), b=conv(8, 6), n=nn.BatchNorm2d(6), c=conv(6, 4))
    found, groups = families(model)
    assert found == {"a -> b": 8, "b -> c": 6}
    assert {dim: index.tolist() for dim, index in groups.members(9).items()} == {
        ("layers.b.weight", 0): [1],
        ("layers.c.weight", 1): [1],
    }
    assert dict(groups.left) == {
        ("layers.a.weight", 1): "reads what stays: images, or channels that cannot go",
        ("layers.c.weight", 0): "is what the model puts out",
    }
    assert groups.positions["layers.b.weight"] == 64 * 64


def test_what_is_added_goes_together_and_what_is_concatenated_does_not():
    def forward(layers, x):
        x = layers["a"](x)
        x = x + layers["b"](x)
        return layers["d"](torch.cat([x, layers["c"](x)], 1))

    model = Net(forward, a=conv(3, 8), b=conv(8, 8), c=conv(8, 4), d=conv(12, 2))
    assert families(model)[0] == {"a + b -> b + c + d": 8, "c -> d": 4}


@pytest.mark.parametrize(("groups", "count"), [(8, 8), (4, 4), (2, 4)])
def test_of_a_grouped_convolution_goes_a_whole_group_or_the_same_place_of_each(groups, count):
    model = Net(lambda m, x: m["c"](m["b"](m["a"](x))), a=conv(3, 8), b=conv(8, 8, groups=groups), c=conv(8, 2))
    found, _ = families(model)
    assert set(found.values()) == {count}


def test_a_sliced_weight_and_what_is_multiplied_by_a_gate():
    def forward(layers, x):
        x = layers["a"](x)
        left = functional.conv2d(x, layers["b"].weight[:4], padding=1)
        right = functional.conv2d(x, layers["b"].weight[4:], padding=1)
        gate = layers["g2"](functional.relu(layers["g1"](x.mean((2, 3), keepdim=True)))).sigmoid()
        return layers["c"](left * right) + layers["e"](x * gate)

    model = Net(
        forward, a=conv(3, 8), b=conv(8, 8), c=conv(4, 2), g1=nn.Conv2d(8, 2, 1), g2=nn.Conv2d(2, 8, 1), e=conv(8, 2)
    )
    assert families(model)[0] == {"a + g2 -> b + g1 + e": 8, "b -> c": 4, "g1 -> g2": 2}


def test_a_head_goes_as_a_whole_and_a_normalised_stream_stays():
    model = timm.create_model("test_vit")
    groups = find_groups(model)
    assert [one.count for one in groups.families if one.kind == "head"] == [2] * 6
    head = groups.members(groups.families.index(groups.heads().families[0]))
    assert head["blocks.0.attn.proj.weight", 1].tolist() == list(range(32))
    assert head["blocks.0.attn.qkv.weight", 0].tolist() == [*range(32), *range(64, 96), *range(128, 160)]
    causes = dict(groups.left)
    assert causes["patch_embed.proj.weight", 0] == "LayerNorm binds all of them together"


def test_a_mean_over_channels_binds_them():
    model = Net(lambda m, x: m["b"](m["a"](x) * m["a"](x).mean(1, keepdim=True).sigmoid()), a=conv(3, 8), b=conv(8, 2))
    found, groups = families(model)
    assert found == {}
    assert dict(groups.left)["layers.a.weight", 0] == "mean binds all of them together"


def test_an_operation_that_nobody_knows_keeps_what_goes_through_it():
    model = Net(lambda m, x: m["b"](torch.fft.ifft(torch.fft.fft(m["a"](x))).real), a=conv(3, 8), b=conv(8, 2))
    found, groups = families(model)
    assert found == {}
    assert "goes through _fft" in dict(groups.left)["layers.a.weight", 0]


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext", "test_nfnet", "test_efficientnet"])
def test_on_timms_models_nothing_moves_when_what_nobody_reads_is_changed(name):
    """In double precision, with random values: by the bit, since zeros times anything are zeros."""
    torch.manual_seed(0)
    model = timm.create_model(name)
    groups = find_groups(model, classifier=True)
    assert groups.share() > 0.5
    assert groups.difference <= EQUAL
    work = randomised(model.double().eval())
    images = torch.randn(2, 3, 64 if name != "test_vit" else 160, 64 if name != "test_vit" else 160).double()
    for gone in halves(groups):
        plain = outputs(work, images)
        perturbed = copy.deepcopy(work)
        perturb_(dict(perturbed.named_parameters()), groups, gone)
        assert (outputs(perturbed, images) - plain).abs().max() > 1e-3 * plain.abs().max()  # read, they do matter
        ticket = copy.deepcopy(work)
        Subnet(ticket, tuple(groups.shapes)).set_mask_(groups.mask(gone))
        reads = copy.deepcopy(work)
        Subnet(reads, tuple(groups.shapes)).set_mask_(groups.mask(gone, reads_only=True))
        left, right = outputs(ticket, images), outputs(reads, images)
        # What a channel of NFNet keeps has mean zero but for rounding, so its zeros are not zero by the bit.
        assert torch.equal(left, right) or (
            name == "test_nfnet" and (left - right).abs().max() < 1e-13 * right.abs().max()
        )


def test_a_group_that_does_not_hold_is_found_out_and_named():
    model = timm.create_model("test_resnet").eval()
    groups = find_groups(model)
    lost = groups.families[3]
    broken = dict(groups.of)
    del broken[lost.reads[0]]  # as if nobody had seen that these read it
    groups.of = broken
    images = torch.randn(1, 3, 64, 64)
    kept = tried(model, images, groups, float("inf"))
    assert lost not in kept.families
    assert len(kept.families) == len(groups.families) - 1
    assert any("when it was tried, outputs changed" in why for (dim, why) in kept.left if dim == lost.makes[0])


def test_what_takes_too_long_is_said():
    with pytest.raises(tt.SettingError, match="were not found within 0 s; use granularity=weight"):
        find_groups(timm.create_model("test_resnet"), seconds=0)


def test_the_model_stays_as_it_is():
    model = timm.create_model("test_nfnet")
    before, types = {n: v.clone() for n, v in model.state_dict().items()}, [type(m) for m in model.modules()]
    model.train()
    find_groups(model)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [type(m) for m in model.modules()] == types


def test_a_layer_left_out_keeps_the_channels_that_it_reads():
    groups = find_groups(timm.create_model("test_resnet"), exclude=("layer3.0.conv2.weight",))
    assert not any("layer3.0.conv2" in one.name for one in groups.families)
    assert dict(groups.left)["layer3.0.conv1.weight", 0] == "read by layer3.0.conv2.weight: in exclude"


def test_what_mixes_positions_stays_and_the_channels_pass_through_it():
    def forward(layers, x):
        x = layers["a"](x).flatten(2).transpose(1, 2)
        return layers["c"](layers["b"](x.transpose(1, 2)).transpose(1, 2))

    model = Net(forward, a=nn.Conv2d(3, 8, 16, 16), b=nn.Linear(16, 16), c=nn.Linear(8, 2))
    model.pretrained_cfg = {"input_size": (3, 64, 64)}
    found, groups = families(model)
    assert found == {"a -> c": 8}
    assert dict(groups.left)["layers.b.weight", 0] == "mixes positions, not channels"


def test_a_stem_that_is_a_linear_layer_says_nothing_of_the_images():
    def forward(layers, x):
        return layers["b"](layers["a"](functional.unfold(x, 16, stride=16).transpose(1, 2)))

    model = Net(forward, a=nn.Linear(768, 8), b=nn.Linear(8, 2))
    model.pretrained_cfg = {"input_size": (3, 64, 64), "first_conv": "layers.a"}
    assert families(model)[0] == {"a -> b": 8}


def test_the_command_line_shows_what_goes_and_why_the_rest_does_not():
    def shown(*arguments):
        done = call("inspect", *arguments, COLUMNS="200")
        return done.exit_code, done.output

    code, told = shown("test_vit", "--granularity", "channel")
    assert code == 0
    assert "blocks.0.mlp.fc1.weight" in told
    assert "192 channels" in told
    assert "2 heads" in told
    assert "LayerNorm binds all of them together" in told
    assert "1164 groups, with 83.3% of the prunable weights in them" in told
    code, told = shown("test_resnet", "--granularity", "2:4")
    assert code == 0
    assert (
        told.index("cut as 2:4")
        < told.index("layer1.0.conv1.weight")
        < told.index("whole")
        < told.index("conv1.0.weight")
    )
    code, told = shown("test_vit", "--granularity", "rows")
    assert code == 2
    assert "--granularity: 'rows' is not valid; it is weight, channel, head" in told
