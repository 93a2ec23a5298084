"""Every shipped recipe, on made images: its own model, data settings, pruner and training, for two optimizer steps."""

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from support.commands import call
from torch import nn

import timm_tickets as tt
from timm_tickets.core.masks import full_masks
from timm_tickets.data.datasets import Data
from timm_tickets.sparse.prunable import classifier_names
from timm_tickets.training.build import build_model, model_kwargs
from timm_tickets.training.checkpointing import Silent
from timm_tickets.training.trainer import Trainer

RECIPES = tt.list_recipes()


def _once_a_method_and_network():
    """The recipes; those are slow that share method and network with one before, and all but one of large networks."""
    seen = set()
    for name in RECIPES:
        recipe = tt.load_recipe(name)
        kind = recipe.pruner["name"], recipe.model.model
        large = recipe.model.model.startswith(("resnet50", "vit_small", "cifar_vgg19"))  # ten to thirty seconds each
        slow = kind in seen or (large and name != "rigl_imagenet_resnet50")
        yield pytest.param(name, marks=pytest.mark.slow) if slow else name
        seen.add(kind)


FIRST_OF_THEIR_KIND = list(_once_a_method_and_network())
CLASSES = {"digits": 10, "torch/cifar10": 10, "torch/cifar100": 100, "folder": 1000}


class Stopped(Exception):
    pass


class TwoSteps(Silent):
    steps = 0

    def step(self):
        self.steps += 1
        if self.steps == 2:
            raise Stopped


class Recorded(nn.Module):
    """A criterion that remembers its losses."""

    def __init__(self, criterion):
        super().__init__()
        self.criterion, self.losses = criterion, []

    def forward(self, output, target):
        loss = self.criterion(output, target)
        self.losses.append(loss.item())
        return loss


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Folders train and val of noise in ten classes."""
    root = tmp_path_factory.mktemp("images")
    noise = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 1)):
        for label in range(10):
            folder = root / split / f"class{label}"
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = noise.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    return root


def overrides(recipe, images, tmp_path):
    """What makes a recipe small: other images, a batch of four, and its checkpoint written first."""
    found = ["data.workers=0", "training.batch_size=4", f"output={tmp_path}"]
    classes = CLASSES[recipe.data.dataset]
    if recipe.data.dataset != "digits":
        found += ["data.dataset=folder", f"data.data_dir={images}", "data.dataset_download=false"]
        found += [f"data.num_classes={classes}", "data.val_fraction=0.25", "data.test_split=validation"]
    if recipe.data.dataset == "folder":
        found.append("data.img_size=32")
    if recipe.model.pretrained or recipe.model.initial_checkpoint is not None:
        trained = timm.create_model(recipe.model.model, **model_kwargs(recipe, classes))
        for module in trained.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.running_mean, -0.1, 0.1)
        save_file(trained.state_dict(), tmp_path / "trained.safetensors")
        found += ["model.pretrained=false", f"model.initial_checkpoint={tmp_path / 'trained.safetensors'}"]
    return found


def first_run(pruner):
    """The first run that a pruner asks for, or the training of its ticket where it asks for none."""
    run = next(pruner, None)
    if run is not None:
        return run
    run = tt.Training(tt.Run(1), pruner.subnet)
    pruner.subnet.load_(pruner.ticket.values)
    pruner.subnet.set_mask_(pruner.ticket.masks)
    return run


@pytest.mark.filterwarnings("ignore:jackpot")  # the trained networks here are made up
@pytest.mark.filterwarnings("ignore:synflow.*1 of 15 layers")  # a shortcut beside a branch may go
@pytest.mark.parametrize("name", FIRST_OF_THEIR_KIND)
def test_two_steps_of_every_recipe(name, images, tmp_path):
    # Sorting the 20 million scores of VGG-19 takes ten seconds: only the first of its jackpots has them all.
    narrow = ["model.model_kwargs.widths=[16,16,16,16,16]"] if name.startswith("jackpot_cifar10_vgg19_") else []
    recipe = tt.load_recipe(name, narrow)
    small = tt.load_recipe(recipe, overrides(recipe, images, tmp_path))
    data = Data(small.data)
    model = build_model(small, data.num_classes)
    assert model.num_classes == CLASSES[recipe.data.dataset]
    if small.model.initial_checkpoint is not None:
        trained = [module.running_mean.any() for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
        assert all(trained)
    pruner = tt.create_pruner(small.pruner["name"], model, **small.method_settings)
    trainer = Trainer(small, model, data)
    assert trainer.accelerator.non_blocking  # what a loader has pinned is copied while a card computes
    trainer.criterion = recorded = Recorded(trainer.criterion)
    run = first_run(pruner)
    subnet = run.subnet
    before = {n: value.detach().clone() for n, value in learned(subnet).items()}
    progress = TwoSteps()
    with pytest.raises(Stopped):
        trainer.fit(run, None, progress)
    assert len(recorded.losses) == (2 if not run.reads_only else 4)  # each batch's again, for its gradients
    assert np.isfinite(recorded.losses).all()
    if run.reads_only:  # it reads gradients and restores the weights
        heads = {f"{head}.weight" for head in classifier_names(model)}  # the first of GraSP's gradients is theirs too
        assert set(run.scores) == set(subnet.names) | (heads if small.pruner["name"] == "grasp" else set())
        # In test_resnet, the digits', timm starts the last scale of each block at zero, and some gradients with it.
        every = any if name.startswith("digits") else all
        assert every(score.any() for score in run.scores.values())
    else:
        assert any(not torch.equal(value, before[n]) for n, value in learned(subnet).items())
    assert set(subnet.mask) == set(full_masks(subnet.weights()))
    if small.pruner["name"] != "continuous_sparsification":  # soft while it trains
        for n, mask in subnet.mask.items():
            layer, _, leaf = n.rpartition(".")
            assert not getattr(model.get_submodule(layer), leaf)[~mask].any()


def learned(subnet):
    """What a run changes: scores, or where there are none weights."""
    return subnet.scores() if subnet.gates else subnet.weights()


def test_the_list_shows_every_recipe_with_its_source():
    lines = call("recipe", "--list").output.splitlines()
    found = dict(line.split(": ", 1) for line in lines)
    assert list(found) == [*RECIPES, *tt.list_leaderboards()]
    assert "no source given" not in found.values()
    assert all(len(source.splitlines()) == 1 for source in found.values())


def rates(name, updates=10):
    """The learning rate at every step of a recipe, epochs of so many steps, as the trainer asks for it."""
    from timm.scheduler import create_scheduler_v2
    from timm.scheduler.scheduler_factory import scheduler_kwargs

    t = tt.load_recipe(name).training
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=t.lr)
    schedule = scheduler_kwargs(t) | {"num_epochs": t.epochs, "updates_per_epoch": updates}
    scheduler = create_scheduler_v2(optimizer, **schedule)[0]
    scheduler.step(0)
    scheduler.step_update(0)
    found = []
    for epoch in range(t.epochs):
        for step in range(updates):
            found.append(optimizer.param_groups[0]["lr"])
            scheduler.step_update(epoch * updates + step + 1)
        scheduler.step(epoch + 1)
    return np.array(found).reshape(t.epochs, updates)


STEPS = {
    "imp_cifar10_resnet20": (160, {0: 0.1, 79: 0.1, 80: 0.01, 119: 0.01, 120: 0.001, 159: 0.001}),
    "imp_cifar100_resnet18": (182, {0: 0.1, 89: 0.1, 90: 0.01, 134: 0.01, 135: 0.001, 181: 0.001}),
    "continuous_sparsification_cifar10_resnet20": (85, {0: 0.1, 55: 0.1, 56: 0.01, 70: 0.01, 71: 0.001, 84: 0.001}),
    "colt_cifar10_resnet18": (50, {1: 0.1, 20: 0.1, 21: 0.02, 30: 0.02, 31: 0.004, 45: 0.004, 46: 0.0008, 49: 0.0008}),
    "rigl_imagenet_resnet50": (100, {5: 1.6, 29: 1.6, 30: 0.16, 69: 0.16, 70: 0.016, 89: 0.016, 90: 0.0016}),
    "imp_imagenet_resnet50": (90, {5: 0.4, 29: 0.4, 30: 0.04, 59: 0.04, 60: 0.004, 79: 0.004, 80: 0.0004}),
}


@pytest.mark.parametrize("name", STEPS)
def test_the_rate_falls_at_the_papers_epochs(name):
    epochs, wanted = STEPS[name]
    found = rates(name)
    assert len(found) == epochs
    assert {epoch: found[epoch, 0] for epoch in wanted} == pytest.approx(wanted)
    # By updates timm is one step early; by epochs it is not early at all.
    last = -1 if not tt.load_recipe(name).training.sched_on_updates else -2
    assert all(found[epoch, last] == pytest.approx(rate) for epoch, rate in wanted.items())


def test_colt_warms_up_over_its_first_epoch_from_zero():
    assert rates("colt_cifar10_resnet18")[0] == pytest.approx(np.arange(10) / 100)


def test_cosines_reach_zero_after_the_last_epoch():
    found = rates("frozen_slt_cifar10_conv6")[:, 0]
    assert found[[0, 50]] == pytest.approx([0.1, 0.05])
    assert found[99] == pytest.approx(0.1 * (1 + np.cos(np.pi * 0.99)) / 2)
