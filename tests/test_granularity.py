"""What every pruner promises when it cuts channels or patterns: whole units, counted, zero, replayed, in a file."""

from dataclasses import replace

import pytest
import timm
import torch
from support.every_method import (
    METHODS,
    OPTIMIZERS,
    found,
    fresh,
    ids,
    loader,
    marked,
    of_channels,
    pruner_of,
    searched,
    train_run,
)

import timm_tickets as tt
from timm_tickets.core.patterns import best_of
from timm_tickets.structure import units

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*without passing its rewind point",
    "ignore:.*no gradient reaches",
    "ignore:.*have a score above zero",
    "ignore:.*layers are pruned to nothing",
    "ignore:.*has not moved its mask",
)
SINGLE = ("set", "rigl", "jackpot", "frozen_slt")
CUTTING = [row for row in METHODS if row.name not in SINGLE and row.settings.get("distribution") is None]
UNITS = {"channel": {"sparsity": 0.6}, "2:4": {"sparsity": 0.5}, "block 4x4": {"sparsity": 0.6}}
FEW = [row for row in CUTTING if row.name in ("imp", "colt", "gradual", "edge_popup", "continuous_sparsification")][::2]
every_unit = pytest.mark.parametrize("granularity", UNITS)
every_cutting = pytest.mark.parametrize(
    ("row", "granularity"),
    [marked(row, one) for row in CUTTING for one in UNITS if one == "channel" or not of_channels(row)],
    ids=lambda one: one if isinstance(one, str) else ids(one),
)


@pytest.fixture(autouse=True)
def _found_once(monkeypatch):
    """The groups of one architecture are always the same; tests/test_structure.py is about finding them."""
    monkeypatch.setattr(units, "find_groups", found)


def check_whole(pruner, masks):
    """The masks prune whole units and nothing else."""
    of = pruner.method.units
    kind = pruner.method.granularity
    if kind == "channel":
        assert all(torch.equal(mask, masks[n]) for n, mask in of.groups.mask(of.gone(masks)).items())
        alive = torch.zeros(len(of.groups.families), dtype=torch.int64).index_add_(
            0, of.groups.family, (~of.gone(masks)).long()
        )
        assert (alive >= 1).all()
    for name, mask in masks.items():
        rows = mask.flatten(1)
        if kind != "channel" and name not in of.names:
            assert mask.all()
        elif kind == "2:4":
            assert (rows.reshape(-1, 4).sum(1) == 2).all()
        elif kind == "block 4x4":
            parts = rows.reshape(len(rows) // 4, 4, -1, 4)
            assert torch.equal(parts.any(1).any(2), parts.all(1).all(2))


@every_cutting
def test_whole_units_go_and_no_fewer_than_asked(row, granularity, tmp_path):
    asked = UNITS[granularity]
    pruner = searched(row, model := fresh(), granularity=granularity, folder=tmp_path / "run", **asked)
    ticket, method = pruner.ticket, pruner.method
    check_whole(pruner, ticket.masks)
    note = ticket.metadata["notes"][-1]
    assert note["granularity"] == granularity
    assert note["asked"] == asked["sparsity"]
    assert asked["sparsity"] - 0.5 / method.total(ticket.masks) <= note["reached"] < asked["sparsity"] + 0.02
    assert note["reached"] == 1 - method.kept(ticket.masks) / method.total(ticket.masks)
    assert all(not model.get_parameter(name)[~mask].any() for name, mask in ticket.masks.items())
    ticket.save(tmp_path / "one.ticket")
    loaded = tt.load_ticket(tmp_path / "one.ticket")
    assert loaded.fingerprint == ticket.fingerprint
    assert loaded.metadata == ticket.metadata
    again = searched(row, fresh(7), granularity=granularity, folder=tmp_path / "run", **asked)
    assert len(again.replayed) == pruner.runs_done
    assert again.ticket.fingerprint == ticket.fingerprint


@pytest.mark.parametrize("row", FEW, ids=ids)
@every_unit
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_what_is_pruned_is_zero_after_every_step(row, granularity, optimizer):
    model = fresh()
    pruner = pruner_of(row, model, granularity=granularity, **UNITS[granularity])
    for run in pruner:
        train_run(run, model, optimizer)
    ticket = pruner.ticket
    attached = ticket.attach(model, OPTIMIZERS[optimizer](model.parameters()))
    for images, labels in loader():
        torch.nn.functional.cross_entropy(model(images), labels).backward()
        attached.step()
        attached.zero_grad()
        assert all(not model.get_parameter(name)[~mask].any() for name, mask in ticket.masks.items())


@pytest.mark.parametrize("row", [row for row in METHODS if row.name in SINGLE], ids=ids)
@every_unit
def test_a_method_of_single_weights_says_so(row, granularity):
    with pytest.raises(tt.SettingError, match=f"granularity: '{granularity}' cannot be had with {row.name}, which"):
        pruner_of(row, fresh(), granularity=granularity, **UNITS[granularity])


def test_colts_copies_have_whole_channels_in_common_and_two_of_four():
    """In every round, not only at the end: the overlap of masks that each are whole."""
    for granularity, settings in (("channel", {"sparsity": 0.6}), ("2:4", {"sparsity": 0.5})):
        model = fresh()
        pruner = tt.create_pruner("colt", model, granularity=granularity, prune_rate=0.2, epochs=1, **settings)
        for run in pruner:
            masks = pruner.subnet.mask
            if granularity == "channel":
                check_whole(pruner, masks)
            else:
                assert all((masks[name].reshape(-1, 4).sum(1) >= 2).all() for name in pruner.method.units.names)
            train_run(run, model)
        check_whole(pruner, pruner.ticket.masks)
        assert pruner.rounds_done > 1


def test_layer_by_layer_every_family_loses_its_share_of_channels():
    pruner = tt.create_pruner("magnitude", fresh(), granularity="channel", sparsity=0.75)
    assert pruner.method.scope == "layerwise"
    groups, gone = pruner.method.units.groups, pruner.method.units.gone(pruner.ticket.masks)
    lost = [(int(gone[groups.family == number].sum()), one.count) for number, one in enumerate(groups.families)]
    assert max((count - 1) / size for count, size in lost) <= min((count + 1) / size for count, size in lost)
    across = tt.create_pruner("magnitude", fresh(), granularity="channel", sparsity=0.75, scope="global")
    assert across.method.scope == "global"
    with pytest.warns(UserWarning, match=r"scope=global has left the fewest channels .* in .* 1 of \d+.*layerwise"):
        assert across.ticket.fingerprint != pruner.ticket.fingerprint


def test_many_small_cuts_take_the_same_share_of_every_layer():
    pruner = tt.create_pruner("magnitude", model := fresh(), granularity="channel", sparsity=0.1)
    of, masks = pruner.method.units, dict(pruner.ticket.masks)
    scores = {name: model.get_parameter(name).detach().abs() for name in masks}
    for _ in range(40):
        masks = of.cut(masks, scores, round(0.97 * of.kept(masks)), "layerwise", "uniform", ())
    shares = torch.zeros(len(of.groups.families)).index_add_(0, of.groups.family, of.gone(masks).float())
    counts = torch.tensor([family.count for family in of.groups.families])
    assert ((shares / counts).max() - (shares / counts).min()) <= 1 / counts.min()
    assert shares.min() > 0


def test_the_channels_of_the_smallest_mean_go():
    model = fresh()
    with torch.no_grad():
        model.layer1[0].conv1.weight[5] *= 1e-3
        model.layer1[0].conv2.weight[:, 5] *= 1e-3
    masks = tt.create_pruner("magnitude", model, granularity="channel", sparsity=0.1).ticket.masks
    assert not masks["layer1.0.conv1.weight"][5].any()
    assert not masks["layer1.0.conv2.weight"][:, 5].any()


@pytest.mark.parametrize("of", ["weights", "channels", "macs"])
def test_a_sparsity_of_weights_channels_or_multiplications(of):
    pruner = tt.create_pruner("imp", fresh(), granularity="channel", sparsity=0.7, sparsity_of=of, epochs=1)
    model = pruner.subnet.model
    for run in pruner:
        train_run(run, model)
    groups, masks = pruner.method.units.groups, pruner.ticket.masks
    kept, total = {
        "weights": lambda: (sum(int(m.sum()) for m in masks.values()), sum(m.numel() for m in masks.values())),
        "channels": lambda: (len(groups) - int(pruner.method.units.gone(masks).sum()), len(groups)),
        "macs": lambda: tuple(
            sum(int(count) * groups.positions[n] for n, count in counts)
            for counts in ([(n, m.sum()) for n, m in masks.items()], [(n, m.numel()) for n, m in masks.items()])
        ),
    }[of]()
    assert 0.7 - 0.5 / total <= 1 - kept / total < 0.72
    assert pruner.ticket.metadata["notes"][-1]["reached"] == pytest.approx(1 - kept / total)


def test_multiplications_are_those_of_a_count_by_hand():
    model = fresh()
    counted = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(
                lambda m, _, out, name=name: counted.update({f"{name}.weight": out[0, 0].numel()})
            )
    model(torch.randn(1, 3, 64, 64))
    groups = found(model, ("*",), (), False)
    assert groups.positions == {name: counted[name] for name in groups.shapes}


def test_multiples_and_floors():
    pruner = tt.create_pruner("magnitude", fresh(), granularity="channel", sparsity=0.7, round_to=8, min_channels=16)
    groups, gone = pruner.method.units.groups, pruner.method.units.gone(pruner.ticket.masks)
    left = [int((~gone[groups.family == number]).sum()) for number in range(len(groups.families))]
    assert all(count % 8 == 0 and count >= 16 for count in left)
    assert pruner.ticket.sparsity >= 0.7
    units = replace(pruner.method.units, least=12)  # so 16
    whole = {name: torch.ones(shape, dtype=torch.bool) for name, shape in groups.shapes.items()}
    least = units.cut_by(whole, lambda: torch.arange(float(len(groups))), 0, "global")
    assert "layer4.0.conv1.weight 16 of 96" in units.starved(least)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"granularity": "2:4", "sparsity": 0.6}, r"sparsity: 0.6 contradicts granularity=2:4, .* set sparsity=0.5"),
        ({"granularity": "channel", "sparsity": 0.999}, r"sparsity: 0.999 cannot be met: .* ask for at most 0\.99"),
        ({"granularity": "channel", "min_channels": 64}, r"keeps 64 channels .* ask for at most"),
        ({"granularity": "channel", "min_channels": 40, "round_to": 16}, r"keeps 48 channels .* ask for at most"),
        ({"granularity": "head"}, "ResNet has no heads that can be removed; `timm-tickets inspect"),
        ({"granularity": "block 512x512"}, "of the 15 prunable layers none has a matrix .* 512 rows and 512 columns"),
        ({"granularity": "rows"}, "'rows' is not valid; it is weight, channel, head"),
        ({"round_to": 8}, "round_to: is of channels; set granularity=channel"),
        ({"granularity": "2:4", "sparsity_of": "macs", "sparsity": 0.5}, "sparsity_of: is of channels"),
        ({"granularity": "channel", "distribution": "erk"}, "distribution: 'erk' counts the weights"),
    ],
)
def test_what_cannot_be_had_is_refused_before_anything_is_trained(settings, told):
    with pytest.raises(tt.SettingError, match=told):
        tt.create_pruner("magnitude", fresh(), **({"sparsity": 0.9} | settings))
    with pytest.raises(tt.SettingError, match="meet=penalty"):
        tt.create_pruner("continuous_sparsification", fresh(), sparsity=0.5, granularity="channel", meet="penalty")


def test_heads_of_a_vit_go_two_of_four():
    model = timm.create_model("vit_tiny_patch16_224", depth=2, num_heads=4, img_size=32, num_classes=4)
    settings = {"granularity": "head", "sparsity": 0.5, "sparsity_of": "channels"}
    masks = tt.create_pruner("random", model, **settings).ticket.masks
    for block in range(2):
        proj = masks[f"blocks.{block}.attn.proj.weight"][0].view(4, 48)
        assert proj.all(1).sum() == 2
        assert torch.equal(proj.all(1), proj.any(1))
        qkv = masks[f"blocks.{block}.attn.qkv.weight"][:, 0].view(3, 4, 48)
        assert torch.equal(qkv.all(2), proj.all(1).expand(3, 4))
        assert masks[f"blocks.{block}.mlp.fc1.weight"].all()


def test_of_single_weights_nothing_has_changed():
    """A folder or a recipe of before there were channels goes on: what names a search says nothing of them."""
    settings = tt.create_pruner("imp", fresh(), sparsity=0.5).method.described()
    assert not {"granularity", "sparsity_of", "round_to", "min_channels"} & set(settings)
    assert settings["scope"] == "global"
    assert tt.create_pruner("imp", fresh(), sparsity=0.5, granularity="channel").method.described()["round_to"] == 1


def test_two_of_four_are_the_best_two_of_four():
    model = fresh()
    weights = {name: model.get_parameter(name).detach().abs() for name in tt.prunable_names(model)}
    pruner = tt.create_pruner("magnitude", model, sparsity=0.5, granularity="2:4")
    for name in pruner.method.units.names:
        expected = best_of(torch.ones_like(weights[name], dtype=torch.bool), weights[name], 2, 4)
        assert torch.equal(pruner.ticket.masks[name], expected)


def test_two_of_four_needs_no_quotes_in_a_recipe():
    """YAML 1.1 reads 2:4 as 2 minutes and 4 seconds, 124."""
    settings = ["pruner.granularity=2:4", "pruner.sparsity=0.5"]
    assert tt.load_recipe("digits_imp", settings).pruner["granularity"] == "2:4"
    assert tt.load_recipe("digits_imp_2_4").hash == tt.load_recipe("digits_imp_2_4", settings).hash
