"""n of m and blocks, on literal tensors."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from timm_tickets.core.errors import SettingError
from timm_tickets.core.patterns import blocks, cut_blocks, cut_n_of_m, filled_up, fitting, parsed, whole


def full(*shape):
    return torch.ones(shape, dtype=torch.bool)


@pytest.mark.parametrize("text", ["weights", "4:4", "5:4", "0:4", "2:4:8", "block4x4", "block 0x4", "4x4", ""])
def test_what_is_no_granularity_is_refused(text):
    with pytest.raises(ValueError, match=r"is not valid; it is weight, channel, head, n of m"):
        parsed(text)


def test_two_of_every_four_of_a_row_stay():
    scores = {"w": torch.tensor([[4.0, 3, 2, 1, 0, 9, 9, 9], [1, 1, 1, 1, 5, 0, 0, 6]])}
    found = cut_n_of_m({"w": full(2, 8)}, scores, 8, 2, 4)
    assert found["w"].int().tolist() == [[1, 1, 0, 0, 0, 1, 1, 0], [1, 1, 0, 0, 1, 0, 0, 1]]


def test_on_the_way_to_two_of_four_the_lowest_of_those_that_may_go_go_first():
    scores = {"w": torch.tensor([[8.0, 7, 6, 5, 4, 3, 2, 1]])}
    found = cut_n_of_m({"w": full(1, 8)}, scores, 6, 2, 4)
    assert found["w"].int().tolist() == [[1, 1, 1, 1, 1, 1, 0, 0]]
    assert cut_n_of_m(found, scores, 4, 2, 4)["w"].int().tolist() == [[1, 1, 0, 0, 1, 1, 0, 0]]


def test_a_pattern_runs_along_input_and_kernel_of_a_convolution():
    scores = {"w": torch.arange(16.0).view(2, 2, 2, 2)}
    found = cut_n_of_m({"w": full(2, 2, 2, 2)}, scores, 4, 1, 4)
    assert found["w"].flatten(1).int().tolist() == [[0, 0, 0, 1, 0, 0, 0, 1]] * 2


def test_what_masks_of_two_of_four_have_in_common_is_filled_up_with_the_best():
    before = {"w": full(1, 8)}
    common = {"w": torch.tensor([[1, 0, 0, 0, 0, 0, 0, 0]]).bool()}
    scores = {"w": torch.tensor([[0.0, 1, 2, 3, 4, 5, 6, 7]])}
    assert filled_up(common, before, scores, 2, 4)["w"].int().tolist() == [[1, 0, 0, 1, 0, 0, 1, 1]]


def test_blocks_go_by_their_mean():
    weight = torch.tensor([[9.0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 0, 0], [2, 2, 0, 3]])
    found = cut_blocks({"w": full(4, 4)}, {"w": weight}, 8, 2, 2)
    assert found["w"].int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0]]
    assert int(cut_blocks(found, {"w": weight}, 7, 2, 2)["w"].sum()) == 4  # as many as fill blocks
    with pytest.raises(SettingError, match="3 weights are to be kept and a block has 4"):
        cut_blocks(found, {"w": weight}, 3, 2, 2)


def test_scores_that_are_not_numbers_are_refused():
    scores = {"w": torch.full((1, 4), torch.nan)}
    with pytest.raises(ValueError, match="NaN"):
        cut_n_of_m({"w": full(1, 4)}, scores, 2, 2, 4)
    with pytest.raises(ValueError, match="NaN"):
        cut_blocks({"w": full(1, 4)}, scores, 2, 1, 2)


def test_layers_that_a_pattern_does_not_divide_are_left_out():
    shapes = {"conv": (8, 4, 3, 3), "stem": (8, 3, 3, 3), "depthwise": (8, 1, 3, 3), "linear": (6, 8)}
    assert fitting(shapes, parsed("2:4")) == ["conv", "linear"]
    assert fitting(shapes, parsed("block 4x4")) == ["conv"]
    assert fitting(shapes, parsed("block 2x3")) == ["conv", "stem", "depthwise"]


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(0, 99))
def test_blocks_put_together_are_the_matrix(down, across, rows, columns, seed):
    mask = torch.rand(down, across, generator=torch.Generator().manual_seed(seed)) < 0.5
    weight = whole(mask, rows, columns, (down * rows, across * columns))
    assert torch.equal(blocks(weight, rows, columns).all(2), mask)
    assert torch.equal(blocks(weight, rows, columns).any(2), mask)
