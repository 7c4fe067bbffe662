"""Which tiles of the score matrix need work: plain Python, no torch, mirrored by the kernels.

A tile holds query rows `row .. row + block_m` and keys `column .. column + block_n` of one
sequence with `n` queries and `length` keys. Query i sits at key position `i + length - n`
(bottom-right alignment), sees at most `right` keys after that position and `left` before it;
-1 means unbounded. The kernels run the full tiles first, without any mask code, and then the few
partial ones at the edges.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

TileClass = Literal["empty", "full", "partial"]


@dataclass(frozen=True, slots=True)
class TileRange:
    """Tiles to visit, as half-open ranges of tile indices.

    `first .. stop` hold visible keys at all; `full_first .. full_stop` among them need no mask.
    """

    first: int
    full_first: int
    full_stop: int
    stop: int

    def classify(self, tile: int) -> TileClass:
        """Say how the tile with this index is treated."""
        if not self.first <= tile < self.stop:
            return "empty"
        return "full" if self.full_first <= tile < self.full_stop else "partial"


def key_range(
    row: int, *, n: int, length: int, left: int, right: int, block_m: int, block_n: int
) -> TileRange:
    """Give the key tiles that the query tile starting at `row` has to visit."""
    delta = length - n
    last = min(row + block_m, n) - 1
    begin, end, full_begin, full_end = 0, length, 0, length
    if right >= 0:
        end = min(length, last + delta + right + 1)
        full_end = min(length, row + delta + right + 1)
    if left >= 0:
        begin = max(0, row + delta - left)
        full_begin = max(0, last + delta - left)
    return _ordered(begin, end, full_begin, full_end, block_n)


def query_range(
    column: int, *, n: int, length: int, left: int, right: int, block_m: int, block_n: int
) -> TileRange:
    """Give the query tiles that the key tile starting at `column` has to visit."""
    delta = length - n
    last = min(column + block_n, length) - 1
    if last < column:
        return TileRange(0, 0, 0, 0)
    begin, end, full_begin, full_end = 0, n, 0, n
    if right >= 0:
        begin = max(0, column - delta - right)
        full_begin = max(0, last - delta - right)
    if left >= 0:
        end = min(n, last - delta + left + 1)
        full_end = min(n, column - delta + left + 1)
    return _ordered(begin, end, full_begin, full_end, block_m)


def _ordered(begin: int, end: int, full_begin: int, full_end: int, block: int) -> TileRange:
    """Round key or query bounds to tiles and keep the four numbers in order."""
    first = begin // block
    stop = max(first, -(-max(end, 0) // block))
    full_first = -(-full_begin // block)
    full_stop = max(full_end, 0) // block
    if full_stop <= full_first:
        return TileRange(first, first, first, stop)
    return TileRange(first, full_first, full_stop, stop)


def head_blocks(d: int) -> tuple[int, int]:
    """Split a head dimension into two powers of two, the second 0 if one is enough.

    72 becomes 64 + 16 instead of a padded 128; two equal halves are one block, since a single
    wider matrix product is cheaper than two.
    """
    whole = 1 << (d.bit_length() - 1)
    if whole == d:
        return max(16, d), 0
    rest = max(16, 1 << (d - whole - 1).bit_length())
    if rest >= whole or whole < 16:
        return max(16, 2 * whole), 0
    return whole, rest
