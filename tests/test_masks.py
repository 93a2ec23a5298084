import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st

from timm_tickets.core import masks as m
from timm_tickets.core.topk import top
from timm_tickets.sparse import prunable


def test_top_keeps_the_highest_and_among_ties_the_first():
    scores = torch.tensor([[0.5, 2.0, 0.5], [0.5, 1.0, 0.5]])
    assert top(scores, 4).tolist() == [[True, True, True], [False, True, False]]
    assert top(scores, 0).sum() == 0
    assert top(scores, 6).all()


def test_top_refuses_nan_instead_of_keeping_it():
    with pytest.raises(ValueError, match="NaN"):
        top(torch.tensor([1.0, float("nan")]), 1)


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=40), st.data())
def test_top_is_exact_and_separates(values, data):
    scores = torch.tensor(values, dtype=torch.float32)
    count = data.draw(st.integers(0, len(values)))
    mask = top(scores, count)
    assert int(mask.sum()) == count
    if 0 < count < len(values):
        assert scores[mask].min() >= scores[~mask].max()


@given(st.dictionaries(st.text(max_size=3), st.integers(0, 50), min_size=1), st.data())
def test_fill_is_exact_within_caps_and_proportional(caps, data):
    shares = {name: data.draw(st.integers(1, 30)) for name in caps}
    count = data.draw(st.integers(0, sum(caps.values())))
    parts = m.fill(count, shares, caps)
    assert sum(parts.values()) == count
    assert all(0 <= parts[name] <= cap for name, cap in caps.items())
    open_parts = [name for name in caps if parts[name] < caps[name]]
    for a in open_parts:  # among those not full, the ratio is that of the shares, up to one unit
        for b in open_parts:
            assert abs(parts[a] * shares[b] - parts[b] * shares[a]) <= shares[a] + shares[b]


def test_budgets_by_hand():
    shapes = {"a": (4, 2, 1, 1), "b": (10, 10)}
    assert m.budgets(shapes, 54, "uniform") == {"a": 4, "b": 50}
    # erk: shares 4 + 2 + 1 + 1 = 8 and 10 + 10 = 20; of 14 that is 4 and 10. Of 42 it would be 12 of a's 8: full.
    assert m.budgets(shapes, 14, "erk") == {"a": 4, "b": 10}
    assert m.budgets(shapes, 42, "erk") == {"a": 8, "b": 34}
    assert m.budgets(shapes, 14, "epl") == {"a": 7, "b": 7}
    assert m.budgets(shapes, 20, "epl") == {"a": 8, "b": 12}


def test_epl_fills_conv6_as_the_frozen_slt_paper_says():
    """Otsuka et al. 2024: at half the weights frozen, free densities 1 1 1 1 .907 .454 .255 1 1."""
    sizes = [(64, 3, 3, 3), (64, 64, 3, 3), (128, 64, 3, 3), (128, 128, 3, 3), (256, 128, 3, 3), (256, 256, 3, 3)]
    sizes += [(256, 4096), (256, 256), (10, 256)]
    shapes = {str(i): shape for i, shape in enumerate(sizes)}
    numel = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
    assert sum(numel.values()) == 2_261_184
    free = m.budgets(shapes, sum(numel.values()) // 2, "epl")
    assert sum(free.values()) == 1_130_592
    densities = [round(free[name] / numel[name], 3) for name in shapes]
    assert densities == [1, 1, 1, 1, 0.907, 0.454, 0.255, 1, 1]


def test_cut_global_compares_layers_and_never_revives():
    scores = {"a": torch.tensor([5.0, 1.0, 4.0]), "b": torch.tensor([3.0, 2.0, 9.0])}
    start = {"a": torch.tensor([True, True, True]), "b": torch.tensor([True, True, False])}
    out = m.cut(start, scores, 3)
    assert out["a"].tolist() == [True, False, True]
    assert out["b"].tolist() == [True, False, False]  # 9.0 was pruned before and stays so


def test_cut_layerwise_takes_the_same_fraction_of_each_layer():
    scores = {"a": torch.tensor([9.0, 8.0, 7.0, 6.0]), "b": torch.tensor([1.0, 2.0])}
    out = m.cut(m.full_masks(scores), scores, 3, "layerwise")
    assert out["a"].tolist() == [True, True, False, False]
    assert out["b"].tolist() == [False, True]


def test_cut_reaches_all_but_one_of_half_precision_scores():
    scores = {"a": torch.arange(1, 9, dtype=torch.bfloat16)}
    assert m.cut(m.full_masks(scores), scores, 1)["a"].tolist() == [False] * 7 + [True]


@pytest.mark.parametrize("sparsity", [1, 1.5, -0.1, 0.999])
def test_keep_count_refuses_what_leaves_nothing(sparsity):
    with pytest.raises(ValueError, match="sparsity"):
        m.keep_count(100, sparsity)


def test_shuffled_masks_keep_layer_counts_and_depend_on_the_seed():
    masks = {"a": torch.arange(100) < 30, "b": torch.arange(50).view(5, 10) < 5}
    one, same, other = (m.shuffled_masks(masks, seed) for seed in (1, 1, 2))
    assert {n: int(v.sum()) for n, v in one.items()} == {"a": 30, "b": 5}
    assert all(torch.equal(one[n], same[n]) for n in masks)
    assert not torch.equal(one["a"], other["a"])
    assert one["b"].shape == (5, 10)


def test_prunable_are_convolutions_and_linears_but_not_the_classifier(model):
    names = prunable.prunable_names(model)
    assert "conv1.weight" in names or any(name.endswith("conv1.weight") for name in names)
    assert not any(name.startswith("fc.") for name in names)
    parameters = dict(model.named_parameters())
    assert all(parameters[name].ndim >= 2 for name in names)


def test_prunable_knows_every_form_of_classifier():
    vit = timm.create_model("test_vit", num_classes=3, img_size=32)
    assert "blocks.0.attn.qkv.weight" in prunable.prunable_names(vit)
    assert "head.weight" not in prunable.prunable_names(vit)
    distilled = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=3)
    assert prunable.classifier_names(distilled) == ("head", "head_dist")
    assert not any(name.startswith("head") for name in prunable.prunable_names(distilled))


def test_include_and_exclude_are_wildcards_and_misspelt_ones_are_refused(model):
    every = prunable.prunable_names(model)
    assert prunable.prunable_names(model, include=("layer1.*",)) == [n for n in every if n.startswith("layer1.")]
    assert prunable.prunable_names(model, exclude=("layer1.*",)) == [n for n in every if not n.startswith("layer1.")]
    with pytest.raises(ValueError, match=r"exclude: 'layr1\.\*' matches none"):
        prunable.prunable_names(model, exclude=("layr1.*",))
    with pytest.raises(ValueError, match="no prunable weight"):
        prunable.prunable_names(model, exclude=("*",))
