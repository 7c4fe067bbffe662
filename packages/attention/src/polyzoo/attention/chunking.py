"""How to cut queries into chunks whose transfers hide behind the next chunk's computation.

A chunk's transfer starts when both the chunk and the transfer before it are done. Small chunks
hide more and cost more: each pays a latency, and a chunk that does not fill the device wastes it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

ROWS = 128
"""Rows of a kernel's tile: chunks are multiples of it."""
_COUNTS = (1, 2, 3, 4, 5, 6, 8, 12, 16)
_SLOPES = (0.5, 0.7, 1.0, 1.4, 2.0)


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What a device and its links do; orders of magnitude are enough to choose chunks."""

    flops: float
    """Floating point operations per second of all units together."""
    units: int
    """Multiprocessors: a chunk with fewer tiles leaves some idle."""
    bytes_per_second: float
    """Of the links, as NCCL counts bus bandwidth."""
    latency: float
    """Seconds before the first byte of a transfer, and after the last."""
    launch: float
    """Seconds that one more chunk costs the computation."""


RATES = {
    "cuda": Rates(flops=4.5e14, units=132, bytes_per_second=3e11, latency=25e-6, launch=8e-6),
    "cpu": Rates(flops=1e11, units=1, bytes_per_second=1e9, latency=2e-4, launch=1e-4),
}
"""H100 SXM with NVLink, and a CPU with gloo."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """One call of attention, projection and all-reduce, on one rank."""

    items: int
    """Batch items."""
    queries: int
    keys: int
    heads: int
    """On this rank."""
    head_dim: int
    hidden: int
    """Channels after the projection."""
    element_size: int
    left: int
    """Keys a query sees before its position; -1 is all."""
    right: int
    ranks: int


@dataclass(frozen=True)
class Chunk:
    """Rows `first:last` of items `item:last_item`: neighbours in a `(b, n, hidden)` result."""

    item: int
    last_item: int
    first: int
    last: int


def pipeline_seconds(compute: Sequence[float], transfer: Sequence[float]) -> float:
    """Return when the last transfer ends, computing one chunk after another."""
    computed = arrived = 0.0
    for seconds, sending in zip(compute, transfer, strict=True):
        computed += seconds
        arrived = max(arrived, computed) + sending
    return arrived


def cut(work: Work, rows: Sequence[int]) -> tuple[Chunk, ...]:
    """Cut a batch as the rows say: they count through item after item.

    Raises:
        ValueError: They do not add up, or a chunk holds part of one item and part of another.
    """
    total = work.items * work.queries
    if sum(rows) != total or any(count < 1 for count in rows):
        raise ValueError(
            f"chunks of {list(rows)} rows: each must be 1 or more, and together they must be "
            f"{work.items} items x {work.queries} queries = {total}"
        )
    chunks: list[Chunk] = []
    start = 0
    for count in rows:
        stop = start + count
        item, first = divmod(start, work.queries)
        last_item, last = divmod(stop - 1, work.queries)
        whole = first == 0 and last == work.queries - 1
        if item != last_item and not whole:
            raise ValueError(
                f"a chunk of {count} rows from row {first} of item {item} ends in the middle of "
                f"item {last_item}; a chunk is whole items, or rows of one item "
                f"({work.queries} queries each)"
            )
        chunks.append(Chunk(item, last_item + 1, first, last + 1))
        start = stop
    return tuple(chunks)


@lru_cache(maxsize=256)
def plan(work: Work, rates: Rates) -> tuple[Chunk, ...]:
    """Choose the chunks for which the model of the pipeline takes least time."""
    if work.ranks == 1 or work.items * work.queries == 0:
        return (Chunk(0, work.items, 0, work.queries),)
    best = min(_candidates(work), key=lambda rows: predicted_seconds(work, cut(work, rows), rates))
    return cut(work, best)


def predicted_seconds(work: Work, chunks: Sequence[Chunk], rates: Rates) -> float:
    """Return the modelled time of attention, projection and all-reduce in these chunks."""
    share = 2 * (work.ranks - 1) / work.ranks
    row = work.hidden * work.element_size
    transfer: list[float] = []
    for chunk in chunks:
        size = (chunk.last_item - chunk.item) * (chunk.last - chunk.first) * row
        transfer.append(rates.latency + share * size / rates.bytes_per_second)
    return pipeline_seconds([_compute_seconds(work, chunk, rates) for chunk in chunks], transfer)


def _compute_seconds(work: Work, chunk: Chunk, rates: Rates) -> float:
    items = chunk.last_item - chunk.item
    tiles = [
        (min(ROWS, chunk.last - row), _keys_seen(work, row, min(row + ROWS, chunk.last)))
        for row in range(chunk.first, chunk.last, ROWS)
    ]
    costs = [4.0 * work.head_dim * rows * keys for rows, keys in tiles]
    # A tile is one program: the chunk takes at least as long as its longest, on one unit.
    attention = max(items * work.heads * sum(costs) / rates.units, max(costs))
    inner = work.heads * work.head_dim
    projection = 2.0 * items * (chunk.last - chunk.first) * inner * work.hidden / rates.units
    return rates.launch + (attention + projection) * rates.units / rates.flops


def _keys_seen(work: Work, first: int, last: int) -> int:
    """Count the keys a tile of queries touches."""
    delta = work.keys - work.queries
    high = work.keys if work.right < 0 else min(work.keys, last + delta + work.right)
    low = 0 if work.left < 0 else max(0, first + delta - work.left)
    return max(0, high - low)


def _candidates(work: Work) -> Iterator[tuple[int, ...]]:
    """Cut in several numbers of chunks, with even, growing and shrinking sizes."""
    n = work.queries
    for count in _COUNTS:
        if count == 1:
            yield (work.items * n,)
        elif work.items >= count:
            ends = [round(part * work.items / count) * n for part in range(count + 1)]
            yield tuple(b - a for a, b in pairwise(ends))
        else:
            per_item = -(-count // work.items)
            for slope in _SLOPES:
                rows = _sloped(n, per_item, slope)
                if rows is not None:
                    yield rows * work.items


def _sloped(n: int, count: int, slope: float) -> tuple[int, ...] | None:
    """Cut n rows so that each chunk is `slope ** (1 / (count - 1))` of the one before."""
    if count == 1:
        return (n,)
    weights = [slope ** (part / (count - 1)) for part in range(count)]
    ends = [0]
    for part in range(1, count):
        exact = n * sum(weights[:part]) / sum(weights)
        ends.append(round(exact / ROWS) * ROWS)
    ends.append(n)
    rows = tuple(b - a for a, b in pairwise(ends))
    return rows if min(rows) >= ROWS else None
