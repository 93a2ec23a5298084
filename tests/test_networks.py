import subprocess
import sys

import pytest
import timm
import torch
from support import started
from torch import nn

import timm_tickets as tt

NAMES = timm.list_models("cifar_*")


def weights_of(model, *kinds):
    return sum(module.weight.numel() for module in model.modules() if isinstance(module, kinds))


def build(name, **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, **kwargs)


def test_the_papers_networks_are_there():
    resnets = {f"cifar_resnet{depth}" for depth in (18, 20, 32, 34, 56)}
    assert set(NAMES) == resnets | {f"cifar_conv{depth}" for depth in (2, 4, 6)} | {"cifar_vgg16_bn", "cifar_vgg19_bn"}


@pytest.mark.parametrize("name", NAMES)
def test_each_behaves_as_a_timm_model(name):
    model = build(name, num_classes=7, drop_rate=0.1)
    images = torch.randn(2, 3, 32, 32)
    out = model(images)
    assert out.shape == (2, 7)
    out.square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())
    model.eval()
    features = model.forward_features(images)
    assert features.shape[:2] == (2, model.num_features)
    assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size)
    assert torch.equal(model.forward_head(features), model(images))
    assert model.get_classifier().out_features == model.num_classes == 7
    model.reset_classifier(3)
    assert model(images).shape == (2, 3)
    assert model.num_classes == 3
    model.reset_classifier(0)
    assert torch.equal(model(images), model.forward_head(features, pre_logits=True))
    config = model.pretrained_cfg
    assert (config["input_size"], config["num_classes"], config["crop_pct"]) == ((3, 32, 32), 10, 1.0)
    one = build(name, in_chans=1)
    assert one(images[:, :1]).shape == (2, 10)
    assert one.get_submodule(config["first_conv"]).in_channels == 1
    assert one.get_submodule(config["classifier"]) is one.get_classifier()
    fresh = build(name, in_chans=1)
    nn.init.zeros_(fresh.get_submodule(config["first_conv"]).weight)
    fresh.load_state_dict(one.state_dict())
    assert torch.equal(fresh.eval()(images[:, :1]), one.eval()(images[:, :1]))


def test_parameter_counts_are_the_papers():
    assert weights_of(build("cifar_resnet18"), nn.Conv2d, nn.Linear) == 11_164_352
    assert weights_of(build("cifar_conv6"), nn.Conv2d, nn.Linear) == 2_261_184
    assert weights_of(build("cifar_resnet20"), nn.Conv2d) == 267_696
    wide = build("cifar_resnet32", width=2)
    assert weights_of(wide, nn.Conv2d) == 1_844_064
    assert weights_of(wide, nn.Conv2d, nn.Linear) == 1_845_344
    depths = {"vgg16_bn": 13, "vgg19_bn": 16, "resnet34": 33 + 3, "resnet56": 55, "conv2": 2, "conv4": 4}
    for name, count in depths.items():
        assert sum(isinstance(module, nn.Conv2d) for module in build(f"cifar_{name}").modules()) == count, name


def test_the_shortcut_without_parameters_takes_every_second_pixel_between_zeros():
    block = build("cifar_resnet20").layer2[0]
    x = torch.arange(16 * 4 * 4, dtype=torch.float32).view(1, 16, 4, 4)
    out = block.downsample(x)
    assert out.shape == (1, 32, 2, 2)
    assert torch.equal(out[:, 8:24], x[:, :, ::2, ::2])
    assert not out[:, :8].any()
    assert not out[:, 24:].any()


def test_shortcuts_width_and_what_the_head_takes():
    names = [name for name, _ in build("cifar_resnet20", shortcut="conv").named_modules() if "downsample.0" in name]
    assert names == ["layer2.0.downsample.0", "layer3.0.downsample.0"]
    assert build("cifar_resnet20", width=0.5).num_features == 32
    pooled = build("cifar_resnet20", global_pool="catavgmax")
    assert pooled.head_hidden_size == 128
    assert pooled(torch.randn(1, 3, 40, 40)).shape == (1, 10)
    assert build("cifar_conv6", img_size=16)(torch.randn(1, 3, 16, 16)).shape == (1, 10)
    assert not any(name.endswith("bias") for name, _ in build("cifar_conv6", bias=False).named_parameters())
    maps = timm.create_model("cifar_resnet20", features_only=True)(torch.randn(1, 3, 32, 32))
    assert [tuple(one.shape[1:]) for one in maps] == [(16, 32, 32), (32, 16, 16), (64, 8, 8)]
    maps = timm.create_model("cifar_vgg16_bn", features_only=True)(torch.randn(1, 3, 32, 32))
    assert [tuple(one.shape[1:2]) + tuple(one.shape[3:]) for one in maps] == [
        (64, 32), (128, 16), (256, 8), (512, 4), (512, 2)
    ]  # fmt: skip
    for kwargs, words in (({"shortcut": "zero"}, "Valid: conv, pad"), ({"width": 0.01}, "at least 0.0625")):
        with pytest.raises(tt.SettingError, match=words):
            build("cifar_resnet20", **kwargs)
    with pytest.raises(tt.SettingError, match="at least 8 pixels"):
        build("cifar_conv6", img_size=4)
    with pytest.raises(tt.SettingError, match="flattens"):
        build("cifar_conv6").reset_classifier(3, "avg")


def test_weights_start_with_kaimings_deviation():
    conv = build("cifar_resnet18").layer4[1].conv2.weight
    assert conv.std().item() == pytest.approx((2 / (512 * 9)) ** 0.5, rel=0.01)


@pytest.mark.parametrize("name", ["cifar_resnet20", "cifar_vgg16_bn", "cifar_conv2"])
def test_everything_but_the_classifier_can_be_pruned(name):
    model = build(name, num_classes=4)
    names = tt.prunable_names(model)
    assert "head.fc.weight" not in names
    assert [*names, "head.fc.weight"] == tt.prunable_names(model, classifier=True)
    ticket = tt.create_pruner("random", model, sparsity=0.9).ticket
    assert tt.sparsity(ticket.masks) == pytest.approx(0.9, abs=1e-4)
    again = ticket.apply_(build(name, num_classes=4))
    for key, mask in ticket.masks.items():
        assert not again.get_parameter(key)[~mask].any()


# As if neither had been imported: of what these processes begin with, only torch and its like stay.
OURS = "name.partition('.')[0] in ('timm', 'timm_tickets')"
FORGET = f"import sys\nfor name in [name for name in sys.modules if {OURS}]:\n    del sys.modules[name]\n"


@pytest.mark.parametrize(
    "script",
    [
        "import timm, timm_tickets\n",
        "import timm_tickets, timm\ntimm_tickets.list_recipes\n",
        "from timm_tickets import SettingError\nimport timm\n",
        "from timm_tickets.config.parts import ModelSettings\nModelSettings(model='cifar_resnet20')\nimport timm\n",
    ],
)
def test_importing_the_package_registers_them(script):
    script += "assert timm.is_model('cifar_resnet20')\ntimm.create_model('cifar_resnet20', width=0.5)\n"
    done = started.run("-c", FORGET + script)
    assert done.returncode == 0, done.stderr


def test_the_package_alone_does_not_wait_for_torch():
    script = "import sys, timm_tickets\nassert not {'torch', 'timm'} & set(sys.modules)\n"
    subprocess.run([sys.executable, "-c", script], check=True)
