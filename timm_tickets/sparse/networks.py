"""The small networks of the papers, for images of 32 x 32, registered with timm under names that begin with ``cifar_``.

Importing this module registers them; ``import timm_tickets`` does so at once where timm has been imported before it,
and otherwise when the first of its names is used. Then ``timm.create_model("cifar_resnet20", width=2)`` finds them,
like any other. None has pretrained weights.

Source: ResNets: He et al. 2015, 1512.03385 (section 4.2: 20, 32, 56; table 1: 18, 34, with a 3 x 3 stem and no max
pooling); VGG: Simonyan & Zisserman 2014, 1409.1556, as CIFAR has it: batch normalisation and one linear layer; Conv2,
Conv4, Conv6: Frankle & Carbin 2018, 1803.03635 (figure 2). Weights start as He et al. 2015, 1502.01852, has them.
"""

import math
from collections.abc import Callable
from typing import Any, Literal

from timm.layers import ClassifierHead, to_2tuple
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.errors import SettingError, unknown

Shortcut = Literal["pad", "conv"]


class PadShortcut(nn.Module):
    """Every ``stride``-th pixel, and channels of zeros before and behind: a shortcut without parameters (option A).

    Args:
        more: Channels to add.
        stride: Of the block that is stepped over.
    """

    def __init__(self, more: int, stride: int):
        super().__init__()
        self.more, self.stride = more, stride

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, self.more // 2, self.more - self.more // 2))


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut around them."""

    def __init__(self, inputs: int, outputs: int, stride: int, shortcut: Shortcut):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.act1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = nn.Identity()
        if (stride, inputs) != (1, outputs):
            if shortcut == "pad":
                self.downsample = PadShortcut(outputs - inputs, stride)
            else:
                conv = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
                self.downsample = nn.Sequential(conv, nn.BatchNorm2d(outputs))
        self.act2 = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act1(self.bn1(self.conv1(x)))
        return self.act2(self.bn2(self.conv2(y)) + self.downsample(x))


class _Network(nn.Module):
    """What these networks share: features, then timm's head of pooling, dropout and one linear layer."""

    head: Any

    def __init__(self, num_classes: int, in_chans: int, num_features: int):
        super().__init__()
        self.num_classes, self.in_chans = num_classes, in_chans
        self.num_features = self.head_hidden_size = num_features
        self.feature_info: list[dict[str, Any]] = []

    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new linear layer for so many classes, none where 0; and other pooling, where given."""
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool)
        self._tell_width()

    def _tell_width(self) -> None:
        """What goes into the head's linear layer; heads of timm 1.0.27 do not say it, but what goes into them."""
        width = getattr(self.head, "num_features", None)
        self.head_hidden_size = width or self.head.in_features * self.head.global_pool.feat_mult()

    def forward_features(self, x: Tensor) -> Tensor:
        """The map of features, (batch, num_features, height, width), of images (batch, in_chans, height, width)."""
        raise NotImplementedError

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits (batch, num_classes) of a map of features, or what the classifier would be given."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


class CifarResNet(_Network):
    """ResNet of basic blocks: a 3 x 3 stem, then stages that each halve the map but the first.

    Args:
        depths: Blocks in each stage.
        widths: Channels of each stage, before `width`.
        width: Factor on all channels, above 0.
        shortcut: Where the shape changes: ``pad``, without parameters, or ``conv``, 1 x 1 with batch normalisation.
        num_classes: 0 for no classifier.
        in_chans: Channels of the images.
        global_pool: timm's name of the pooling.
        drop_rate: Dropout before the classifier, in [0, 1).

    Raises:
        SettingError: `width` leaves a stage without a channel, or there is no such shortcut.
    """

    def __init__(
        self,
        depths: tuple[int, ...],
        widths: tuple[int, ...],
        width: float = 1.0,
        shortcut: Shortcut = "conv",
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ):
        if shortcut not in ("pad", "conv"):
            raise SettingError(unknown("shortcut", str(shortcut), ("pad", "conv")))
        channels = [round(one * width) for one in widths]
        if min(channels) < 1:
            raise SettingError(
                f"width: {width} leaves a stage without a channel; it must be at least {1 / min(widths):g}"
            )
        super().__init__(num_classes, in_chans, channels[-1])
        self.conv1 = nn.Conv2d(in_chans, channels[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels[0])
        self.act1 = nn.ReLU(inplace=True)
        self.stages: list[str] = []
        inputs = channels[0]
        for stage, (depth, outputs) in enumerate(zip(depths, channels, strict=True)):
            blocks = []
            for block in range(depth):
                blocks.append(BasicBlock(inputs, outputs, 2 if stage and block == 0 else 1, shortcut))
                inputs = outputs
            self.stages.append(f"layer{stage + 1}")
            self.add_module(self.stages[-1], nn.Sequential(*blocks))
            self.feature_info.append({"num_chs": outputs, "reduction": 2**stage, "module": self.stages[-1]})
        self.head = ClassifierHead(inputs, num_classes, global_pool, drop_rate)
        self._tell_width()
        _start(self)

    def forward_features(self, x: Tensor) -> Tensor:
        x = self.act1(self.bn1(self.conv1(x)))
        for stage in self.stages:
            x = getattr(self, stage)(x)
        return x


class CifarVGG(_Network):
    """VGG with batch normalisation: 3 x 3 convolutions, max pooling between the stages, one linear layer.

    Args:
        depths: Convolutions in each stage.
        widths: Channels of each stage.
        num_classes: 0 for no classifier.
        in_chans: Channels of the images.
        global_pool: timm's name of the pooling after the last stage.
        drop_rate: Dropout before the classifier, in [0, 1).
    """

    def __init__(
        self,
        depths: tuple[int, ...],
        widths: tuple[int, ...],
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ):
        super().__init__(num_classes, in_chans, widths[-1])
        layers: list[nn.Module] = []
        inputs = in_chans
        for stage, (depth, outputs) in enumerate(zip(depths, widths, strict=True)):
            layers += [nn.MaxPool2d(2)] if stage else []
            for _ in range(depth):
                conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
                layers += [conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
                inputs = outputs
            self.feature_info.append(_info(outputs, stage, layers))
        self.features = nn.Sequential(*layers)
        self.head = ClassifierHead(inputs, num_classes, global_pool, drop_rate)
        self._tell_width()
        _start(self)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.features(x)


class FlatHead(nn.Module):
    """Three linear layers on the flattened map of features; the last is the classifier."""

    def __init__(self, inputs: int, hidden: int, num_classes: int, drop_rate: float, bias: bool):
        super().__init__()
        self.num_features, self.bias = hidden, bias
        self.flatten = nn.Flatten()
        self.fc1, self.act1 = nn.Linear(inputs, hidden, bias=bias), nn.ReLU(inplace=True)
        self.fc2, self.act2 = nn.Linear(hidden, hidden, bias=bias), nn.ReLU(inplace=True)
        self.drop = nn.Dropout(drop_rate)
        self.reset(num_classes)

    def reset(self, num_classes: int, global_pool: str | None = None) -> None:
        if global_pool:
            raise SettingError(f"global_pool: {global_pool!r} is not valid; this network flattens, leave it out")
        like = self.fc1.weight
        made = nn.Linear(self.num_features, num_classes, self.bias, like.device, like.dtype) if num_classes else None
        self.fc = made or nn.Identity()

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.act2(self.fc2(self.act1(self.fc1(self.flatten(x)))))
        x = self.drop(x)
        return x if pre_logits else self.fc(x)


class CifarConv(_Network):
    """Pairs of 3 x 3 convolutions, each pair with max pooling behind it, then three linear layers; no normalisation.

    Args:
        widths: Channels of each pair.
        bias: Whether convolutions and linear layers have biases.
        num_classes: 0 for no classifier.
        in_chans: Channels of the images.
        img_size: Height and width of the images, which the first linear layer is made for.
        drop_rate: Dropout before the classifier, in [0, 1).

    Raises:
        SettingError: Images so small that nothing is left of them after the pooling.
    """

    def __init__(
        self,
        widths: tuple[int, ...],
        bias: bool = True,
        num_classes: int = 10,
        in_chans: int = 3,
        img_size: int | tuple[int, int] = 32,
        drop_rate: float = 0.0,
    ):
        super().__init__(num_classes, in_chans, widths[-1])
        size = to_2tuple(img_size)
        pixels = math.prod(side // 2 ** len(widths) for side in size)
        if not pixels:
            raise SettingError(f"img_size: {size} is too small; each side must have at least {2 ** len(widths)} pixels")
        layers: list[nn.Module] = []
        inputs = in_chans
        for stage, outputs in enumerate(widths):
            for _ in range(2):
                layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=bias), nn.ReLU(inplace=True)]
                inputs = outputs
            self.feature_info.append(_info(outputs, stage, layers))
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.head = FlatHead(inputs * pixels, 256, num_classes, drop_rate, bias)
        self.head_hidden_size = 256
        _start(self)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.features(x)


def _info(channels: int, stage: int, layers: list[nn.Module]) -> dict[str, Any]:
    """Where timm's ``features_only`` finds the map of a stage: behind its last activation."""
    return {"num_chs": channels, "reduction": 2**stage, "module": f"features.{len(layers) - 1}"}


def _start(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def _cfg(first_conv: str, **more: Any) -> dict[str, Any]:
    """The mean and deviation are those of CIFAR-10's training images."""
    mean, std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    size = {"input_size": (3, 32, 32), "crop_pct": 1.0, "interpolation": "bicubic", "mean": mean, "std": std}
    return {"num_classes": 10, "first_conv": first_conv, "classifier": "head.fc", **size, **more}


_NARROW = (CifarResNet, {"widths": (16, 32, 64), "shortcut": "pad"}, {"first_conv": "conv1", "pool_size": (8, 8)})
_WIDE = (
    CifarResNet,
    {"widths": (64, 128, 256, 512), "shortcut": "conv"},
    {"first_conv": "conv1", "pool_size": (4, 4)},
)
_VGG = (CifarVGG, {"widths": (64, 128, 256, 512, 512)}, {"first_conv": "features.0", "pool_size": (2, 2)})
_CONV = (CifarConv, {}, {"first_conv": "features.0", "fixed_input_size": True})

# Class, what it is built with, what its configuration says.
_ARCHITECTURES: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    name: (cls, shared | own, cfg)
    for name, (cls, shared, cfg), own in (
        ("cifar_resnet20", _NARROW, {"depths": (3, 3, 3)}),
        ("cifar_resnet32", _NARROW, {"depths": (5, 5, 5)}),
        ("cifar_resnet56", _NARROW, {"depths": (9, 9, 9)}),
        ("cifar_resnet18", _WIDE, {"depths": (2, 2, 2, 2)}),
        ("cifar_resnet34", _WIDE, {"depths": (3, 4, 6, 3)}),
        ("cifar_vgg16_bn", _VGG, {"depths": (2, 2, 3, 3, 3)}),
        ("cifar_vgg19_bn", _VGG, {"depths": (2, 2, 4, 4, 4)}),
        ("cifar_conv2", _CONV, {"widths": (64,)}),
        ("cifar_conv4", _CONV, {"widths": (64, 128)}),
        ("cifar_conv6", _CONV, {"widths": (64, 128, 256)}),
    )
}
_cfgs: Any = {name: _cfg(**cfg) for name, (_, _, cfg) in _ARCHITECTURES.items()}
default_cfgs = generate_default_cfgs(_cfgs)


def _entry_point(name: str) -> Callable[..., nn.Module]:
    """The function that timm calls to build an architecture; what it is given goes before what it has by default."""
    cls, defaults, _ = _ARCHITECTURES[name]
    stages = len(defaults["widths"])
    features = {"out_indices": tuple(range(stages)), "flatten_sequential": cls is not CifarResNet}

    def build(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return build_model_with_cfg(cls, name, pretrained, feature_cfg=dict(features), **(defaults | kwargs))

    build.__name__ = build.__qualname__ = name
    return build


for _name in _ARCHITECTURES:
    globals()[_name] = register_model(_entry_point(_name))
