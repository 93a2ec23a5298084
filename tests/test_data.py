import numpy as np
import pytest
import torch
from PIL import Image

from timm_tickets.data import Data, padded_crop
from timm_tickets.recipe import DataSettings

CONFIG = {"input_size": (3, 4, 4), "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0), "interpolation": "bicubic"}


def image(side=4):
    pixels = np.arange(side * side * 3, dtype=np.uint8).reshape(side, side, 3) + 1
    return Image.fromarray(pixels), torch.tensor(pixels).permute(2, 0, 1) / 255


def test_without_padding_the_crop_is_the_image_itself():
    picture, pixels = image()
    assert torch.equal(padded_crop(CONFIG, 0)(picture), pixels)
    mirrored = padded_crop(CONFIG, 0, hflip=1.0)(picture)
    assert torch.equal(mirrored, pixels.flip(2))
    normalised = padded_crop(CONFIG | {"mean": (0.5,) * 3, "std": (0.25,) * 3}, 0)(picture)
    assert torch.allclose(normalised, (pixels - 0.5) / 0.25)


def test_the_crop_is_a_window_of_the_zero_padded_image():
    picture, pixels = image()
    padded = torch.nn.functional.pad(pixels, (2, 2, 2, 2))
    windows = [padded[:, top : top + 4, left : left + 4] for top in range(5) for left in range(5)]
    crop = padded_crop(CONFIG, 2)
    torch.manual_seed(0)
    crops = [crop(picture) for _ in range(400)]
    seen = {next(n for n, window in enumerate(windows) if torch.equal(window, one)) for one in crops}
    assert seen == set(range(25))


def test_the_same_seed_gives_the_same_images():
    picture, _ = image()
    crop = padded_crop(CONFIG, 2, hflip=0.5, rotation=15)
    torch.manual_seed(3)
    first = [crop(picture) for _ in range(8)]
    torch.manual_seed(3)
    assert all(torch.equal(one, crop(picture)) for one in first)
    assert any(not torch.equal(one, first[0]) for one in first)


def test_rotation_turns_by_at_most_so_many_degrees():
    picture = Image.new("RGB", (33, 33), "white")
    crop = padded_crop(CONFIG | {"input_size": (3, 33, 33)}, 0, rotation=15)
    torch.manual_seed(0)
    turned = torch.stack([crop(picture) for _ in range(50)])
    assert (turned[:, :, 16, 16] == 1).all()
    assert (turned[:, :, 0, 0] == 0).any()  # a corner that came in is zero
    assert turned.mean((1, 2, 3)).min() > 0.85  # 15 degrees bring in some 10 %, 45 degrees 17 %


def test_an_image_of_another_size_is_resized_first():
    assert padded_crop(CONFIG, 1)(image(6)[0]).shape == (3, 4, 4)


def test_the_data_part_of_a_recipe_chooses_it(model):
    settings = {"img_size": 32, "mean": [0.3], "std": [0.33]}
    plain = Data(DataSettings(**settings, crop_padding=0, hflip=0))  # pyright: ignore
    train, kept = plain.train_set(model), plain._train
    pixels = torch.tensor(np.array(kept[0][0])).permute(2, 0, 1) / 255
    assert torch.allclose(train[0][0], (pixels - 0.3) / 0.33)
    torch.manual_seed(0)
    moved = Data(DataSettings(**settings, crop_padding=4, hflip=0, rotation=15)).train_set(model)  # pyright: ignore
    assert moved[0][0].shape == (3, 32, 32)
    assert not torch.equal(moved[0][0], train[0][0])


@pytest.mark.parametrize("wrong", [-1, 1.5])
def test_padding_is_a_count_of_pixels(wrong):
    with pytest.raises(ValueError, match="crop_padding"):
        DataSettings(crop_padding=wrong)
