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
    """start from timm's pretrained weights, downloaded where they are not on this machine yet"""
    initial_checkpoint: Path | None = None
    """file to start from, such as the model.safetensors of a finished round"""
    num_classes: Count | None = None
    """classes of the head; from the data set where not given"""
    in_chans: Count | None = None
    """channels of an image; the architecture's own, mostly 3, where not given"""
    drop: Fraction | None = None
    """dropout before the classifier, as a probability; the architecture's own where not given"""
    drop_path: Fraction | None = None
    """stochastic depth: probability of leaving a block out; the architecture's own where not given"""
    gp: str | None = None
    """pooling before the classifier: avg, max, avgmax, catavgmax, fast, token, as the architecture has them"""
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
    """folder of the data set"""
    dataset_download: bool = False
    """download the data set into data_dir, for 'torch/...' and the like"""
    class_map: str | None = None
    """file with the names of the classes, one a line in the order of their labels, for data sets in folders"""
    num_classes: Count | None = None
    """classes of the data set; as many as its labels have where not given"""
    classes: Annotated[tuple[Natural, ...], Field(min_length=2)] | None = None
    """only these classes, numbered anew in this order: a task made of part of a data set"""
    input_img_mode: str | None = "RGB"
    """PIL's mode that each image is converted to: RGB has three channels, L one; null leaves them as they are"""
    train_split: str = "train"
    """split to train on"""
    val_split: str | None = None
    """split to validate on; where not given, val_fraction is held out from the training split"""
    test_split: str = "test"
    """scored once for each ticket, never chosen on"""
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """fraction of the training split that is held out to validate on, each class alike"""
    split_seed: Seed = 0
    """seed of the held-out part; not the recipe's seed, so that seeds are compared on the same images"""
    unreadable: Fraction = 0.01
    """largest share of the training images that may be unreadable: the next of its class is taken for each, and said"""
    img_size: Count | None = None
    """height and width of an image in pixels; the model's own where not given"""
    in_chans: Count | None = None
    """channels of an image; model.in_chans where not given"""
    mean: tuple[float, ...] | None = None
    """mean pixel of each channel, or one for all, taken off the image in [0, 1]; the model's own where not given"""
    std: tuple[Positive, ...] | None = None
    """standard deviation of each channel, or one for all, to divide by; the model's own where not given"""
    interpolation: str | None = None
    """how images are resized: bilinear, bicubic, nearest, ...; the model's own where not given"""
    train_interpolation: str | None = None
    """the same for training images: random draws one for each; interpolation where not given"""
    crop_pct: Positive | None = None
    """share of the resized image that the centre crop keeps when it is scored; the model's own where not given"""
    crop_mode: Literal["center", "squash", "border"] | None = None
    """how an image is brought to size when it is scored; the model's own where not given"""
    no_aug: bool = False
    """resize and crop training images to their centre, and nothing more"""
    train_crop_mode: str | None = None
    """timm's random crop: rrc (resized), rkrc or rkrr (keeping the aspect ratio); rrc where not given"""
    scale: tuple[float, float] = (0.08, 1.0)
    """least and largest share of the image's area that the random resized crop takes"""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """least and largest aspect ratio (width / height) of the random resized crop"""
    hflip: Annotated[float, Field(ge=0, le=1)] = 0.5
    """probability of a horizontal flip"""
    vflip: Annotated[float, Field(ge=0, le=1)] = 0.0
    """probability of a vertical flip"""
    color_jitter: Annotated[float, Field(ge=0)] = 0.4
    """strength of random changes of brightness, contrast and saturation; none where aa is given"""
    aa: str | None = None
    """timm's AutoAugment or RandAugment policy, such as rand-m9-mstd0.5; none where not given"""
    reprob: Annotated[float, Field(ge=0, le=1)] = 0.0
    """probability of erasing a random rectangle"""
    remode: str = "const"
    """what is put there: const (zeros), rand (a colour), pixel (noise)"""
    recount: Count = 1
    """most rectangles erased in an image"""
    crop_padding: Natural | None = None
    """pixels of zeros around the image before a random crop to its size, as papers on CIFAR have it, instead of timm's
    random resized crop; then hflip and rotation, and none of timm's other augmentations"""
    rotation: Annotated[float, Field(ge=0, le=180)] = 0.0
    """degrees; turns by a uniform angle of at most so many either way; with crop_padding"""
    cache: Literal["auto", "device", "host", "none"] = "auto"
    """keep the decoded images, as bytes, in the device's memory or the host's, and augment them in batches; auto does
    where they take a quarter of what is free at most, and says so; none loads and augments them one by one, as timm"""
    workers: Natural = 4
    """processes that load images, for each process that trains; 0 loads them in that one"""

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
    """epochs of a run, and of the ticket's own training where retrain.epochs is not given"""
    batch_size: Count = 128
    """images in one step over all processes together, so that a recipe means the same on any number of them"""
    grad_accum_steps: Count = 1
    """batches whose gradients are added up for one optimizer step, each of batch_size images"""
    opt: str = "sgd"
    """timm's name of the optimizer: sgd, adamw, lamb, ...; lookahead_ before it wraps it in Lookahead"""
    lr: Positive = 0.1
    """learning rate, after the warmup; it is not scaled by batch_size"""
    momentum: Fraction = 0.9
    """momentum of the optimizers that have one"""
    weight_decay: Annotated[float, Field(ge=0)] = 2e-5
    """weight decay; biases and normalisation have none"""
    opt_eps: Positive | None = None
    """epsilon of the optimizer; its own where not given"""
    opt_betas: tuple[Fraction, ...] | None = None
    """betas of the optimizer, such as [0.9, 0.999]; its own where not given"""
    opt_args: dict[str, Any] = {}
    """further arguments of the optimizer, by name"""
    layer_decay: Positive | None = None
    """factor on the learning rate for each layer further from the classifier; none where not given"""
    clip_grad: Positive | None = None
    """bound on the gradients, as clip_mode says; no clipping where not given"""
    clip_mode: Literal["norm", "value", "agc"] = "norm"
    """what clip_grad bounds: the norm of all gradients, each value, or each norm relative to its weight's (agc)"""
    sched: str = "cosine"
    """schedule of the learning rate: cosine, tanh, step, constant, multistep, poly, wsd, rsqrt, none"""
    sched_on_updates: bool = False
    """move the learning rate at each optimizer step instead of each epoch"""
    warmup_epochs: Natural = 0
    """epochs in which the learning rate grows from warmup_lr to lr"""
    warmup_lr: Annotated[float, Field(ge=0)] = 1e-5
    """learning rate at which the warmup begins"""
    min_lr: Annotated[float, Field(ge=0)] = 0.0
    """learning rate at which the schedule ends"""
    decay_epochs: Positive = 90
    """with sched=step, epochs between two decays; with wsd and rsqrt, epochs of the decay at the end"""
    decay_milestones: tuple[Count, ...] = (90, 180, 270)
    """with sched=multistep, the epochs at which the learning rate decays"""
    decay_rate: Positive = 0.1
    """factor of each decay, with sched=step and multistep; the power with poly"""
    smoothing: Fraction = 0.0
    """label smoothing: weight taken from the target and spread over all classes, also where images are mixed"""
    bce_loss: bool = False
    """binary cross-entropy on each class instead of cross-entropy"""
    mixup: Annotated[float, Field(ge=0)] = 0.0
    """alpha of mixup, which blends pairs of images; 0 is none"""
    cutmix: Annotated[float, Field(ge=0)] = 0.0
    """alpha of cutmix, which puts a part of one image into another; 0 is none"""
    cutmix_minmax: tuple[float, float] | None = None
    """least and largest side of the part as a fraction of the image's, instead of cutmix's alpha"""
    mixup_prob: Annotated[float, Field(ge=0, le=1)] = 1.0
    """probability that a batch is mixed, where mixup or cutmix is set"""
    mixup_switch_prob: Annotated[float, Field(ge=0, le=1)] = 0.5
    """probability of cutmix where both are set"""
    mixup_mode: Literal["batch", "pair", "elem"] = "batch"
    """what is mixed alike: the whole batch, each pair, or each image by itself"""
    mixup_off_epoch: Natural = 0
    """epoch from which nothing is mixed any more; 0 is never"""
    model_ema: bool = False
    """score a moving average of the weights; it is saved as model_ema.safetensors beside the raw ones"""
    model_ema_decay: Fraction = 0.9998
    """share of the average that stays at each optimizer step"""
    model_ema_warmup: bool = False
    """let the average follow faster at the start"""
    amp: bool = False
    """mixed precision: forward and backward in amp_dtype"""
    amp_dtype: Literal["float16", "bfloat16"] = "float16"
    """the lower precision; float16 needs a GPU"""
    channels_last: bool | None = None
    """memory with an image's channels innermost, which convolutions are mostly faster with; true on CPUs and in mixed
    precision where not given"""
    sync_bn: bool = False
    """batch normalisation over the images of all processes together; needs GPUs"""
    torchcompile: str | None = None
    """backend of torch.compile, such as 'inductor': for the model alone, or, with step=compiled, for the whole step"""
    step: Literal["auto", "eager", "compiled", "captured"] = "auto"
    """how a step is carried out, optimizer and masks in it: by Python (eager), as a graph of torch.compile (compiled),
    or recorded once as a CUDA graph and played again (captured); auto: captured where that goes, else eager"""
    deterministic: bool | None = None
    """true: algorithms that give the same bits each time on one machine, where there are such; false: the fastest, on a
    GPU found by trying them out, so that trainings differ by rounding; true on CPUs, false on GPUs where not given"""
    checkpoint_interval: Annotated[float, Field(ge=0)] = 60.0
    """least seconds between two checkpoints within a run, more where writing takes long; 0 is one for each step"""
    keep_best: bool = False
    """keep the weights of each run's best epoch on validation too, as model_best.safetensors; the test split is scored
    on the last ones in any case"""
    log_with: tuple[str, ...] = ()
    """Accelerate's trackers to log every epoch to, by name: tensorboard, wandb, mlflow ...; one or several"""

    @field_validator("log_with", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("log_with")
    @classmethod
    def _known_trackers(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if value:
            from accelerate.tracking import LOGGER_TYPE_TO_CLASS

            for name in value:
                if name not in LOGGER_TYPE_TO_CLASS:
                    raise ValueError(unknown("tracker", name, LOGGER_TYPE_TO_CLASS))
        return value

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
