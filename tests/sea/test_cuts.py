"""Choosing cuts, against exhaustive search."""

from __future__ import annotations

from itertools import combinations, pairwise

from hypothesis import given
from hypothesis import strategies as st

from polyzoo.sea.splitting.cuts import Border, choose_cuts


@st.composite
def layouts(draw: st.DrawFn) -> tuple[list[list[Border]], int]:
    """Three levels of borders over up to 40 items; a finer level holds the coarser one's."""
    size = draw(st.integers(1, 40))
    chosen = draw(st.lists(st.sampled_from([1, 2, 3, 9]), min_size=size, max_size=size))
    costs = draw(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=size, max_size=size))
    borders = [
        Border(index, level, costs[index], "x")
        for index, level in enumerate(chosen)
        if index and level < 9
    ]
    return [[b for b in borders if b.level <= level] for level in (1, 2, 3)], size


@given(layouts(), st.integers(1, 50), st.integers(0, 4))
def test_blocks_fit_and_follow_each_other(layout, capacity: int, min_size: int):
    levels, size = layout
    cuts = choose_cuts(levels, start=0, end=size, capacity=capacity, min_size=min_size)
    assert cuts[0] == 0
    edges = [*cuts, size]
    assert all(0 < last - first <= capacity for first, last in pairwise(edges))


@given(layouts(), st.integers(0, 4))
def test_more_capacity_never_means_more_blocks(layout, min_size: int):
    levels, size = layout
    counts = [
        len(choose_cuts(levels, start=0, end=size, capacity=capacity, min_size=min_size))
        for capacity in range(1, size + 2)
    ]
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] == 1


@given(layouts(), st.integers(1, 50))
def test_fewest_blocks_where_the_first_level_is_enough(layout, capacity: int):
    levels, size = layout
    places = [border.index for border in levels[0]]
    if any(last - first > capacity for first, last in pairwise([0, *places, size])):
        return
    cuts = choose_cuts(levels, start=0, end=size, capacity=capacity, min_size=0)
    assert set(cuts) <= {0, *places}

    def fits(count: int) -> bool:
        return any(
            all(last - first <= capacity for first, last in pairwise([0, *chosen, size]))
            for chosen in combinations(places, count - 1)
        )

    assert fits(len(cuts))
    if len(cuts) > 1 and len(places) <= 12:
        assert not fits(len(cuts) - 1)


@given(layouts(), st.integers(1, 50))
def test_cheapest_of_the_fewest(layout, capacity: int):
    levels, size = layout
    places = [border.index for border in levels[0]]
    costs = {border.index: border.cost for border in levels[0]}
    if any(last - first > capacity for first, last in pairwise([0, *places, size])):
        return
    cuts = choose_cuts(levels, start=0, end=size, capacity=capacity, min_size=0)
    if len(cuts) > 4 or len(places) > 14:
        return

    def cost(chosen: tuple[int, ...]) -> float:
        edges = [0, *chosen, size]
        target = size / (len(edges) - 1)
        uneven = sum(((last - first - target) / capacity) ** 2 for first, last in pairwise(edges))
        return uneven + sum(costs[index] for index in chosen)

    allowed = [
        chosen
        for chosen in combinations(places, len(cuts) - 1)
        if all(last - first <= capacity for first, last in pairwise([0, *chosen, size]))
    ]
    assert abs(cost(tuple(cuts[1:])) - min(map(cost, allowed))) < 1e-9


def test_start_need_not_be_zero():
    levels = [[Border(index, 1, 0.0, "x") for index in range(11, 20)]]
    assert choose_cuts(levels, start=10, end=20, capacity=5, min_size=0) == [10, 15]
