"""Exact thresholds, the CPU's way and a card's: both equal a stable sort, whatever the scores."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from timm_tickets.core import counting, masks, topk

ways = pytest.mark.parametrize("card", [False, True], ids=["host", "card"])
EXTREMES = [0.0, -0.0, math.inf, -math.inf, 1e-45, -1e-45, 1e-38, -1e-38, 3.4e38, -3.4e38, 1.0, 1 + 2**-23, -1.0]
DTYPES = st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16])
scores = st.one_of(
    st.lists(st.sampled_from(EXTREMES), max_size=60),
    st.lists(st.floats(width=32, allow_nan=False), max_size=60),
    st.lists(st.floats(allow_nan=False), max_size=60),
    st.builds(lambda value, size: [value] * size, st.sampled_from(EXTREMES), st.integers(0, 60)),
)


@pytest.fixture
def way(card, monkeypatch):
    """The card's way on the CPU; small limits, so that a few scores take every turn."""
    if card:
        monkeypatch.setattr(topk, "on_host", lambda _: False)
    return card


def small(monkeypatch):
    monkeypatch.setattr(topk, "_SMALL", 8)
    monkeypatch.setattr(topk, "_STRIDE", 3)
    monkeypatch.setattr(topk, "_SURE", 0.5)  # so that the sample often misses
    monkeypatch.setattr(counting, "CHUNK", 16)
    monkeypatch.setattr(counting, "_COLUMNS", 4)


def sorted_top(values, count):
    order = values.flatten().double().argsort(descending=True, stable=True)
    mask = torch.zeros(values.numel(), dtype=torch.bool)
    mask[order[:count]] = True
    return mask.view(values.shape)


def test_what_masks_have_ruled_out_is_not_copied_to_be_selected_from(monkeypatch):
    values = torch.rand(100_000, generator=torch.Generator().manual_seed(0))
    values[torch.arange(100_000) % 10 > 0] = -torch.inf  # a mask that keeps a tenth
    looked, best = [], topk._best
    monkeypatch.setattr(topk, "_best", lambda found, count: looked.append(len(found)) or best(found, count))
    for count in (9_990, 10_000):  # of nearly all that is left, the neighbourhood has no lower end
        assert torch.equal(topk.top(values, count), sorted_top(values, count))
    assert max(looked) < 5_000  # 94,000 with those
    assert torch.equal(topk.top(values, 10_001), sorted_top(values, 10_001))  # one of them, as more cannot be had


def sorted_swap(mask, values, rate):
    mask, values = mask.clone(), values.double()
    pruned, kept = (~mask).nonzero().flatten(), mask.nonzero().flatten()
    pruned = pruned[values[pruned].argsort(descending=True, stable=True)]
    kept = kept[values[kept].argsort(stable=True)]
    pairs = min(len(pruned), len(kept))
    count = math.ceil(rate * int((values[pruned[:pairs]] > values[kept[:pairs]]).sum()))
    mask[pruned[:count]], mask[kept[:count]] = True, False
    return mask


@ways
def test_the_highest_are_those_of_a_stable_sort(way, monkeypatch):
    small(monkeypatch)

    @settings(deadline=None, max_examples=50)
    @given(st.lists(scores, min_size=1, max_size=4), DTYPES, st.data())
    def check(layers, dtype, data):
        tensors = [torch.tensor(layer, dtype=torch.float64).to(dtype) for layer in layers]
        counts = [data.draw(st.integers(0, len(layer))) for layer in layers]
        expected = [sorted_top(one, count) for one, count in zip(tensors, counts, strict=True)]
        given_counts = [torch.tensor(count) if data.draw(st.booleans()) else count for count in counts]
        assert all(map(torch.equal, topk.tops(tensors, given_counts), expected))
        # All layers together: as one row.
        wide = [one.to(torch.promote_types(dtype, torch.float32)) for one in tensors]
        count = data.draw(st.integers(0, sum(map(len, layers))))
        together = torch.cat(topk.joint(lambda: wide, count))
        assert torch.equal(together, sorted_top(torch.cat(wide), count))

    check()


@ways
def test_swaps_are_those_of_sorted_pairs(way, monkeypatch):
    small(monkeypatch)

    @settings(deadline=None, max_examples=50)
    @given(st.lists(scores, min_size=1, max_size=4), DTYPES, st.sampled_from([0.0, 0.3, 0.5, 1.0]), st.data())
    def check(layers, dtype, rate, data):
        tensors = [torch.tensor(layer, dtype=torch.float64).to(dtype) for layer in layers]
        before = [torch.tensor([data.draw(st.booleans()) for _ in layer], dtype=torch.bool) for layer in layers]
        wide = [one.to(torch.promote_types(dtype, torch.float32)) for one in tensors]
        expected = [sorted_swap(mask, one, rate) for mask, one in zip(before, wide, strict=True)]
        given_rate = torch.tensor(rate, dtype=torch.float64) if data.draw(st.booleans()) else rate
        assert all(map(torch.equal, topk.swaps(before, wide, given_rate), expected))

    check()


@ways
@pytest.mark.parametrize("kind", ["normal", "ties", "sorted", "halves", "half"])
def test_large_layers(way, kind):
    generator = torch.Generator().manual_seed(0)
    layers = [torch.randn(size, generator=generator) for size in (70_000, 3, 40_000, 30_000)]
    if kind == "ties":
        layers = [one.round() for one in layers]
    elif kind == "sorted":
        layers = [one.sort().values for one in layers]
    elif kind == "halves":  # what the sample sees is not what there is
        layers = [one.clone() for one in layers]
        for one in layers:
            one[::61] = -5.0
    elif kind == "half":
        layers = [one.half() for one in layers]
    counts = [len(one) // 10 for one in layers]
    expected = [sorted_top(one, count) for one, count in zip(layers, counts, strict=True)]
    assert all(map(torch.equal, topk.tops(layers, counts), expected))
    wide = [one.float() for one in layers]
    together = torch.cat(topk.joint(lambda: wide, sum(counts)))
    assert torch.equal(together, sorted_top(torch.cat(wide), sum(counts)))
    moved = [one + 0.05 * torch.randn(one.shape, generator=generator) for one in wide]
    swapped = topk.swaps(expected, moved, 0.7)
    assert all(map(torch.equal, swapped, [sorted_swap(m, s, 0.7) for m, s in zip(expected, moved, strict=True)]))


def test_grouped_layers_fill_chunks_in_order():
    sizes = [4, 5, 6, 20, 1, 0, 2]
    found = list(counting.grouped(sizes, 10))
    assert [sizes[part] for part in found] == [[4, 5], [6], [20], [1, 0, 2]]
    assert all(a.stop == b.start for a, b in pairwise(found))
    assert list(counting.grouped([], 10)) == []


def test_counts_that_are_known_are_not_asked_for():
    weights = {"a": torch.randn(4, 5), "b": torch.randn(6)}
    for scope in ("global", "layerwise"):
        first = masks.cut(masks.all_kept(weights), weights, 20, scope)
        assert masks.kept(first) == 20 == sum(int(mask.sum()) for mask in first.values())
        again = masks.cut(first, weights, 7, scope)
        assert masks.kept(again) == 7 == sum(int(mask.sum()) for mask in again.values())
    assert masks.layer_counts(again) == {name: int(mask.sum()) for name, mask in again.items()}


@pytest.mark.parametrize("scope", ["global", "layerwise"])
@pytest.mark.parametrize("change", ["in place", "replaced", "removed"])
def test_counts_are_forgotten_where_a_mask_was_changed(scope, change):
    weights = {"a": torch.randn(4, 5), "b": torch.randn(6)}
    found = masks.cut(masks.all_kept(weights), weights, 20, scope)
    if change == "in place":  # as COLT has it
        found["a"] &= torch.zeros(4, 5, dtype=torch.bool)
    elif change == "replaced":
        found["a"] = torch.zeros(4, 5, dtype=torch.bool)
    else:
        del found["a"]
    assert masks.kept(found) == int(found["b"].sum())
    assert masks.layer_counts(found)["b"] == int(found["b"].sum())


@ways
def test_denormal_and_half_precision_scores_are_told_apart(way):
    values = torch.tensor([-(2.0**-149), -0.0, 2.0**-149, 0.0, 2.0**-148])
    assert topk.top(values, 1).tolist() == [False, False, False, False, True]
    assert topk.top(values, 3).tolist() == [False, True, True, False, True]  # both zeros are equal
    half = torch.tensor(np.arange(0, 31744, 7, dtype=np.uint16).view(np.float16))  # every seventh above zero
    assert torch.equal(topk.top(half, 100), sorted_top(half, 100))
