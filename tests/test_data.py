import contextlib
import io
import json
import os
import shutil
import signal
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from support.pictures import CLASSES, make

import timm_tickets as tt
from timm_tickets.config.parts import DataSettings, TrainingSettings
from timm_tickets.data.contents import differences
from timm_tickets.data.datasets import Data, loader_of
from timm_tickets.data.images import Images, minding_workers
from timm_tickets.data.transforms import padded_crop
from timm_tickets.training.build import check_batch

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


def settings(root, **more):
    where = None if more.get("dataset") == "digits" else str(root)
    return DataSettings(**{"dataset": "folder", "data_dir": where, "val_split": "val", "workers": 0, **more})  # pyright: ignore


@pytest.fixture
def root(tmp_path):
    return make(tmp_path / "pictures")


def told(*args, **more):
    """What a data set is refused with, in one line."""
    with pytest.raises(tt.SettingError) as error:
        Data(settings(*args, **more))
    return str(error.value)


@pytest.mark.parametrize("dataset", ["folder", "torch/folder"])
@pytest.mark.parametrize("role", ["train", "val", "test"])
def test_a_split_that_is_not_there_is_refused_with_those_that_are(root, dataset, role):
    """timm would take the whole root for it."""
    text = told(root, dataset=dataset, **{f"{role}_split": f"{role}x"})
    assert f"data.{role}_split: '{role}x' is unknown; did you mean '{role}'? Valid: test, train, val" in text
    assert f"Valid: test, train, val (the folders in {root})" in told(root, dataset=dataset, test_split="test[:50%]")


def test_a_folder_one_level_too_deep_or_too_high_is_told_where_the_splits_are(root):
    assert f"there is no folder 'train' in {root / 'train'}, but in {root}; set data.data_dir={root}" in told(
        root / "train"
    )
    assert f"in {root.parent}, but in {root}; set data.data_dir={root}" in told(root.parent)
    assert "data.data_dir: is not set" in told(root, data_dir=None)
    assert "is not a folder" in told(root / "none")


def test_train_and_val_alone_need_a_choice_of_what_is_tested_on(tmp_path):
    root = make(tmp_path, {"train": 6, "val": 2})
    text = told(root, val_split=None)
    assert f"there is no 'test' in {root}, which has train, val. Set data.test_split=val to score" in text
    assert "data.val_fraction=0.1" in text
    assert "set data.val_split=val to validate on val" in text
    for word in ("val", "validation"):  # timm's other words for it
        data = Data(settings(root, val_split=None, test_split=word, val_fraction=0.5))
        assert data.told == (
            f"data: 9 images to train on ({root / 'train'}), 9 held out to validate on, 6 to test on ({root / 'val'})"
        )


class Parts(torch.utils.data.Dataset):
    """As torchvision's CIFAR-10: any word but 'train' is its test part."""

    def __init__(self, split, targets=(0, 1, 2)):
        self.data = np.full((4 * len(targets), 8, 8, 3), split == "train", dtype=np.uint8)
        self.targets = 4 * list(targets)

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        return Image.fromarray(self.data[index]), self.targets[index]


@pytest.fixture
def parts(monkeypatch):
    """Let timm's data sets be of these labels by split."""
    labels = {}

    def create(name, split, **_):
        found = Parts(split, labels.get(split, (0, 1, 2)))
        if name.startswith("hfds"):
            del found.data  # what it holds is on the disk
        return found

    monkeypatch.setattr("timm_tickets.data.splits.create_dataset", create)
    return labels


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ({"test_split": "tset"}, "data.test_split: 'tset' is unknown; did you mean 'test'? Valid: eval,"),
        ({"train_split": "trian"}, "data.train_split: 'trian' is unknown; did you mean 'train'"),
        ({"test_split": "train"}, "data.test_split: split 'train' of torch/cifar10 has images of data.train_split"),
        ({"val_split": "test"}, "data.test_split: split 'test' of torch/cifar10 has images of data.val_split"),
        ({"val_split": "val", "test_split": "eval"}, "has images of data.val_split ('val')"),
        ({"dataset": "hfds/some", "test_split": "train[:10%]"}, "has images of data.train_split ('train')"),
        ({"dataset": "digits", "test_split": "train"}, "split 'train' of digits has images of data.train_split"),
        ({"dataset": "digits", "test_split": "tset"}, "data.test_split: 'tset' is unknown; did you mean 'test'"),
        ({"dataset": "wds/some"}, "is read as a stream"),
    ],
)
def test_splits_of_other_data_sets(parts, words, text):
    assert text in told(None, **{"dataset": "torch/cifar10", "val_split": None, **words})


def test_labels_without_names_are_told_by_number(parts):
    parts["test"] = (0, 2, 5, -1)
    text = told(None, dataset="torch/cifar10", val_split=None)
    assert "no image of class 1, and class -1, 5, of which training has no image" in text
    parts["test"] = (0, 1, 2)
    assert Data(settings(None, dataset="torch/cifar10", val_split=None, val_fraction=0.5)).num_classes == 3


@pytest.mark.parametrize("dataset", ["folder", "torch/folder"])
@pytest.mark.parametrize("role", ["val", "test"])
@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda split: shutil.rmtree(split / "bee"), "it has no image of class 'bee' (1). Name"),
        (
            lambda split: shutil.copytree(split / "bee", split / "dog"),
            "it has class 'dog' (3), of which training has no",
        ),
        (lambda split: (split / "ant").rename(split / "wasp"), "no image of class 'ant' (0), and class 'wasp' (3), of"),
    ],
)
def test_classes_that_differ_between_splits_are_refused_by_name(root, dataset, role, change, text):
    change(root / role)
    found = told(root, dataset=dataset)
    assert f"data.{role}_split: the classes of {root / role} are not those of {root / 'train'}: " in found
    assert text in found
    kept = Data(settings(root, dataset=dataset, classes=[2, 1] if "'ant'" in text else [2, 0]))
    assert kept.num_classes == 2
    test = kept._test
    assert {test[i][1] for i in range(len(test))} == {0, 1}
    assert all(test[i][0].getpixel((0, 0))[2] >= 150 for i in range(len(test)) if test[i][1] == 0)  # cats are blue


def test_the_numbers_of_classes_are_the_training_splits_in_all(tmp_path, monkeypatch):
    """Names that sort alike timm numbers in the order of a set of strings: another one in each process."""
    root = make(tmp_path, classes=("1", "01", "a", "A"))
    create = timm.data.create_dataset
    seen = []

    def shuffled(*args, **kwargs):
        found = create(*args, **kwargs)
        if len(seen) in (0, 2):  # timm's own order is either of the two
            numbers = found.reader.class_to_idx
            for one, other in (("1", "01"), ("a", "A")):
                swap = {numbers[one]: numbers[other], numbers[other]: numbers[one]}
                found.reader.samples = [(path, swap.get(label, label)) for path, label in found.reader.samples]
                numbers[one], numbers[other] = numbers[other], numbers[one]
        seen.append(found)
        return found

    monkeypatch.setattr("timm_tickets.data.splits.create_dataset", shuffled)
    data = Data(settings(root))
    for split in data._splits:
        names = {Path(split.data.name(i)).parent.name: split.data[i][1] for i in range(len(split.data))}
        assert names == {"01": 0, "1": 1, "A": 2, "a": 3}


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_an_image_in_two_splits_is_refused(root, link):
    link(root / "train" / "ant" / "4.png", root / "test" / "ant" / "same.png")
    text = told(root)
    assert f"data.test_split: 1 of the 7 images are in data.train_split too, such as {root}/test/ant/same.png" in text
    (root / "test" / "ant" / "same.png").unlink()
    link(root / "test" / "ant" / "1.png", root / "val" / "ant" / "same.png")
    assert "are in data.val_split too" in told(root)
    assert "are in data.train_split too" in told(root, test_split="train")
    assert "without data.val_split, data.val_fraction of" in told(root, val_split="test")


def test_a_copy_of_a_split_is_refused_and_other_images_of_the_same_names_and_sizes_are_not(root):
    shutil.rmtree(root / "test")
    shutil.copytree(root / "train", root / "test")
    assert f"{root / 'test'} is a copy of {root / 'train'}, which is data.train_split" in told(root)
    for path in (root / "test").rglob("*.png"):
        path.write_bytes(path.read_bytes()[::-1])
    assert len(Data(settings(root))._test) == 18


def test_what_is_in_the_splits_is_remembered_and_changes_are_told(root):
    before = Data(settings(root)).record
    assert {role: {name: count for name, (count, _) in classes.items()} for role, classes in before.items()} == {
        "train": dict.fromkeys(CLASSES, 6),
        "val": dict.fromkeys(CLASSES, 2),
        "test": dict.fromkeys(CLASSES, 2),
    }
    assert not differences(json.loads(json.dumps(before)), Data(settings(root)).record)
    moved = Data(settings(root.rename(root.with_name("moved")))).record
    assert moved == before
    root = root.with_name("moved")
    (root / "train" / "bee" / "3.png").rename(root / "train" / "bee" / "9.png")
    (root / "test" / "cat" / "0.png").unlink()
    assert differences(before, Data(settings(root)).record) == [
        "train: 18 images there, 18 now; class 'bee': 6 there, 6 now, of other names or sizes",
        "test: 6 images there, 5 now; class 'cat': 2 there, 1 now",
    ]


def test_arrays_are_remembered_by_every_value(parts):
    given = settings(None, dataset="torch/cifar10", val_split=None, val_fraction=0.5)
    before = Data(given).record
    assert Data(given).record == before
    parts["train"] = (2, 1, 0)
    assert differences(before, Data(given).record) == ["train: 12 images there, 12 now, with other values"]


def spoil(path):
    path.write_bytes(path.read_bytes()[:60])


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_training_image_is_replaced_by_the_next_of_its_class_and_named(root, model, workers):
    """timm takes the next one, whatever its class."""
    for name in ("ant/4", "ant/5", "cat/1"):
        spoil(root / "train" / f"{name}.png")
    (root / "train" / "cat" / "2.png").write_bytes(b"")
    data = Data(settings(root, unreadable=0.3))
    images = data.train_set(model)
    images.transform = np.array  # pyright: ignore
    said = []
    for _ in range(2):
        loaded = [pixels[0].numpy() for pixels, _ in loader_of(images, 1, workers)]
        data.unreadable.look(said.append)
    instead = [0, 1, 2, 3, 0, 0, *range(6, 13), 15, 15, 15, 16, 17]
    assert all((pixels == np.array(data._train[index][0])).all() for pixels, index in zip(loaded, instead, strict=True))
    names = ", ".join(str(root / "train" / f"{name}.png") for name in ("ant/4", "ant/5", "cat/1", "cat/2"))
    assert said == [f"4 of 18 training images cannot be decoded, and the next of its class is taken for each: {names}"]


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_unreadable_images_are_refused(root, model, workers):
    for name in ("ant/4", "cat/1"):
        spoil(root / "train" / f"{name}.png")
    data = Data(settings(root, unreadable=0.1))
    with pytest.raises(tt.TrainingError) as error:
        list(loader_of(data.train_set(model), 6, workers))
    text = str(error.value)
    assert text.startswith("data.unreadable: 2 of 18 training images cannot be decoded, more than the share of 0.1")
    assert str(root / "train" / "cat" / "1.png") in text
    assert "Set it higher" not in text
    for number in range(6):
        spoil(root / "train" / "bee" / f"{number}.png")
    data = Data(settings(root, unreadable=0.9))
    with pytest.raises(tt.TrainingError, match=r"no training image of the class of .*bee.*can be decoded; mend them$"):
        list(loader_of(data.train_set(model), 6, workers))


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("change", "reason"), [(spoil, "cannot be decoded: "), (os.unlink, "cannot be read: No such file or directory")]
)
def test_an_image_that_is_scored_or_gone_has_no_stand_in(root, model, monkeypatch, workers, change, reason):
    data = Data(settings(root, workers=workers, unreadable=0.9))
    said = []
    data.check_scored(said.append)
    assert not said
    for path in ("test/cat/1.png", "val/ant/0.png"):
        change(root / path)
    for images, path in ((data.test_set(model), "test/cat/1.png"), (data.val_set(model), "val/ant/0.png")):
        with pytest.raises(tt.TrainingError) as error:
            list(loader_of(images, 3, workers))
        assert str(error.value).startswith(f"{root / path} {reason}")
        assert "put it back as it was, and the same command continues" in str(error.value)
        assert "\n" not in str(error.value)
    monkeypatch.setattr("timm_tickets.data.datasets._MANY", 11)
    with pytest.raises(tt.SettingError) as error:
        data.check_scored(said.append)
    assert said == ["reading the 12 images to validate and test on once, as each will have to be scored"]
    first, *others = str(error.value).splitlines()
    assert first.startswith("data: 2 of 12 images to validate and test on cannot be scored")
    assert [line.split()[0] for line in others] == [str(root / "test/cat/1.png"), str(root / "val/ant/0.png")]
    os.unlink(root / "train" / "bee" / "2.png")
    with pytest.raises(tt.TrainingError, match=r"bee/2.png cannot be read"):
        list(loader_of(data.train_set(model), 3, workers))


def test_images_in_tars_are_read_named_and_compared(root, model):
    for split in ("train", "val", "test"):
        with tarfile.open(root / f"{split}.tar", "w") as tar:
            for path in sorted((root / split).rglob("*.png")):
                tar.add(path, path.relative_to(root / split))
        shutil.rmtree(root / split)
    words = {f"{split}_split": f"{split}.tar" for split in ("train", "val", "test")}
    data = Data(settings(root, **words))
    assert [(len(s.data), sorted(set(s.data.targets.tolist()))) for s in data._splits] == [
        (18, [0, 1, 2]),
        (6, [0, 1, 2]),
        (6, [0, 1, 2]),
    ]
    assert len(list(loader_of(data.train_set(model), 6, 1))) == 3
    assert "6 of the 6 images are in data.val_split too, such as ant/0.png" in told(
        root, **{**words, "test_split": "val.tar"}
    )


class Table:
    """As timm's reader of hfds/: bytes in a table, labels that can be had without them."""

    def __init__(self, files):
        self.files = files

    def iter_targets(self):
        return iter([0, 1] * (len(self.files) // 2))

    def __getitem__(self, index):
        return io.BytesIO(self.files[index]), index % 2

    def filename(self, index, **_):
        return None


def test_images_in_a_table(root):
    files = [path.read_bytes() for path in sorted((root / "train").rglob("*.png"))]
    files[6] = b"no image"
    images = Images(SimpleNamespace(reader=Table(files)), "L")
    assert images.targets.tolist() == [0, 1] * 9
    assert images[3][0].mode == "L"
    assert images.files(range(18)) is None
    with pytest.raises(tt.TrainingError, match=r"^image 6 cannot be decoded: it is no image$"):
        images[6]


@pytest.mark.parametrize(
    ("given", "channels", "text"),
    [
        ({"input_img_mode": "L"}, 3, "mode L has 1 channels, and the model takes 3; set data.input_img_mode=RGB, or"),
        ({"input_img_mode": "L", "dataset": "digits", "data_dir": None, "val_split": None}, 3, "mode L has 1 channels"),
        ({}, 1, "mode RGB has 3 channels, and the model takes 1; set data.input_img_mode=L, or model.in_chans=3"),
        ({"input_img_mode": "L"}, 1, r"data.mean: has 3 values \(0.5, 0.5, 0.5\), and the model takes 1 channels"),
    ],
)
def test_images_of_other_channels_than_the_models_are_refused(root, given, channels, text):
    settings_ = {"dataset": "folder", "data_dir": str(root), "val_split": "val", "workers": 0, **given}
    model = timm.create_model("test_resnet", in_chans=channels)
    with pytest.raises(tt.SettingError, match=text):
        Data(DataSettings(**settings_)).check_channels(model, channels)


@pytest.mark.parametrize(("side", "settings", "refused"), [(32, {}, True), (64, {}, False), (64, {"mixup": 0.2}, True)])
def test_one_image_a_step_is_refused_where_it_is_too_few(model, side, settings, refused):
    """test_resnet at 32 pixels ends in one value a channel."""
    given = TrainingSettings(batch_size=1, **settings)  # pyright: ignore
    buffers = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    expected = pytest.raises(tt.SettingError, match=r"training.batch_size: 1 and the images of this run leave one")
    with expected if refused else contextlib.nullcontext():
        check_batch(given, model, 1, (3, side, side))
    check_batch(given, model, 2, (3, side, side))
    assert model.training
    assert all(torch.equal(value, buffers[name]) for name, value in model.state_dict().items())
    if not (refused or settings):
        model(torch.zeros(1, 3, side, side))  # what is not refused is right
    elif not settings:
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            model(torch.zeros(1, 3, side, side))


class Dying(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        if torch.utils.data.get_worker_info() is not None and index == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.zeros(1), 0


def test_the_death_of_a_process_that_loads_images_is_told_in_words():
    loaded = []
    with (
        pytest.raises(tt.TrainingError, match=r"loads images has died .* the same command continues"),
        minding_workers(),
    ):
        loaded += list(loader_of(Dying(), 1, 1))
    assert not loaded
    with pytest.raises(RuntimeError, match="shape"), minding_workers():
        raise RuntimeError("shape mismatch")
