"""A layer pruned to nothing: reported, prevented or refused."""

import warnings

import pytest
import torch
from support.every_method import METHODS, fresh, ids, of_channels, searched, train_run
from torch import nn

import timm_tickets as tt
from timm_tickets.core import masks as m

pytestmark = pytest.mark.filterwarnings(
    "ignore:jackpot",
    "ignore:.*without passing its rewind point",
    "ignore:.*no gradient reaches",
    "ignore:.*has not moved its mask",
    "ignore:.*have a score above zero",
)
NOTHING = "pruned to nothing"


def small_layer():
    """Three layers; the middle one's weights are smaller than all others."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    with torch.no_grad():
        for layer, scale in zip(model, (1, 1e-3, 1), strict=True):
            layer.weight.copy_(torch.arange(1, 65).view(8, 8) * scale)
    return model


def test_it_is_reported_with_the_layers_name_and_the_search_goes_on():
    model = small_layer()
    with pytest.warns(UserWarning, match=rf"1 of 3 layers are {NOTHING}: 1\.weight;.*collapse=prevent"):
        ticket = tt.create_pruner("magnitude", model, sparsity=0.5).ticket
    assert not ticket.masks["1.weight"].any()
    assert m.kept(ticket.masks) == 96


def test_it_is_refused():
    pruner = tt.create_pruner("magnitude", small_layer(), sparsity=0.5, collapse="error")
    with pytest.raises(tt.SettingError, match=r"collapse: 1 of 3 layers .*1\.weight; lower the sparsity"):
        _ = pruner.ticket


def test_it_is_prevented_and_the_total_stays_exact():
    ticket = tt.create_pruner("magnitude", small_layer(), sparsity=0.5, collapse="prevent").ticket
    mask = ticket.masks["1.weight"]
    assert int(mask.sum()) == 1
    assert mask[7, 7]  # its best
    assert m.kept(ticket.masks) == 96


def test_prevention_changes_nothing_where_no_layer_is_emptied():
    plain, prevented = (
        tt.create_pruner("magnitude", fresh(), sparsity=0.6, collapse=how).ticket.masks for how in ("warn", "prevent")
    )
    assert all(torch.equal(plain[name], prevented[name]) for name in plain)


def test_fewer_weights_than_layers_are_refused():
    with pytest.raises(tt.SettingError, match=r"sparsity: 2 weights are to be kept, fewer than the 3 layers"):
        _ = tt.create_pruner("magnitude", small_layer(), sparsity=1 - 2 / 192, collapse="prevent").ticket


@pytest.mark.parametrize("distribution", ["uniform", "erk", "epl"])
def test_layerwise_rounding_to_nothing_is_prevented(distribution):
    scores = {"tiny": torch.tensor([1.0]), "big": torch.arange(100.0), "small": torch.arange(3.0)}
    full = m.full_masks(scores)
    for keep in range(3, 104):
        out = m.cut(full, scores, keep, "layerwise", distribution, spare=full)
        assert m.kept(out) == keep
        assert not m.collapsed(out)


def test_what_is_not_spared_gives_first():
    scores = {"a": torch.ones(1), "b": torch.ones(1), "c": torch.arange(40.0)}
    out = m.cut(m.full_masks(scores), scores, 2, "layerwise", "epl", spare=["a", "c"])
    assert {name: int(mask.sum()) for name, mask in out.items()} == {"a": 1, "b": 0, "c": 1}


def test_a_budget_that_a_layer_cannot_meet_names_the_layer():
    scores = {"a": torch.arange(4.0), "b": torch.arange(4.0)}
    masks = {"a": torch.tensor([True, True, False, False]), "b": torch.ones(4, dtype=torch.bool)}
    assert m.keep_best(masks, scores, {"a": 1, "b": 2})["a"].tolist() == [False, True, False, False]
    with pytest.raises(tt.SettingError, match="budget of a: 3 weights cannot be kept where 2 of 4 are left"):
        m.keep_best(masks, scores, {"a": 3, "b": 2})


@pytest.mark.parametrize("row", [row for row in METHODS if not of_channels(row)], ids=ids)
def test_every_method_prevents_it(row):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=f".*{NOTHING}")
        ticket = searched(row, fresh(), sparsity=0.9995, collapse="prevent").ticket
    assert not m.collapsed(ticket.masks)
    assert m.kept(ticket.masks) == m.keep_count(m.total(ticket.masks), 0.9995)


def test_a_learned_mask_is_reported_once_a_search():
    model = fresh()
    pruner = tt.create_pruner("edge_popup", model, sparsity=0.9999, scope="global", epochs=3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for run in pruner:
            train_run(run, model)
        _ = pruner.ticket
    assert [NOTHING in str(one.message) for one in caught].count(True) == 1


def test_freezing_that_leaves_a_layer_nothing_is_refused():
    with pytest.raises(tt.SettingError, match=r"pruner\.frozen: .* can where every layer keeps one; lower frozen"):
        next(tt.create_pruner("frozen_slt", fresh(), sparsity=0.99998, frozen=0.999999, collapse="prevent"))


def test_a_soft_mask_that_falls_wholly_below_zero_keeps_the_best():
    model = fresh()
    settings = {"meet": "penalty", "rounds": 1, "rewind": "0ep", "s0": -0.1, "epochs": 1}
    pruner = tt.create_pruner("continuous_sparsification", model, sparsity=0.5, collapse="prevent", **settings)
    for run in pruner:
        train_run(run, model)
    assert {int(mask.sum()) for mask in pruner.ticket.masks.values()} >= {1}
    assert not m.collapsed(pruner.ticket.masks)
