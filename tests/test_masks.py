"""How much is hidden, and where."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from alice_jax.data import masks

GRIDS = st.tuples(*[st.integers(1, 6)] * 3)
RATIOS = st.sampled_from([0.25, 0.5, 0.6, 0.75, 0.9])


@pytest.mark.parametrize(("cells", "ratio", "hidden"), [(64, 0.75, 48), (27, 0.75, 21), (5, 0.6, 3), (20, 0.55, 11)])
def test_hidden_count_is_the_ceiling_without_float_noise(cells, ratio, hidden):
    assert masks.hidden_count(cells, ratio) == hidden


@given(GRIDS, RATIOS, st.integers(0, 99))
def test_blocks_hide_exactly_that_many_cells(grid, ratio, seed):
    hidden = masks.random_blocks(np.random.default_rng(seed), grid, ratio)
    assert hidden.shape == grid and hidden.sum() == masks.hidden_count(hidden.size, ratio)


@given(GRIDS, RATIOS, st.integers(0, 99))
def test_columns_are_constant_along_the_third_axis(grid, ratio, seed):
    hidden = masks.random_columns(np.random.default_rng(seed), grid, ratio)
    assert hidden.shape == grid and (hidden == hidden[:, :, :1]).all()
    assert hidden[:, :, 0].sum() == masks.hidden_count(grid[0] * grid[1], ratio)


def test_blocks_are_not_columns():
    hidden = masks.random_blocks(np.random.default_rng(0), (4, 4, 4), 0.75)
    assert (hidden != hidden[:, :, :1]).any()
