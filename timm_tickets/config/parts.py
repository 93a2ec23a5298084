"""The parts of a recipe: model, data, training and retraining, each key checked, unknown ones refused."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from ..core.errors import unknown
from ..sparse import networks  # noqa: F401 - recipes name them: they have to be registered with timm

Fraction = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
Natural = Annotated[int, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # numpy's and scikit-learn's generators take no larger ones


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), use_attribute_docstrings=True)


class ModelSettings(Part):
    """What ``timm.create_model`` is given."""

    model: str
    """timm architecture, with its pretrained tag where wanted"""
    pretrained: bool = False
    initial_checkpoint: Path | None = None
    """file to start from, such as the model.safetensors of a finished round"""
    num_classes: Count | None = None
    """classes of the head; from the data set where not given"""
    in_chans: Count | None = None
    drop: Fraction | None = None
    drop_path: Fraction | None = None
    gp: str | None = None
    model_kwargs: dict[str, Any] = {}
    """further arguments of the architecture"""

    @field_validator("model")
    @classmethod
    def _known(cls, value: str) -> str:
        import timm

        name = value.partition(".")[0]
        if not timm.is_model(name):
            raise ValueError(unknown("architecture", name, map(str, timm.list_models())) + " (`timm.list_models()`)")
        return value


class DataSettings(Part):
    """Data set, splits and augmentation."""

    dataset: str = "digits"
    """'digits' (embedded) or a timm data set: 'torch/cifar10', 'hfds/...', 'folder' ..."""
    data_dir: str | None = None
    dataset_download: bool = False
    class_map: str | None = None
    num_classes: Count | None = None
    classes: Annotated[tuple[Natural, ...], Field(min_length=2)] | None = None
    """only these classes, numbered anew in this order: a task made of part of a data set"""
    input_img_mode: str | None = "RGB"
    train_split: str = "train"
    val_split: str | None = None
    """split to validate on; where not given, val_fraction is held out from the training split"""
    test_split: str = "test"
    """scored once for each ticket, never chosen on"""
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    split_seed: Seed = 0
    """seed of the held-out part; not the recipe's seed, so that seeds are compared on the same images"""
    unreadable: Fraction = 0.01
    """largest share of the training images that may be unreadable: the next of its class is taken for each, and said"""
    img_size: Count | None = None
    in_chans: Count | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[Positive, ...] | None = None
    interpolation: str | None = None
    train_interpolation: str | None = None
    crop_pct: Positive | None = None
    crop_mode: Literal["center", "squash", "border"] | None = None
    no_aug: bool = False
    train_crop_mode: str | None = None
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    hflip: Annotated[float, Field(ge=0, le=1)] = 0.5
    vflip: Annotated[float, Field(ge=0, le=1)] = 0.0
    color_jitter: Annotated[float, Field(ge=0)] = 0.4
    aa: str | None = None
    reprob: Annotated[float, Field(ge=0, le=1)] = 0.0
    remode: str = "const"
    recount: Count = 1
    crop_padding: Natural | None = None
    """pixels of zeros around the image before a random crop to its size, as papers on CIFAR have it, instead of timm's
    random resized crop; then hflip and rotation, and none of timm's other augmentations"""
    rotation: Annotated[float, Field(ge=0, le=180)] = 0.0
    """degrees; turns by a uniform angle of at most so many either way; with crop_padding"""
    workers: Natural = 4

    @field_validator("input_img_mode")
    @classmethod
    def _known_mode(cls, value: str | None) -> str | None:
        from PIL import ImageMode

        try:
            _ = None if value is None else ImageMode.getmode(value)
        except KeyError:
            raise ValueError(f"{value!r} is no mode of PIL's; RGB has three channels, L one, RGBA four") from None
        return value

    @model_validator(mode="after")
    def _one_augmentation(self) -> "DataSettings":
        if self.crop_padding is None:
            if self.rotation:
                raise ValueError(f"rotation: {self.rotation:g} needs crop_padding; set data.crop_padding, 0 for none")
            return self
        fields = type(self).model_fields
        others = ("no_aug", "train_crop_mode", "vflip", "aa", "reprob")
        if clash := [name for name in others if getattr(self, name) != fields[name].default]:
            raise ValueError(
                f"crop_padding: {self.crop_padding} cannot be had with {', '.join(clash)}, which are timm's own "
                "augmentation; leave them out, or leave out crop_padding"
            )
        return self

    def with_channels(self, in_chans: int | None) -> "DataSettings":
        """For a model of so many input channels, where these settings say nothing of them."""
        if in_chans is None or self.in_chans is not None:
            return self
        mode = {"input_img_mode": "L"} if in_chans == 1 and "input_img_mode" not in self.model_fields_set else {}
        return self.model_copy(update={"in_chans": in_chans, **mode})


class TrainingSettings(Part):
    """One training run: optimizer, schedule, loss and precision."""

    epochs: Count = 20
    batch_size: Count = 128
    """images in one step over all processes together, so that a recipe means the same on any number of them"""
    grad_accum_steps: Count = 1
    opt: str = "sgd"
    lr: Positive = 0.1
    momentum: Fraction = 0.9
    weight_decay: Annotated[float, Field(ge=0)] = 2e-5
    opt_eps: Positive | None = None
    opt_betas: tuple[Fraction, ...] | None = None
    opt_args: dict[str, Any] = {}
    layer_decay: Positive | None = None
    clip_grad: Positive | None = None
    clip_mode: Literal["norm", "value", "agc"] = "norm"
    sched: str = "cosine"
    sched_on_updates: bool = False
    warmup_epochs: Natural = 0
    warmup_lr: Annotated[float, Field(ge=0)] = 1e-5
    min_lr: Annotated[float, Field(ge=0)] = 0.0
    decay_epochs: Positive = 90
    decay_milestones: tuple[Count, ...] = (90, 180, 270)
    decay_rate: Positive = 0.1
    smoothing: Fraction = 0.0
    bce_loss: bool = False
    mixup: Annotated[float, Field(ge=0)] = 0.0
    cutmix: Annotated[float, Field(ge=0)] = 0.0
    cutmix_minmax: tuple[float, float] | None = None
    mixup_prob: Annotated[float, Field(ge=0, le=1)] = 1.0
    mixup_switch_prob: Annotated[float, Field(ge=0, le=1)] = 0.5
    mixup_mode: Literal["batch", "pair", "elem"] = "batch"
    mixup_off_epoch: Natural = 0
    model_ema: bool = False
    model_ema_decay: Fraction = 0.9998
    model_ema_warmup: bool = False
    amp: bool = False
    amp_dtype: Literal["float16", "bfloat16"] = "float16"
    channels_last: bool = False
    sync_bn: bool = False
    torchcompile: str | None = None
    """backend of torch.compile, such as 'inductor'"""
    checkpoint_interval: Annotated[float, Field(ge=0)] = 60.0
    """least seconds between two checkpoints within a run, more where writing takes long; 0 is one for each step"""

    @field_validator("opt")
    @classmethod
    def _known_opt(cls, value: str) -> str:
        from timm.optim import list_optimizers

        if value.lower().removeprefix("lookahead_") not in list_optimizers():
            raise ValueError(
                unknown("optimizer", value, map(str, list_optimizers())) + " (`timm.optim.list_optimizers()`)"
            )
        return value

    @field_validator("sched")
    @classmethod
    def _known_sched(cls, value: str) -> str:
        # Not plateau: timm is dropping it, and a stopped run could not continue its history.
        valid = ("cosine", "tanh", "step", "constant", "multistep", "poly", "wsd", "rsqrt", "none")
        if value not in valid:
            raise ValueError(unknown("schedule", value, valid))
        return value


class RetrainSettings(Part):
    """How the ticket is trained once it is found, where that differs from the search's runs."""

    epochs: Count | None = None
    """epochs; training.epochs where not given"""
    tweaks: dict[str, dict[str, Any]] = {}
    """registered retraining tweaks and their settings, such as {label_smoothing: {amount: 0.1}}"""

    @field_validator("tweaks", mode="before")
    @classmethod
    def _resolved(cls, value: Any) -> dict[str, Any]:
        """A list of names will do; the resolved recipe holds every setting."""
        from ..tweaks.registry import checked_tweaks

        return {tweak.name: tweak.described() for tweak in checked_tweaks(value or {})}
