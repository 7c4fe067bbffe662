"""Fair windows over items."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyzoo.core.errors import ConfigError
from polyzoo.sea.splitting.windows import chop, window_ranges


@given(st.integers(0, 200), st.integers(1, 40), st.data())
def test_every_item_is_in_a_window_and_every_window_adds_one(
    count: int, window: int, data: st.DataObject
):
    step = data.draw(st.integers(1, window))
    ranges = window_ranges(count, window=window, step=step)
    assert {item for start, end in ranges for item in range(start, end)} == set(range(count))
    assert all(0 < end - start <= window for start, end in ranges)
    assert all(second[0] - first[0] == step for first, second in pairwise(ranges))
    assert all(second[1] > first[1] for first, second in pairwise(ranges))


@pytest.mark.parametrize("count", [1, 5, 32])
def test_up_to_a_window_of_items_is_one_window(count: int):
    assert window_ranges(count, window=32, step=16) == [(0, count)]


@pytest.mark.parametrize(("window", "step"), [(0, 1), (4, 0), (-1, -1)])
def test_sizes_below_one_are_refused(window: int, step: int):
    with pytest.raises(ConfigError, match=f"window={window} and step={step} must be at least 1"):
        window_ranges(9, window=window, step=step)


def test_a_gap_is_refused():
    with pytest.raises(ConfigError, match=r"step=5 is larger than window=4: .* would be lost"):
        window_ranges(9, window=4, step=5)


@given(st.integers(0, 50), st.integers(1, 400), st.integers(1, 60))
def test_chopping_is_even_and_fits(start: int, size: int, budget: int):
    parts = chop(start, start + size, budget=budget)
    sizes = [end - first for first, end in parts]
    assert parts[0][0] == start
    assert parts[-1][1] == start + size
    assert all(first[1] == second[0] for first, second in pairwise(parts))
    assert max(sizes) <= budget
    assert max(sizes) - min(sizes) <= 1
    assert len(parts) == -(-size // budget)
