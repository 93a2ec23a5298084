"""Inside torch-pruning: its criteria on our groups, our importance and our pruner in its hands."""

import copy
import json
import re
import runpy
import shlex
import sys
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
import torch_pruning as tp
from commands import call
from support.every_method import Row, found, fresh, loader, pruner_of, searched, train_run
from torch import nn

import timm_tickets as tt
from timm_tickets.core import optional
from timm_tickets.experiments.controls import control_of
from timm_tickets.integrations import ticket_pruner
from timm_tickets.structure import units
from timm_tickets.structure.dependencies import importances, items_of, read_by, with_gradients

pytestmark = [
    pytest.mark.filterwarnings("ignore:Unwrapped parameters detected"),  # torch-pruning's
    pytest.mark.filterwarnings("ignore:.*without passing its rewind point"),
]
SCRIPT = Path(__file__).parent / "scripts" / "torch_pruning" / "prune.py"
LAYER = "layer1.0.conv1.weight"
IMAGES = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _found_once(monkeypatch):
    for module in (units, ticket_pruner):
        monkeypatch.setattr(module, "find_groups", found)


def lively(model, seed=0):
    """With scales and gradients that tell channels from one another, as a training leaves them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.add_(torch.rand(parameter.shape, generator=generator))
    return model


def named(group, types):
    """The layers of a group of torch-pruning's that an importance reads, and what is cut of each."""
    return frozenset(
        (dep.target.name.partition(" ")[0], dep.handler) for dep, _ in group if isinstance(dep.layer, types)
    )


IMPORTANCES = {
    "magnitude": tp.importance.MagnitudeImportance(),
    "l1": tp.importance.MagnitudeImportance(p=1),
    "lamp": tp.importance.LAMPImportance(),
    "bn_scale": tp.importance.BNScaleImportance(),
    "taylor": tp.importance.TaylorImportance(),
}


def same_as_theirs(model, importance, vectors, ignored, images):
    """Checks every group of torch-pruning's own graph; how many there are."""
    types, groups = read_by(importance), vectors
    gradients = {name: one.grad for name, one in model.named_parameters()}
    ours = {}
    for one in items_of(model, groups, types):
        values = importances([one], importance, len(groups), with_gradients(model, gradients), 0)
        ours[named(one.group, types)] = values[groups.family == one.family]
    graph = tp.DependencyGraph().build_dependency(model, images)
    theirs = {named(group, types): importance(group) for group in graph.get_all_groups(ignored_layers=ignored)}
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        # LAMP divides by what a sum leaves of a sum, which makes more of the order in which they are added.
        rtol = 1e-4 if isinstance(importance, tp.importance.LAMPImportance) else 1e-5
        torch.testing.assert_close(ours[key].float(), value, rtol=rtol, atol=1e-6)
    return len(theirs)


@pytest.mark.parametrize("name", IMPORTANCES)
def test_on_our_groups_its_importances_are_what_they_are_on_its_own(name):
    model = lively(fresh())
    groups = found(model, ("*",), (), True, vectors=True)
    assert same_as_theirs(model, IMPORTANCES[name], groups, [model.fc], IMAGES) == len(groups.families) > 8


@pytest.mark.slow
@pytest.mark.parametrize("name", IMPORTANCES)
def test_on_resnet18_too(name):
    model = lively(timm.create_model("resnet18", num_classes=10))
    groups = found(model, ("*",), (), True, vectors=True)
    assert same_as_theirs(model, IMPORTANCES[name], groups, [model.fc], torch.randn(1, 3, 64, 64)) == 12


def test_of_a_head_the_importance_is_the_mean_over_its_dimensions():
    model = timm.create_model("vit_tiny_patch16_224", depth=1, num_heads=4, img_size=32, num_classes=4)
    groups = found(model, ("*",), (), False, vectors=True).heads()
    (one,) = items_of(model, groups, (nn.Linear,))
    ours = importances([one], tp.importance.MagnitudeImportance(normalizer=None), 4, with_gradients(model, {}), 0)
    attention = model.blocks[0].attn
    rows = attention.qkv.weight.view(3, 4, 48, -1).square().sum((0, 3))
    columns = attention.proj.weight.view(-1, 4, 48).square().sum(0)
    torch.testing.assert_close(ours.float(), ((rows + columns) / 2).mean(1))


REGULARISERS = {
    "tp_bn_scale": tp.pruner.BNScalePruner,
    "tp_group_norm": tp.pruner.GroupNormPruner,
    "tp_growing_reg": tp.pruner.GrowingRegPruner,
}


@pytest.mark.parametrize("name", REGULARISERS)
def test_its_regularisers_add_what_they_add_on_its_own_groups(name):
    """To the gradients of a step, after two increases of the growing one."""
    theirs, ours = lively(fresh()), lively(fresh())
    pruner = tt.create_pruner(
        name, ours, sparsity=0.5, classifier=True, **({"interval": 1} if "growing" in name else {})
    )
    own = REGULARISERS[name](
        theirs, IMAGES, pruner.method.importance(tp), reg=pruner.method.reg, ignored_layers=[theirs.fc]
    )
    run = next(pruner)
    before_step, run.batches_per_epoch = run.request.before_step, 1
    for step in range(3):
        for model in (theirs, ours):
            lively(model, step)
        run.step = step
        if "growing" in name and step:
            own.update_reg()
        own.regularize(theirs)
        before_step(run)
        plain = dict(lively(fresh(), step).named_parameters())
        moved = 0
        for (key, one), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(
                one.grad, other.grad, rtol=1e-5, atol=1e-7, msg=lambda text, key=key: f"{key}: {text}"
            )
            moved += not torch.equal(one.grad, plain[key].grad)
        assert moved >= 10


def test_what_is_regularised_trains_otherwise_and_the_growth_survives_a_checkpoint():
    row = Row("tp_growing_reg", {"interval": 1, "reg": 0.1, "delta_reg": 0.1, "granularity": "channel"})
    strengths, weights = [], []
    for reg in (0.0, 0.1):
        model = fresh()
        pruner = pruner_of(row, model, sparsity=0.5, reg=reg)
        run = next(pruner)
        train_run(run, model)
        weights.append(model.layer1[0].conv1.weight.detach().clone())
        strengths.append(dict(run.scores))
    assert strengths[0] == {}
    assert all(0 < grown.max() <= 0.2 + 1e-6 for grown in strengths[1].values())  # two increases in three steps
    assert weights[1].norm() < weights[0].norm()
    saved = copy.deepcopy(run.progress_state())
    other = pruner_of(row, fresh(), sparsity=0.5)
    again = next(other)
    again.load_progress_(saved)
    again.request.before_step.theirs = None
    theirs = again.request.before_step._made(again)
    for number, strength in enumerate(theirs.group_reg.values()):
        torch.testing.assert_close(strength, 0.1 + strengths[1][f"strength_{number}"])


def test_rounds_train_and_rewind_as_they_are_told():
    model, before = fresh(), fresh().state_dict()
    pruner = searched(Row("tp_magnitude", {"rounds": 2, "rewind": "0ep"}), model, sparsity=0.5)
    masks = pruner.ticket.masks
    assert all(
        torch.equal(value, before[n] * masks[n] if n in masks else before[n]) for n, value in model.state_dict().items()
    )
    tuned = searched(Row("tp_magnitude", {"rounds": 2}), fresh(), sparsity=0.5).ticket
    assert not torch.equal(tuned.values[LAYER], before[LAYER] * tuned.masks[LAYER])
    asked = []
    model = fresh()
    for run in tt.create_pruner("tp_taylor", model, sparsity=0.5, epochs=1, rounds=2, rewind="1it"):
        kept = {name: value.clone() for name, value in model.state_dict().items()}
        train_run(run, model)
        asked.append(run.reads_only)
        if run.reads_only:  # at the trained weights, which it leaves as they are
            assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())
            assert not torch.equal(kept[LAYER], before[LAYER])
    assert asked == [False, True, False, True]


def test_random_channels_come_from_the_seed_alone():
    masks = []
    for seed, drawn in ((0, 0), (0, 5), (1, 0)):
        model = fresh()
        torch.rand(drawn)
        state = torch.get_rng_state()
        masks.append(tt.create_pruner("tp_random", model, sparsity=0.5, seed=seed).ticket.masks)
        assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(masks[0][name], masks[1][name]) for name in masks[0])
    assert any(not torch.equal(masks[0][name], masks[2][name]) for name in masks[0])


class HalfNormalised(nn.Module):
    """Of its two families of channels, the first alone has a batch normalisation."""

    pretrained_cfg = {"architecture": "half_normalised"}  # noqa: RUF012

    def __init__(self, norm):
        super().__init__()
        self.one, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8) if norm else nn.Identity()
        self.two, self.three = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        return self.three(self.two(self.norm(self.one(x)).relu()).relu()).mean((2, 3))


def test_channels_that_a_criterion_does_not_read_stay_and_are_named():
    model = HalfNormalised(True)
    with pytest.warns(UserWarning, match=r"reads no layer of 1 families of channels, which stay: two\.weight -> three"):
        pruner = tt.create_pruner("tp_bn_scale", model, sparsity=0.3, epochs=1, reg=0.0)
    with torch.no_grad():
        model.norm.weight.copy_(torch.tensor([3.0, 1, 4, 2, 8, 6, 7, 5]))
    run = next(pruner)
    run.attach(torch.optim.SGD(model.parameters(), 0.0)).step()
    assert next(pruner, None) is None
    masks = pruner.ticket.masks
    assert masks["one.weight"].flatten(1).any(1).tolist() == [False, False, True, False, True, True, True, True]
    assert masks["three.weight"].all()
    with pytest.raises(
        tt.SettingError, match="tp_bn_scale compares channels by their BatchNorm, and none of this model"
    ):
        tt.create_pruner("tp_bn_scale", HalfNormalised(False), sparsity=0.3)


@pytest.mark.filterwarnings("ignore:.*reads no layer of 1 families")
@pytest.mark.parametrize("reg", [0.0, 1e-3])
def test_a_whole_network_trained_under_a_penalty_does_not_stand_for_the_dense_one(tmp_path, reg):
    model = HalfNormalised(True)
    pruner = tt.create_pruner("tp_bn_scale", model, sparsity=0.3, epochs=1, reg=reg, folder=tmp_path)
    optimizer = next(pruner).attach(torch.optim.SGD(model.parameters(), 0.1))
    model(IMAGES).square().sum().backward()
    optimizer.step()
    assert next(pruner, None) is None
    record = json.loads((tmp_path / "round_00" / "run.json").read_text())
    assert (pruner.trained_dense, record["sparsity"], record["penalised"]) == (not reg, 0, bool(reg))
    assert control_of([record], 1, True)[0] is (None if reg else record)


# A tiny network, by hand: two layers of three channels between them.


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(2, 3, bias=False), nn.Linear(3, 2, bias=False)

    def forward(self, x):
        return self.two(self.one(x).relu())


def hidden(model):
    """The group of the three channels, with all its indices."""
    graph = tp.DependencyGraph().build_dependency(model, torch.randn(1, 2))
    return graph, graph.get_pruning_group(model.one, tp.prune_linear_out_channels, [0, 1, 2])


ROWS = torch.tensor([[1, 1], [1, 0], [0, 0]])
COLUMNS = torch.tensor([[1, 0, 0], [1, 1, 0]])


def test_an_importance_by_hand():
    """Of the first channel all four weights are kept, of the second two, of the third none."""
    model = Tiny()
    graph, group = hidden(model)
    masks = {"one.weight": ROWS.bool(), "two.weight": COLUMNS.bool()}
    assert tt.TicketImportance(masks)(group).tolist() == [1.0, 0.5, 0.0]
    assert tt.TicketImportance(tt.Ticket.of(model, masks))(group).tolist() == [1.0, 0.5, 0.0]
    assert tt.TicketImportance({"one.weight": masks["one.weight"]})(group).tolist() == [1.0, 0.75, 0.5]  # the rest kept
    scores = {"one.weight": torch.tensor([[1.0, 3], [-1, -1], [0, 4]])}
    assert tt.TicketImportance(scores)(group).tolist() == [2.0, -1.0, 2.0]  # what has no score does not count
    assert tt.TicketImportance(scores, normalize=True)(group).tolist() == [2.0, -1.0, 2.0]
    part = graph.get_pruning_group(model.one, tp.prune_linear_out_channels, [2, 0])
    assert tt.TicketImportance(masks)(part).tolist() == [0.0, 1.0]
    assert tt.TicketImportance({"two.weight": torch.ones(2, 3)})(group).tolist() == [1.0, 1.0, 1.0]


def test_an_importance_follows_a_model_that_shrinks():
    model = Tiny()
    graph, group = hidden(model)
    importance = tt.TicketImportance({"one.weight": ROWS.bool(), "two.weight": COLUMNS.bool()})
    assert importance(group).tolist() == [1.0, 0.5, 0.0]
    graph.get_pruning_group(model.one, tp.prune_linear_out_channels, [1]).prune()
    left = graph.get_pruning_group(model.one, tp.prune_linear_out_channels, [0, 1])
    assert importance(left).tolist() == [1.0, 0.0]
    model.one.weight = nn.Parameter(torch.ones(1, 2))  # by somebody else
    with pytest.raises(tt.SettingError, match="was cut past the pruner's graph"):
        importance(left)


def test_a_pruner_of_ours_as_importance():
    model = Tiny()
    _, group = hidden(model)
    magnitude = (model.one.weight.abs().sum(1) + model.two.weight.abs().sum(0)) / 4
    pruner = tt.create_pruner("magnitude", copy.deepcopy(model), sparsity=0.5, classifier=True)
    for given in ("magnitude", tt.get_method("magnitude")(sparsity=0.9), pruner):
        importance = tt.TicketImportance(given)
        torch.testing.assert_close(importance(group), magnitude.detach())
        with torch.no_grad():
            model.one.weight.mul_(2)  # trained on: computed anew
        assert importance(group).sum() > magnitude.sum()
        with torch.no_grad():
            model.one.weight.div_(2)
    ended = tt.create_pruner("imp", fresh(), sparsity=0.5, epochs=1, prune_rate=0.5)
    for run in ended:
        train_run(run, ended.subnet.model)
    resnet = fresh()
    graph = tp.DependencyGraph().build_dependency(resnet, IMAGES)
    group = next(iter(graph.get_all_groups(ignored_layers=[resnet.fc])))
    torch.testing.assert_close(tt.TicketImportance(ended)(group), tt.TicketImportance(ended.ticket)(group))
    assert 0.2 < tt.TicketImportance(ended)(group).mean() < 0.8


@pytest.fixture(scope="module")
def script():
    return runpy.run_path(str(SCRIPT))


@pytest.mark.parametrize(
    "arch",
    [
        *("convnext_atto", "vit_tiny_patch16_224"),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("resnet18", "swin_tiny_patch4_window7_224")),
    ],
)
def test_a_script_of_its_users_with_our_importance_and_pruner(arch, script, tmp_path, monkeypatch, capsys):
    assert not re.search(r"tp\.[\w.]*\b_", SCRIPT.read_text())  # nothing private
    monkeypatch.setattr(ticket_pruner, "find_groups", units.find_groups)
    ticket = tt.create_pruner("tp_random", script["build"](arch), sparsity=0.5, sparsity_of="channels").ticket
    ticket.save(tmp_path / "half.ticket")
    monkeypatch.setattr(sys, "argv", ["prune.py", arch, str(tmp_path / "half.ticket")])
    if arch.startswith("swin"):
        with pytest.warns(UserWarning, match="kept: 1 of layers.0.blocks.0.attn.qkv.weight"):
            ran = runpy.run_path(str(SCRIPT), run_name="__main__")
    else:
        ran = runpy.run_path(str(SCRIPT), run_name="__main__")
    _, *others = ran["found"].values()
    count = {name: sum(one.numel() for one in model.parameters()) for name, model in ran["found"].items()}
    assert all(one(ran["images"]).shape == (1, 10) for one in others)
    assert all(0.1 < size / count["whole"] < 0.8 for name, size in count.items() if name != "whole")
    # At half the channels of every layer, each layer is as wide as by its own importance.
    assert count["magnitude"] == count["ticket"] == count["synflow"]
    assert ran["difference"] <= 1e-6
    kept = {"swin_tiny_patch4_window7_224": 3}  # its graph takes a table's heads for channels
    assert sum(number for _, number, _ in ran["pruner"].kept) == kept.get(arch, 0)
    assert ran["pruner"].removed == int(ticket.metadata["notes"][-1]["groups_removed"]) - kept.get(arch, 0)
    assert "outputs of the last" in capsys.readouterr().out


def test_a_ticket_pruner_removes_what_its_ticket_says_and_the_rest_trains_on():
    model = fresh().eval()
    ticket = tt.create_pruner("tp_magnitude", model, sparsity=0.5).ticket
    with torch.no_grad():
        before = copy.deepcopy(model).double()(IMAGES.double())
        pruner = tt.TicketPruner(model, IMAGES, ticket)
        pruner.step()
        assert (model.double()(IMAGES.double()) - before).abs().max() <= 1e-9 * before.abs().max()
    left = sum(model.get_parameter(name).numel() for name in ticket.masks)
    assert left == sum(int(mask.sum()) for mask in ticket.masks.values())
    assert pruner.kept == []
    assert pruner.removed == ticket.metadata["notes"][-1]["groups_removed"]
    assert len(pruner.pruning_history()) == 10
    pruner.step()  # nothing is left to remove
    assert left == sum(model.get_parameter(name).numel() for name in ticket.masks)
    optimizer = torch.optim.SGD(model.float().train().parameters(), 0.1)
    for images, labels in loader():
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()


def test_a_group_that_its_user_leaves_stays():
    model = fresh()
    ticket = tt.create_pruner("tp_magnitude", model, sparsity=0.5).ticket
    pruner = tt.TicketPruner(model, IMAGES, ticket)
    for number, group in enumerate(pruner.step(interactive=True)):
        assert isinstance(group, tp.Group)
        if number % 2:
            group.prune()
    assert 0 < pruner.removed < ticket.metadata["notes"][-1]["groups_removed"]
    pruner.step()
    assert pruner.removed == ticket.metadata["notes"][-1]["groups_removed"]


def test_a_channel_that_something_alive_reads_is_kept_and_named():
    model = fresh()
    ticket = tt.create_pruner("tp_magnitude", model, sparsity=0.5).ticket
    masks = {name: mask.clone() for name, mask in ticket.masks.items()}
    channel = int((~masks["layer1.0.conv2.weight"]).all(0).flatten(1).all(1).nonzero()[0])
    masks["layer1.0.conv2.weight"][3, channel] = True  # one consumer of a channel that is pruned otherwise
    alive = tt.Ticket.of(fresh(), masks)
    model = alive.apply_(fresh()).eval()
    before = model(IMAGES)
    pruner = tt.TicketPruner(model, IMAGES, alive)
    with pytest.warns(UserWarning, match=r"1 of layer1\.0\.conv1\.weight \(something alive still reads them\)"):
        pruner.step()
    assert pruner.kept == [("layer1.0.conv1.weight", 1, "something alive still reads them")]
    assert pruner.removed == ticket.metadata["notes"][-1]["groups_removed"] - 1
    torch.testing.assert_close(model(IMAGES), before)


def test_what_its_user_ignores_is_kept_and_named():
    model = fresh()
    ticket = tt.create_pruner("tp_magnitude", model, sparsity=0.5).ticket
    pruner = tt.TicketPruner(model, IMAGES, ticket, ignored_layers=[model.layer1[0].conv1])
    with pytest.warns(UserWarning, match=r"layer1\.0\.conv1 is in ignored_layers"):
        pruner.step()
    assert model.layer1[0].conv1.out_channels == fresh().layer1[0].conv1.out_channels
    assert [why for _, _, why in pruner.kept] == ["layer1.0.conv1 is in ignored_layers"]


# Bad input.


def test_without_the_library_one_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    install = r"needs torch-pruning, which is not installed: pip install 'timm-tickets\[torch-pruning\]'"
    for what, make in {
        "pruner.name: tp_magnitude": partial(tt.create_pruner, "tp_magnitude", fresh(), sparsity=0.5),
        "TicketImportance": partial(tt.TicketImportance, {}),
        "TicketPruner": partial(tt.TicketPruner, fresh(), IMAGES, "none.ticket"),
    }.items():
        with pytest.raises(tt.SettingError, match=f"^{what} {install}$"):
            make()
    assert "tp_magnitude" in tt.list_pruners()
    monkeypatch.undo()
    monkeypatch.setattr(optional, "version", {"torch-pruning": "1.5.2"}.get)
    with pytest.raises(
        tt.SettingError, match=r"needs torch-pruning 1\.6 or later, and 1\.5\.2 is installed: pip install"
    ):
        optional.torch_pruning("it")


def test_what_does_not_fit_is_refused():
    model = fresh()
    ticket = tt.create_pruner("tp_random", model, sparsity=0.5).ticket
    other = timm.create_model("test_efficientnet", num_classes=4)
    graph = tp.DependencyGraph().build_dependency(other, IMAGES)
    group = next(iter(graph.get_all_groups()))
    with pytest.raises(tt.TicketError, match="this ticket is for 'test_resnet', the model is 'test_efficientnet'"):
        tt.TicketImportance(ticket)(group)
    with pytest.raises(tt.TicketError, match="this ticket is for 'test_resnet', the model is 'test_efficientnet'"):
        tt.TicketPruner(other, IMAGES, ticket)
    with pytest.raises(tt.TicketError, match="weights that the ticket has pruned are not zero in this model"):
        tt.TicketPruner(fresh(), IMAGES, ticket)
    with pytest.raises(tt.SettingError, match="pruning_ratio: is no setting of TicketPruner"):
        tt.TicketPruner(model, IMAGES, ticket, pruning_ratio=0.5)
    with pytest.raises(tt.SettingError, match="none of its 1 names is a weight"):
        tt.TicketImportance({"stem": torch.ones(1)})(group)
    with pytest.raises(tt.TicketError, match=r"conv_stem\.weight: \[1\] is given, and the model's is"):
        tt.TicketImportance({"conv_stem.weight": torch.ones(1)})(group)
    with pytest.raises(tt.SettingError, match="a int is neither a ticket nor scores"):
        tt.TicketImportance(3)
    for name, told in {
        "snip": "trains, or reads gradients of your images, first",
        "tp_lamp": "has no scores of single",
    }.items():
        with pytest.raises(tt.SettingError, match=f"ticket_or_scores: {name} {told}"):
            tt.TicketImportance(name)(group)
    with pytest.raises(tt.SettingError, match="rewind: with rounds=0 nothing is trained"):
        tt.create_pruner("tp_magnitude", fresh(), sparsity=0.5, rewind="0ep")


def test_a_model_that_its_graph_cannot_follow_is_told():
    model = fresh()
    ticket = tt.create_pruner("tp_random", model, sparsity=0.5).ticket
    model.train().layer1.eval()
    modes = [module.training for module in model.modules()]
    with pytest.raises(tt.SettingError, match="torch-pruning cannot follow this ResNet: "):
        tt.TicketPruner(model, torch.randn(1, 5, 32, 32), ticket)
    assert not any(module._forward_hooks for module in model.modules())
    assert [module.training for module in model.modules()] == modes
    tt.TicketPruner(model, IMAGES, ticket)
    assert [module.training for module in model.modules()] == modes


PAGE = (Path(__file__).parents[1] / "docs" / "torch_pruning.md").read_text()
SMALLER = {"resnet18": "test_resnet", "64, 64": "32, 32", "sparsity=0.7": "sparsity=0.5"}


def test_the_code_on_the_page(tmp_path, monkeypatch):
    """As written, but for a smaller model."""
    monkeypatch.chdir(tmp_path)
    names = {}
    for code in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        for text, shorter in SMALLER.items():
            code = code.replace(text, shorter)
        exec(code, names)
    assert names["model"].layer1[0].conv1.out_channels == fresh().layer1[0].conv1.out_channels // 2


@pytest.mark.slow
def test_the_commands_on_the_page(tmp_path, monkeypatch):
    """As written, but for shorter trainings."""
    monkeypatch.chdir(tmp_path)
    (recipe,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    Path("lottery.yaml").write_text(recipe)
    less = [
        "training.epochs=1",
        "controls=[]",
        "training.batch_size=128",
        "pruner.rounds=1",
        "data.val_fraction=0.8",
        "retrain.epochs=1",
    ]
    said = {}
    for line in re.findall(r"(?m)^timm-tickets (.*)$", PAGE):
        words = shlex.split(line)
        if words[0] == "search":
            words += [word for setting in less for word in ("--set", setting)]
        done = call(*words)
        assert done.exit_code == 0, done.output
        said[line] = done.output
    assert len(said) == 4
    assert "MagnitudeImportance" in said["list tp_magnitude"]
    tickets = {path.parent.name: tt.load_ticket(path) for path in Path("output").glob("*/*.ticket")}
    assert {ticket.metadata["pruner"]["name"] for ticket in tickets.values()} == {"tp_magnitude", "tp_taylor"}
    assert tickets["fine_tuned"].metadata["pruner"]["rewind"] is None
