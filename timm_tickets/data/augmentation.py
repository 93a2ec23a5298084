"""A recipe's augmentation of a whole batch at once, each image by draws of its own; on a card nothing waits for it.

Each step is timm's or torchvision's of one PIL image, with the same distribution, and given the same draws with the
same pixels but for rounding. Weighed first, and not taken: torchvision's v2 transforms draw one set of parameters for a
batch; kornia's draw for each image, but from torch's global generator, so that an image's augmentation would depend on
those before it and on the number of processes, its random resized crop does not antialias, and it would be a dependency
for the lines below. torchvision's resizing is taken on CPUs for larger images, one after the other.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from timm.data.transforms import str_to_interp_mode
from torch import Tensor
from torchvision.transforms.v2.functional import resized_crop

from .image_draws import ImageDraws, moved
from .transforms import training_config

Step = Callable[[Any, ImageDraws], Tensor]

FILTERS = ("bilinear", "bicubic")
_SMALL = 48  # pixels a side, up to which the matrix products are faster than torchvision on CPUs too
_CHUNK = 1 << 26  # pixels that are resized at once on a card, as float32: 256 MiB


def steps_of(settings: Any, config: dict[str, Any], train: bool) -> list[Step]:
    """What is done to a batch that begins as `transforms.beginning` leaves it: uint8 (images, channels, height, width).

    Args:
        settings: The recipe's ``data`` part; what it asks for has to be possible (`not_in_batches`).
        config: What `timm.data.resolve_data_config` found.
        train: Whether these are training images.
    """
    s, steps, erase = settings, [], 0.0
    if train and s.crop_padding is not None:
        steps.append(lambda images, draws: padded_crops(images, draws, s.crop_padding))
        steps.append(lambda images, draws: flipped(images, draws, s.hflip, -1))
        if s.rotation:
            steps.append(lambda images, draws: rotated(images, draws, s.rotation))
    elif train and not s.no_aug:
        size, filter_ = config["input_size"][1:], training_config(s, config)["interpolation"]
        steps.append(lambda images, draws: resized_crops(images, draws, size, s.scale, s.ratio, filter_))
        steps.append(lambda images, draws: flipped(images, draws, s.hflip, -1))
        steps.append(lambda images, draws: flipped(images, draws, s.vflip, -2))
        if s.color_jitter:
            steps.append(lambda images, draws: jittered(images, draws, s.color_jitter))
        erase = s.reprob
    steps.append(Normalised(config["mean"], config["std"]))
    if erase:
        steps.append(lambda images, draws: erased(images, draws, erase, s.remode.lower(), s.recount))
    return steps


def not_in_batches(settings: Any, config: dict[str, Any]) -> str:
    """The setting that asks of training images what no batch can be given here; nothing where there is none."""
    s, filter_ = settings, training_config(settings, config)["interpolation"]
    if s.crop_padding is not None or s.no_aug:
        return ""
    if s.aa:
        return f"data.aa={s.aa}"
    if s.train_crop_mode not in (None, "rrc"):
        return f"data.train_crop_mode={s.train_crop_mode}"
    if filter_ not in FILTERS:
        return f"data.{'train_interpolation' if s.train_interpolation else 'interpolation'}={filter_}"
    return ""


def padded_crops(images: Tensor, draws: ImageDraws, padding: int) -> Tensor:
    """Windows of the images' size out of the images with so many pixels of zeros on each side."""
    shift = moved((draws.uniforms(2) * (2 * padding + 1)).long() - padding, images.device)
    height, width = images.shape[-2:]
    y = torch.arange(height, device=images.device) + shift[:, :1]
    x = torch.arange(width, device=images.device) + shift[:, 1:]
    return _picked(images, y[:, :, None], x[:, None, :])


def flipped(images: Tensor, draws: ImageDraws, probability: float, dimension: int) -> Tensor:
    """The images, some of them mirrored."""
    if not probability:
        return images
    chosen = moved(draws.uniforms(1) < probability, images.device)
    return torch.where(chosen[:, :, None, None], images.flip(dimension), images)


def rotated(images: Tensor, draws: ImageDraws, degrees: float) -> Tensor:
    """The images turned about their centres by up to so many degrees either way; each pixel is the nearest one's."""
    angle = (draws.uniforms(1) * 2 - 1) * (degrees * math.pi / 180)
    turn = moved(torch.cat([angle.cos(), angle.sin()], 1).float(), images.device)
    cos, sin = turn[:, :1, None], turn[:, 1:, None]
    height, width = images.shape[-2:]
    y = torch.arange(height, device=images.device)[:, None] + (0.5 - height / 2)
    x = torch.arange(width, device=images.device) + (0.5 - width / 2)
    down, across = sin * x + cos * y + height / 2, cos * x - sin * y + width / 2
    return _picked(images, down.floor().long(), across.floor().long())


def _picked(images: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """The pixels at these places of each image, zero outside of it."""
    height, width = images.shape[-2:]
    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    places = (y.clamp(0, height - 1) * width + x.clamp(0, width - 1)).flatten(1)[:, None]
    found = images.flatten(2).gather(2, places.expand(-1, images.shape[1], -1))
    return found.view(images.shape) * inside[:, None]


def resized_crops(
    images: Tensor | Sequence[Tensor],
    draws: ImageDraws,
    size: Sequence[int],
    scale: Sequence[float],
    ratio: Sequence[float],
    interpolation: str,
) -> Tensor:
    """timm's random resized crop; the images may be of different sizes."""
    if isinstance(images, Tensor):
        sizes = torch.tensor([images.shape[-2:]]).expand(len(images), 2)
    else:
        sizes = torch.tensor([image.shape[-2:] for image in images])
    boxes = crop_boxes(draws, sizes, scale, ratio)
    if images[0].device.type == "cpu" and sizes.max() > _SMALL:
        mode: Any = str_to_interp_mode(interpolation)
        cut = zip(images, boxes.tolist(), strict=True)
        return torch.stack(
            [resized_crop(image, y, x, h, w, list(size), mode, antialias=True) for image, (y, x, h, w) in cut]
        )
    count = max(1, _CHUNK // (images[0].shape[0] * int(sizes.max()) ** 2))
    chunks = zip(itertools.count(0, count), boxes.split(count), strict=False)
    return torch.cat([resized(_one_tensor(images[n : n + count]), part, size, interpolation) for n, part in chunks])


def crop_boxes(draws: ImageDraws, sizes: Tensor, scale: Sequence[float], ratio: Sequence[float]) -> Tensor:
    """Top, left, height and width of timm's random resized crop, int64 (images, 4).

    Of ten tries the first that fits is taken, else the largest centred crop of a valid ratio.
    """
    height, width = sizes.double().unbind(1)
    area, aspect, place = draws.uniforms(22).split((10, 10, 2), 1)
    area = (area * (scale[1] - scale[0]) + scale[0]) * (height * width)[:, None]
    low, high = math.log(ratio[0]), math.log(ratio[1])
    aspect = (aspect * (high - low) + low).exp()
    wide, tall = (area * aspect).sqrt().round().clamp_(min=1), (area / aspect).sqrt().round().clamp_(min=1)
    fits = (wide <= width[:, None]) & (tall <= height[:, None])
    first = fits.int().argmax(1, keepdim=True)
    whole = width / height
    fallback_wide = torch.where(whole > ratio[1], (height * ratio[1]).round(), width)
    fallback_tall = torch.where(whole < ratio[0], (width / ratio[0]).round(), height)
    some = fits.any(1)
    wide = torch.where(some, wide.gather(1, first)[:, 0], fallback_wide)
    tall = torch.where(some, tall.gather(1, first)[:, 0], fallback_tall)
    top, left = height - tall, width - wide
    drawn = (place * torch.stack([top + 1, left + 1], 1)).floor()
    corner = torch.where(some[:, None], drawn, torch.stack([top // 2, left // 2], 1))
    return torch.cat([corner, torch.stack([tall, wide], 1)], 1).long()


def _one_tensor(images: Any) -> Tensor:
    """Images of different sizes in one tensor, each in its corner."""
    if isinstance(images, Tensor):
        return images
    sizes = [image.shape[-2:] for image in images]
    height, width = (max(size[side] for size in sizes) for side in (0, 1))
    out = images[0].new_zeros(len(images), images[0].shape[0], height, width)
    for image, place in zip(images, out, strict=True):
        place[:, : image.shape[1], : image.shape[2]] = image
    return out


def resized(images: Tensor, boxes: Tensor, size: Sequence[int], interpolation: str) -> Tensor:
    """A box of each image, resized as PIL does (antialiased, rounded after each direction): two matrix products."""
    boxes = moved(boxes.float(), images.device)
    count, channels, height, width = images.shape
    across = _weights(boxes[:, 1], boxes[:, 3], width, size[1], interpolation)
    down = _weights(boxes[:, 0], boxes[:, 2], height, size[0], interpolation)
    out = _rounded(images.float().flatten(1, 2) @ across.mT).view(count, channels, height, size[1])
    return _rounded(down[:, None] @ out).to(torch.uint8)


def _rounded(values: Tensor) -> Tensor:
    return values.add_(0.5).floor_().clamp_(0, 255)


def _weights(start: Tensor, length: Tensor, before: int, after: int, interpolation: str) -> Tensor:
    """How much each pixel of a line counts in each pixel of a part of it that is resized: (images, after, before)."""
    start, length = start[:, None, None], length[:, None, None]
    scale = length / after
    centre = (torch.arange(after, device=start.device)[:, None] + 0.5) * scale
    place = torch.arange(before, device=start.device) - start + 0.5
    x = ((place - centre) / scale.clamp(min=1)).abs()
    if interpolation == "bilinear":
        weights = (1 - x).clamp_(min=0)
    else:  # with a = -1/2, as PIL has it
        near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
        weights = torch.where(x < 1, near, torch.where(x < 2, far, 0.0))
    weights = weights * ((place > 0) & (place < length))
    return weights / weights.sum(2, keepdim=True)


# Of brightness (0), contrast (1) and saturation (2), all orders.
_ORDERS = torch.tensor(list(itertools.permutations(range(3))))


def jittered(images: Tensor, draws: ImageDraws, strength: float) -> Tensor:
    """Brightness, contrast and saturation changed in an order of chance, in PIL's rounding; of RGB or grey images."""
    drawn = draws.uniforms(4)
    order = _ORDERS[(drawn[:, 0] * len(_ORDERS)).long()]
    low = max(0.0, 1 - strength)
    factors = (drawn[:, 1:] * (1 + strength - low) + low).gather(1, order)
    told = moved(torch.stack([factors, (order == 1).double(), (order == 2).double()]).float(), images.device)
    out = images.float()
    for factor, contrast, saturation in told.permute(2, 0, 1)[..., None, None, None]:
        grey = out
        if out.shape[1] == 3:
            red, green, blue = out.split(1, 1)
            grey = (red * 19595).add_(green * 38470).add_(blue * 7471).add_(32768).div_(65536).floor_()  # all exact
        mean = (grey.mean((1, 2, 3), keepdim=True, dtype=torch.float64) + 0.5).floor().float()
        plain = contrast * mean + saturation * grey
        out.sub_(plain).mul_(factor).add_(plain).clamp_(0, 255).floor_()
    return out


class Normalised:
    """Pixels as the model gets them: in [0, 1], less the mean, over the deviation, of each channel."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        self._host = torch.tensor([mean, std], dtype=torch.float32)[:, :, None, None]
        self._there = self._host

    def __call__(self, images: Tensor, draws: ImageDraws) -> Tensor:
        if self._there.device != images.device:
            self._there = moved(self._host, images.device)
        mean, std = self._there
        return images.float().div_(255).sub_(mean).div_(std)


def erased(images: Tensor, draws: ImageDraws, probability: float, mode: str, most: int) -> Tensor:
    """timm's random erasing: in some images one to `most` rectangles of 1/50 to 1/3 of the area, shared among them."""
    channels, height, width = images.shape[1:]
    drawn = draws.uniforms(2)
    number = (drawn[:, 1:] * most).floor() + 1
    y, x = (torch.arange(side, device=images.device) for side in (height, width))
    for rectangle in range(most):
        area, aspect, place = draws.uniforms(22).split((10, 10, 2), 1)
        area = (area * (1 / 3 - 0.02) + 0.02) * (height * width) / number
        aspect = ((2 * aspect - 1) * math.log(1 / 0.3)).exp()
        tall, wide = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
        fits = (tall < height) & (wide < width)
        sides = torch.stack([tall, wide], 2).gather(1, fits.int().argmax(1)[:, None, None].expand(-1, 1, 2))[:, 0]
        corner = (place * (torch.tensor([height, width]) - sides + 1)).floor()
        there = (drawn[:, :1] < probability) & (rectangle < number) & fits.any(1, keepdim=True)
        box = moved(torch.cat([corner, corner + sides * there], 1).float(), images.device)[:, :, None]
        inside = ((y >= box[:, 0]) & (y < box[:, 2]))[:, None, :, None]
        inside = inside & ((x >= box[:, 1]) & (x < box[:, 3]))[:, None, None]
        if mode == "pixel":
            images = torch.where(inside, draws.normals(images[0].numel(), images.device).view(images.shape), images)
        elif mode == "rand":
            images = torch.where(inside, draws.normals(channels, images.device)[:, :, None, None], images)
        else:
            images = images.masked_fill_(inside, 0)
    return images
