"""Where to cut a sequence: the fewest parts that fit, at the best of the allowed borders. Pure.

Borders have levels: 1 is best (between statements), higher ones are used only inside a part that is
too large without them. Such a part always starts a block. That makes the number of blocks fall (or
stay) when the capacity grows: a part that needed n >= 2 blocks becomes one block, and whatever
shared its last block gets one of its own.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

_TINY_TAIL = 100.0
"""Cost of a last block below `min_size`: more than any sum of border costs that it could save."""


@dataclass(frozen=True, slots=True)
class Border:
    """A place where a block may begin."""

    index: int
    """Of the first item after the border."""
    level: int
    """1 is preferred; the border counts only where the levels below it leave too large a part."""
    cost: float
    """Among the cuttings with the fewest blocks, the cheapest is taken."""
    label: str
    """Names what begins there."""


def choose_cuts(
    levels: Sequence[Sequence[Border]], *, start: int, end: int, capacity: int, min_size: int
) -> list[int]:
    """Starts of the blocks of items [start, end); none is larger than `capacity`.

    Args:
        levels: Borders of level 1, 2, ...; inside a part that no level divides,
            any item may begin a block.
        start: First item; the first block begins here.
        end: After the last item.
        capacity: Most items a block may hold, at least 1.
        min_size: A last block smaller than this is avoided where the number of blocks allows, and
            finer borders stand at least this far apart.
    """
    starts = [start]
    costs = {border.index: border.cost for level in reversed(levels) for border in level}
    indexes = [[border.index for border in level] for level in levels]
    parts = _divide(indexes, 0, start, end, capacity, min_size)
    for position, points in enumerate(parts):
        if position:
            starts.append(points[0])
        is_last = position == len(parts) - 1
        starts.extend(_cut_part(points, costs, capacity, min_size if is_last else 0))
    return starts


def _divide(
    levels: Sequence[list[int]],
    level: int,
    start: int,
    end: int,
    capacity: int,
    min_size: int,
) -> list[list[int]]:
    """Runs of border positions; every run begins with a forced cut.

    No two neighbours in a run are further apart than `capacity`. What follows a part that was
    divided joins its last run.
    """
    points = _points(levels, level, start, end, min_size)
    runs: list[list[int]] = [[start]]
    for first, last in pairwise(points):
        if last - first <= capacity:
            runs[-1].append(last)
            continue
        if level + 1 < len(levels):
            finer = _divide(levels, level + 1, first, last, capacity, min_size)
        else:
            finer = _even(first, last, capacity)
        if len(runs[-1]) == 1:
            runs.pop()
        runs.extend(finer)
    return runs


def _points(
    levels: Sequence[list[int]], level: int, start: int, end: int, min_size: int
) -> list[int]:
    if level >= len(levels):
        return [start, end]
    indexes = levels[level]
    inside = indexes[bisect_right(indexes, start) : bisect_left(indexes, end)]
    points = [start]
    # Borders between statements all stay; finer ones must not leave crumbs.
    apart = min_size if level else 1
    for index in inside:
        if index - points[-1] >= apart and (not level or end - index >= apart):
            points.append(index)
    points.append(end)
    return points


def _even(start: int, end: int, capacity: int) -> list[list[int]]:
    count = -(-(end - start) // capacity)
    edges = [start + (end - start) * index // count for index in range(count + 1)]
    return [[first, last] for first, last in pairwise(edges)]


def _cut_part(
    points: list[int], costs: Mapping[int, float], capacity: int, min_last: int
) -> list[int]:
    """The inner cuts of one run: fewest blocks, then least cost."""
    start, end = points[0], points[-1]
    latest: list[int] = []
    position = start
    while end - position > capacity:
        position = points[bisect_right(points, position + capacity) - 1]
        latest.append(position)
    if not latest:
        return []
    earliest: list[int] = []
    position = end
    while end - start > 0 and position - start > capacity:
        position = points[bisect_left(points, position - capacity)]
        earliest.append(position)
    earliest.reverse()
    target = (end - start) / (len(latest) + 1)

    def block_cost(first: int, last: int) -> float:
        off = (last - first - target) / capacity
        tiny = _TINY_TAIL if last == end and last - first < min_last else 0.0
        return off * off + tiny

    # best[i] of a layer: least cost of cutting [start, candidate i), and the candidate before it.
    layers: list[tuple[list[int], list[float], list[int]]] = [([start], [0.0], [-1])]
    for low, high in [*zip(earliest, latest, strict=True), (end, end)]:
        candidates = points[bisect_left(points, low) : bisect_right(points, high)]
        before, before_best, _ = layers[-1]
        best: list[float] = []
        origin: list[int] = []
        for candidate in candidates:
            own = costs.get(candidate, 0.0)
            reachable = range(
                bisect_left(before, candidate - capacity), bisect_left(before, candidate)
            )
            totals = [(before_best[i] + block_cost(before[i], candidate), i) for i in reachable]
            total, index = min(totals, default=(float("inf"), -1))
            best.append(total + own)
            origin.append(index)
        layers.append((candidates, best, origin))
    cuts = []
    index = 0
    for depth in range(len(layers) - 1, 1, -1):
        index = layers[depth][2][index]
        cuts.append(layers[depth - 1][0][index])
    return cuts[::-1]
