"""Images decoded once and augmented in batches, beside timm's and torchvision's transforms of one PIL image."""

import json
import math
import os
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from packaging.version import Version
from PIL import Image
from support.pictures import make
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation, str_to_interp_mode
from torchvision.transforms import functional as pil

import timm_tickets as tt
from timm_tickets.config.parts import DataSettings
from timm_tickets.data import augmentation, cache, placing
from timm_tickets.data.augmentation import crop_boxes, erased, flipped, jittered, padded_crops, resized, rotated
from timm_tickets.data.datasets import Data, loader_of
from timm_tickets.data.image_draws import ImageDraws
from timm_tickets.data.subset import Selection, Shuffled, subset_of
from timm_tickets.distributed.sigterm import Stopped

CPU = torch.device("cpu")
# Share of values that torchvision rounds to the other side of PIL's, each by 1: a sixth with 2.6's bilinear one.
ROUNDED = 0.07 if Version(torch.__version__) >= Version("2.15") else 0.2
DIGITS = {"img_size": 32, "mean": [0.3], "std": [0.33], "workers": 0}
EVERYTHING = {"vflip": 0.3, "color_jitter": 0.4, "reprob": 0.5, "remode": "pixel", "recount": 2}


def draws(count, seed=0):
    return ImageDraws(seed, torch.arange(count))


def pictures(count, height, width):
    """Smooth ones and noise, as arrays and as a batch."""
    noise = np.random.default_rng(0)
    made = []
    for number in range(count):
        coarse = 1 if number % 2 else 4
        pixels = noise.integers(0, 256, (height // coarse + 1, width // coarse + 1, 3), dtype=np.uint8)
        made.append(np.array(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)))
    return made, torch.from_numpy(np.stack(made)).permute(0, 3, 1, 2).contiguous()


def settings(**more):
    return DataSettings(**{**DIGITS, **more})  # pyright: ignore


def cached(model, **more):
    """The splits of the digits, or of a folder, as a trainer has them."""
    data = Data(settings(**more))
    return data, data.sets(model, CPU)


# Draws


def test_draws_are_of_seed_and_index_alone():
    whole = ImageDraws(7, torch.arange(50)).uniforms(3)
    some = ImageDraws(7, torch.tensor([31, 4, 4]))
    assert torch.equal(some.uniforms(1), whole[[31, 4, 4], :1])
    assert torch.equal(some.uniforms(2), whole[[31, 4, 4], 1:])
    assert not torch.equal(ImageDraws(8, torch.arange(50)).uniforms(3), whole)
    # SplitMix64 in Python's integers, which never wrap by themselves.
    first, golden, most = 2**64 - 1, 0x9E3779B97F4A7C15, 2**64 - 1

    def mixed(x):
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & most
        x = (x ^ x >> 27) * 0x94D049BB133111EB & most
        return x ^ x >> 31

    state = mixed(mixed(7 + golden & first) ^ 31 * golden & most)
    assert whole[31].tolist() == [(mixed(state + n * golden & most) >> 11) / 2**53 for n in (1, 2, 3)]


def test_draws_are_uniform_normal_and_independent():
    found = draws(20_000).uniforms(6).numpy()
    assert (found >= 0).all()
    assert (found < 1).all()
    assert found.mean(0) == pytest.approx(0.5, abs=0.009)  # 4 standard errors
    assert found.var(0) == pytest.approx(1 / 12, rel=0.03)
    across = np.concatenate([found, np.roll(found, 1, 0)], 1)  # also between neighbours
    assert np.abs(np.corrcoef(across.T) - np.eye(12)).max() < 0.03
    normal = draws(1000).normals(100, CPU).double()
    assert normal.isfinite().all()
    moments = [float((normal**n).mean()) for n in (1, 2, 3, 4)]
    assert moments == pytest.approx([0, 1, 0, 3], abs=0.06)


# Each step as PIL, torchvision and timm have it


@pytest.mark.parametrize("interpolation", augmentation.FILTERS)
@pytest.mark.parametrize(("height", "width", "size"), [(32, 32, 32), (75, 100, 40), (40, 30, 64)])
def test_a_resized_crop_is_pils_but_for_rounding(monkeypatch, interpolation, height, width, size):
    images, batch = pictures(16, height, width)
    boxes = crop_boxes(draws(16), torch.tensor([[height, width]]).expand(16, 2), (0.08, 1), (3 / 4, 4 / 3))
    mode = str_to_interp_mode(interpolation)
    expected = [
        pil.pil_to_tensor(pil.resized_crop(Image.fromarray(image), *box, (size, size), mode))  # pyright: ignore
        for image, box in zip(images, boxes.tolist(), strict=True)
    ]
    monkeypatch.setattr(augmentation, "_SMALL", 0)
    by_torchvision = augmentation.resized_crops(
        batch, draws(16), (size, size), (0.08, 1), (3 / 4, 4 / 3), interpolation
    )
    for found, share in ((resized(batch, boxes, (size, size), interpolation), 0.07), (by_torchvision, ROUNDED)):
        apart = (found.int() - torch.stack(expected).int()).abs()
        # Of noise, bicubic's overshoot is clipped after each direction, and PIL takes either direction first.
        assert (apart > 2).float().mean() < 0.001
        assert (apart > 0).float().mean() < share
        assert apart.float().mean() < share


def test_crops_have_timms_areas_ratios_and_places():
    scale, ratio, size = (0.08, 1.0), (3 / 4, 4 / 3), (60, 110)
    sizes = torch.tensor([size]).expand(20_000, 2)
    ours = crop_boxes(draws(20_000), sizes, scale, ratio).double()
    random.seed(0)
    picture = Image.new("L", size[::-1])
    theirs = torch.tensor(
        [RandomResizedCropAndInterpolation.get_params(picture, scale, ratio) for _ in range(8000)]
    ).double()
    for of in (
        lambda box: box[:, 2] * box[:, 3],
        lambda box: (box[:, 3] / box[:, 2]).log(),
        lambda box: box[:, 0],
        lambda box: box[:, 1],
        lambda box: box[:, 0] / (size[0] - box[:, 2]).clamp(min=1),
    ):
        left, right = of(ours), of(theirs)
        spread = float(right.std())
        assert float(left.mean()) == pytest.approx(float(right.mean()), abs=5 * spread / math.sqrt(8000))
        assert float(left.std()) == pytest.approx(spread, rel=0.05)
        quantiles = torch.linspace(0.1, 0.9, 9).double()
        assert (left.quantile(quantiles) - right.quantile(quantiles)).abs().max() < 0.15 * spread
    assert (ours[:, :2] >= 0).all()
    assert (ours[:, :2] + ours[:, 2:] <= torch.tensor(size)).all()


@pytest.mark.parametrize("size", [(10, 100), (100, 10), (20, 20)])
def test_where_no_try_fits_the_crop_is_timms_centre(size):
    scale, ratio = (1.5, 2.0), (3 / 4, 4 / 3)  # larger than the image
    picture = Image.new("L", size[::-1])
    expected = RandomResizedCropAndInterpolation.get_params(picture, scale, ratio)
    assert crop_boxes(draws(2), torch.tensor([size, size]), scale, ratio).tolist() == [list(expected)] * 2


def test_padded_crops_are_all_the_windows_alike_and_flips_are_flips():
    _, batch = pictures(1, 4, 4)
    batch = batch.expand(5000, -1, -1, -1)
    padded = torch.nn.functional.pad(batch[0], (2, 2, 2, 2))
    windows = [padded[:, top : top + 4, left : left + 4] for top in range(5) for left in range(5)]
    crops = padded_crops(batch, draws(5000), 2)
    counts = [int((crops == window).flatten(1).all(1).sum()) for window in windows]
    assert sum(counts) == 5000
    assert min(counts) > 140
    assert max(counts) < 260  # of 200: four standard deviations
    mirrored = (flipped(batch, draws(5000), 0.3, -1) == batch.flip(-1)).flatten(1).all(1)
    assert mirrored.float().mean() == pytest.approx(0.3, abs=0.03)
    assert torch.equal(flipped(batch, draws(5000), 1.0, -2), batch.flip(-2))
    assert flipped(batch, draws(5000), 0.0, -2) is batch


def test_rotation_is_pils_and_jitter_is_pils_to_the_bit():
    images, batch = pictures(24, 30, 33)
    angles = ((draws(24).uniforms(1) * 2 - 1) * 15).flatten().tolist()
    turned = [pil.pil_to_tensor(pil.rotate(Image.fromarray(i), a)) for i, a in zip(images, angles, strict=True)]
    assert (rotated(batch, draws(24), 15) != torch.stack(turned)).float().mean() < 0.002  # PIL's steps are of 2^-16
    assert min(angles) < -10
    assert max(angles) > 10

    drawn = draws(24).uniforms(4)
    changes = (pil.adjust_brightness, pil.adjust_contrast, pil.adjust_saturation)
    seen = set()
    for grey in (False, True):
        found = jittered(batch[:, :1] if grey else batch, draws(24), 0.4)
        for number, image in enumerate(images):
            changed = Image.fromarray(image[..., 0] if grey else image)
            order = augmentation._ORDERS[int(drawn[number, 0] * 6)].tolist()
            seen.add(tuple(order))
            for kind in order:
                changed = changes[kind](changed, 0.6 + 0.8 * float(drawn[number, 1 + kind]))
            assert torch.equal(found[number], pil.pil_to_tensor(changed).float())
    assert len(seen) == 6


@pytest.mark.parametrize(("mode", "most"), [("const", 1), ("rand", 1), ("pixel", 3)])
def test_what_is_erased_is_timms_in_number_area_shape_and_filling(mode, most):
    torch.manual_seed(0)
    random.seed(0)
    images = torch.full((3000, 3, 20, 24), 9.0)
    theirs = RandomErasing(0.6, mode=mode, max_count=most, device="cpu")(images.clone())
    ours = erased(images.clone(), draws(3000), 0.6, mode, most)
    of = {
        "share": lambda gone: gone.any((1, 2)).float(),
        "area": lambda gone: gone.float().mean((1, 2)),
        "height": lambda gone: gone.any(2).float().sum(1),
        "width": lambda gone: gone.any(1).float().sum(1),
        "centre": lambda gone: gone[:, 10, 12].float(),
    }
    for name, value in of.items():
        left, right = (value((found != 9).all(1)) for found in (ours, theirs))
        bound = 5 * right.std() / math.sqrt(3000)
        assert left.mean() == pytest.approx(float(right.mean()), abs=float(bound)), name
        assert left.std() == pytest.approx(float(right.std()), rel=0.08), name
    left, right = (found[found != 9] for found in (ours, theirs))
    assert (left.mean(), left.var()) == pytest.approx((float(right.mean()), float(right.var())), abs=0.06)
    one = ours[(ours != 9).flatten(1).any(1)][0]
    colours = {tuple(colour.tolist()) for colour in one.flatten(1).T if colour[0] != 9}
    assert (len(colours) == 1) == (mode != "pixel")


@pytest.mark.parametrize(
    "more",
    [
        {"crop_padding": 4, "rotation": 15.0},
        {"scale": [0.3, 1.0], "vflip": 0.3, "color_jitter": 0.4, "reprob": 0.5, "remode": "rand"},
    ],
    ids=["padded", "resized"],
)
def test_images_have_the_mean_and_variance_of_timms(model, more):
    """Of one image, each pixel over many draws."""
    data, (train, *_) = cached(model, **more)
    single = data.train_set(model)
    torch.manual_seed(0)
    random.seed(0)
    theirs = torch.stack([single[3][0] for _ in range(1500)]).double()
    ours = []
    for seed in range(150):
        train.draw_from_(seed)
        ours += [train.__getitems__([3])[0] for _ in range(1)]
    steps, kept = train.steps, train.images
    many = kept[3:4].expand(4000, -1, -1, -1)
    chance = draws(4000)
    for step in steps:
        many = step(many, chance)
    many = many.double()
    error = theirs.std(0) / math.sqrt(1500) + 0.01
    assert ((many.mean(0) - theirs.mean(0)).abs() / error).max() < 5
    assert float(many.var(0).mean()) == pytest.approx(float(theirs.var(0).mean()), rel=0.05)
    few = torch.cat(ours).double()  # asked for one by one they are of the same distribution
    assert float(few.mean()) == pytest.approx(float(theirs.mean()), abs=0.05)


# What is not drawn is the same to the bit


@pytest.mark.parametrize(
    "more",
    [
        {"crop_padding": 0, "hflip": 0.0},
        {"no_aug": True, "input_img_mode": "L", "in_chans": 1},
        {"no_aug": True, "img_size": 24, "crop_pct": 0.8, "interpolation": "lanczos"},
        {"crop_padding": 0, "hflip": 0.0, "img_size": 40, "crop_mode": "border"},
        {"no_aug": True, "img_size": 48, "crop_mode": "squash", "crop_pct": 0.5},
    ],
    ids=str,
)
def test_images_that_are_not_augmented_are_timms_to_the_bit(model, more):
    data, sets = cached(model, **more)
    for kept, single in zip(sets, (data.train_set(model), data.val_set(model), data.test_set(model)), strict=True):
        images, labels = kept.__getitems__([0, 5, 77])
        for number, index in enumerate((0, 5, 77)):
            image, label = single[index]
            assert torch.equal(images[number], image)
            assert labels[number] == label
        assert torch.equal(kept.targets, single.targets)


@pytest.mark.parametrize("more", [{"scale": [0.4, 1]}, {"crop_padding": 4, "rotation": 15.0}], ids=["rrc", "padded"])
def test_on_a_device_nothing_is_asked_of_it(model, more):
    """The meta device has no values: whatever asks for one fails."""
    chosen = settings(**more, **({} if "crop_padding" in more else EVERYTHING))
    config = Data(chosen).preprocessing(model)
    assert not augmentation.not_in_batches(chosen, config)
    images = torch.zeros(6, 3, 32, 32, dtype=torch.uint8, device="meta")
    chance = draws(6)
    for step in augmentation.steps_of(chosen, config, True):
        images = step(images, chance)
    assert images.device.type == "meta"
    assert images.shape == (6, 3, 32, 32)
    assert images.dtype == torch.float32


# Passes, parts and processes


def loaded(loader):
    return [(images.clone(), labels.tolist()) for images, labels in loader]


def same(left, right):
    return len(left) == len(right) and all(
        torch.equal(a, b) and x == y for (a, x), (b, y) in zip(left, right, strict=True)
    )


def test_a_pass_depends_on_its_seed_alone_and_may_begin_anywhere(model):
    _, (train, *_) = cached(model, **EVERYTHING)
    loader = loader_of(train, 100, workers=4, shuffle=True)
    assert loader.num_workers == 0
    sampler: Shuffled = loader.sampler  # pyright: ignore
    sampler.seed = 5
    first = loaded(loader)
    again = loaded(loader)
    assert [labels for _, labels in first] == [labels for _, labels in again]
    assert not same(first, again)  # the same order, augmented anew
    torch.manual_seed(1)
    sampler.seed = 5
    assert same(first, loaded(loader))
    sampler.seed, sampler.first = 5, 300
    assert same(first[3:], loaded(loader))
    sampler.seed, sampler.first = 6, 0
    assert not same(first, loaded(loader))


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_the_batches_of_one(model, processes):
    """Whatever each has drawn before."""
    _, (train, val, _) = cached(model, **EVERYTHING)
    for dataset, shuffle in ((train, True), (val, False)):
        expected = loaded(loader_of(dataset, 32, 0, shuffle))
        shares = []
        for number in range(processes):
            torch.manual_seed(number)
            loader: object = prepare_data_loader(
                loader_of(dataset, 32, 0, shuffle),
                num_processes=processes,
                process_index=number,
                split_batches=True,
                put_on_device=False,
            )
            shares.append(loaded(loader))
        whole = [
            (torch.cat([images for images, _ in parts]), [label for _, labels in parts for label in labels])
            for parts in zip(*shares, strict=True)
        ]
        count = len(expected) - (len(dataset) % 32 > 0 and not shuffle)
        assert same(whole[:count], expected[:count])
        assert len(whole) == len(expected)


SCRIPT = """
import hashlib, json

from accelerate.utils import gather_object

import timm_tickets as tt
from timm_tickets.data.datasets import Data
from timm_tickets.processes import join_processes, place
from timm_tickets.training.build import build_model
from timm_tickets.training.randomness import Epoch
from timm_tickets.training.trainer import Trainer

settings = ["data.vflip=0.3", "data.color_jitter=0.4", "data.reprob=0.5", "data.remode=pixel", "data.val_fraction=0.7"]
recipe = tt.load_recipe("digits_imp", settings)
join_processes()
rank, count = place()
data = Data(recipe.data)
trainer = Trainer(recipe, build_model(recipe, data.num_classes), data)
base = trainer.train_loader
epochs = Epoch(trainer.accelerator.prepare_data_loader(base), base.sampler, base.batch_size, base.num_workers)
found = []
for seed, skip in ((3, 0), (4, 2)):
    for number, (images, _) in enumerate(epochs.batches(seed, skip)):
        assert len(images) == 64 // count
        found += [(seed, number, hashlib.sha256(image.numpy().tobytes()).hexdigest()) for image in images]
if count > 1:
    found = gather_object(found)
if rank == 0:
    print(json.dumps(sorted(found)))
"""


@pytest.mark.slow
def test_two_processes_train_on_the_images_of_one(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    env = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    found = []
    for count in ("1", "2"):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", count]
        done = subprocess.run([*command, str(tmp_path / "script.py")], env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout))
    assert len(found[0]) == 64 * (6 + 4)
    assert found[0] == found[1]


def test_a_part_of_the_images_is_augmented_as_in_the_whole(model):
    _, (train, *_) = cached(model, **EVERYTHING)
    loader = loader_of(train, 64, 0, shuffle=True)
    for selection in (Selection(classes=(3, 7)), Selection(part=(1, 4)), Selection(per_class=5), Selection(batches=2)):
        part = subset_of(loader, selection)
        train.draw_from_(9)
        chosen = part.dataset.indices[:7]
        assert torch.equal(part.dataset.__getitems__([*range(7)])[0], train.__getitems__(chosen)[0])
        if selection.classes:
            assert {label for _, labels in loaded(part) for label in labels} == {3, 7}


# Where they are kept


def told(model, device=CPU, **more):
    data = Data(settings(**more))
    return data.caches.told(data.preprocessing(model), device)


def test_what_cannot_be_done_in_batches_says_so_and_goes_through_timms_loader(model, monkeypatch):
    whole = "data: all images are decoded once into memory (5.52 MB) and pass in batches"
    assert told(model) == told(model, cache="host") == told(model, cache="device") == whole
    assert told(model, cache="none") == "data: all images pass one by one through timm's loader (data.cache=none)"
    rest = "; validation and test images are decoded once into memory (1.55 MB) and pass in batches"
    found = {"aa": "rand-m9-mstd0.5", "train_crop_mode": "rkrc", "train_interpolation": "random"}
    for key, value in {**found, "interpolation": "lanczos"}.items():
        more = {key: value}
        text = (
            f"data: training images pass one by one through timm's loader (data.{key}={value} is not done in batches)"
        )
        assert told(model, **more) == text + rest
        for cache_ in ("device", "host"):
            with pytest.raises(tt.SettingError, match=f"data.cache: {cache_} cannot be had with data.{key}={value}"):
                told(model, cache=cache_, **more)
        train, val, _ = cached(model, **more)[1]
        assert cache.cache_of(val)
        assert not cache.cache_of(train)
        assert train[0][0].shape == (3, 32, 32)
    monkeypatch.setattr(placing, "_free_here", lambda: 2_000_000)
    text = told(model)
    assert (
        "training images pass one by one through timm's loader (decoded they take 3.97 MB, of 500 kB allowed)" in text
    )
    assert "validation images are decoded once into memory (442 kB)" in text
    with pytest.raises(tt.SettingError, match=r"host has no room for the decoded images, 5.52 MB of 2 MB that are"):
        told(model, cache="host")


def test_a_quarter_of_what_is_free_is_taken_by_the_processes_together(model, monkeypatch):
    """On a card first, then in the host's memory."""
    card = torch.device("cuda")
    monkeypatch.setattr(placing, "_free_on", lambda device: 20_000_000 if device.type == "cuda" else 0)
    assert told(model, card) == (
        "data: training and validation images are decoded once into the device's memory (4.41 MB) and pass in batches; "
        "test images are decoded once into the host's memory (1.11 MB) and pass in batches"
    )
    assert "into the host's memory (5.52 MB)" in told(model, card, cache="host")
    monkeypatch.undo()
    free = placing._free_here()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert placing._free_here() == pytest.approx(free / 4, rel=0.2)


def test_a_search_may_go_on_with_its_images_kept_elsewhere():
    hashes = [
        tt.load_recipe("digits_imp", [f"data.cache={where}"]).hash for where in ("auto", "host", "device", "none")
    ]
    assert len(set(hashes[:3])) == 1
    assert hashes[3] != hashes[0] == tt.load_recipe("digits_imp").hash


@pytest.fixture
def folder(tmp_path):
    """Pictures of different sizes in files, and the settings to read them."""
    root = make(tmp_path / "root", side=40)
    for number, path in enumerate(sorted(root.glob("train/*/*.png"))):
        with Image.open(path) as image:
            image.resize((40 + 3 * number, 70 - 2 * number)).save(path)
    more = {"dataset": "folder", "data_dir": str(root), "val_split": "val", "color_jitter": 0.0, "hflip": 0.0}
    return root, {**DIGITS, **more}


@pytest.mark.parametrize("workers", [0, 1])
def test_files_of_different_sizes_are_each_cropped_in_their_own(model, folder, monkeypatch, workers):
    monkeypatch.setattr(placing, "_FOR_A_WORKER", 1)
    data = Data(DataSettings(**{**folder[1], "workers": workers}))  # pyright: ignore
    assert "all images are decoded once into memory (216 kB)" in data.caches.told(data.preprocessing(model), CPU)
    train, *_ = data.sets(model, CPU)
    found, labels = train.__getitems__([0, 9, 17])
    assert [tuple(image.shape) for image in train.images][:2] == [(3, 70, 40), (3, 68, 43)]
    assert labels.tolist() == [0, 1, 2]
    sizes = torch.tensor([train.images[index].shape[-2:] for index in (0, 9, 17)])
    boxes = crop_boxes(ImageDraws(0, torch.tensor([0, 9, 17])), sizes, (0.08, 1), (3 / 4, 4 / 3))
    config = data.preprocessing(model)
    mode = str_to_interp_mode(config["interpolation"])
    together = augmentation._one_tensor([train.images[index] for index in (0, 9, 17)])
    by_products = resized(together, boxes, (32, 32), config["interpolation"]).float()
    for number, index in enumerate((0, 9, 17)):
        whole = data._train[index][0]
        expected = pil.to_tensor(pil.resized_crop(whole, *boxes[number].tolist(), (32, 32), mode))  # pyright: ignore
        assert ((found[number] * 0.33 + 0.3) - expected).abs().mean() < ROUNDED * 1.5 / 255
        assert (by_products[number] / 255 - expected).abs().mean() < 0.1 / 255


def test_an_image_that_cannot_be_decoded_is_found_when_the_cache_is_filled(model, folder):
    root, more = folder
    (root / "train" / "ant" / "5.png").write_bytes(b"no image")
    data = Data(DataSettings(**more, unreadable=0.3))  # pyright: ignore
    train, _, test = data.sets(model, CPU)
    kept = train.fill()
    assert torch.equal(kept[5], kept[0])
    said = []
    data.unreadable.look(said.append)
    assert said[0].startswith("1 of 18 training images cannot be decoded, and the next of its class is taken for each")
    (root / "test" / "bee" / "1.png").write_bytes(b"no image")
    with pytest.raises(tt.TrainingError, match=r"bee/1.png cannot be decoded"):
        test.fill()
    assert test.images is None
    few = Data(DataSettings(**more, unreadable=0.01))  # pyright: ignore
    with pytest.raises(tt.TrainingError, match=r"data.unreadable: 1 of 18 training images cannot be decoded"):
        few.sets(model, CPU)[0].fill()


def test_filling_shows_how_far_it_is_and_ends_where_a_stop_is_asked(model, folder, monkeypatch):
    data = Data(DataSettings(**folder[1]))  # pyright: ignore
    train, *others = data.sets(model, CPU)
    state = torch.get_rng_state()
    told_ = []
    data.caches.fill(lambda batches, count: told_.append(count) or batches)
    assert told_ == [1, 1, 1]
    assert all(one.images is not None for one in (train, *others))
    assert torch.equal(torch.get_rng_state(), state)
    data.caches.fill(lambda batches, count: pytest.fail("they are there"))
    assert data.sets(model, CPU)[0] is train  # for every trainer
    monkeypatch.setattr(cache, "stop_asked", lambda: True)
    with pytest.raises(Stopped):
        Data(DataSettings(**folder[1])).sets(model, CPU)[0].fill()  # pyright: ignore


def test_images_of_other_kinds_than_bytes_are_left_to_timm(model, folder):
    text = told(model, **{**folder[1], "input_img_mode": None})
    why = "data.input_img_mode=null is not done in batches"
    assert text == f"data: all images pass one by one through timm's loader ({why})"


@pytest.mark.cuda
@pytest.mark.parametrize("kept", ["device", "host"])
@pytest.mark.parametrize("more", [{"crop_padding": 4}, {**EVERYTHING, "remode": "const"}], ids=["padded", "resized"])
def test_on_a_card_the_images_are_those_of_the_cpu_and_nothing_waits(model, kept, more):
    _, (expected, *_) = cached(model, **more)
    data = Data(settings(cache=kept, **more))
    train, *_ = data.sets(model, torch.device("cuda"))
    train.__getitems__([0, 1])
    torch.cuda.set_sync_debug_mode("error")
    try:
        images, labels = train.__getitems__([3, 1000, 7])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    ours, ours_labels = expected.__getitems__([3, 1000, 7])
    assert labels.tolist() == ours_labels.tolist()
    assert (images.cpu() - ours).abs().mean() < 0.1 / 255 / 0.33
