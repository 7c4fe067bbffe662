"""Pieces that every Triton kernel here is made of: tile ranges, masked loads, masks, dropout."""

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportReturnType=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false, reportCallIssue=false
# Triton code only looks like Python: its compiler, not the type checker, knows these types.
from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def ordered(begin, end, full_begin, full_end, BLOCK: tl.constexpr):
    """Mirror of `tiles._ordered`."""
    first = begin // BLOCK
    stop = tl.maximum(first, tl.cdiv(tl.maximum(end, 0), BLOCK))
    full_first = tl.cdiv(full_begin, BLOCK)
    full_stop = tl.maximum(full_end, 0) // BLOCK
    none = full_stop <= full_first
    full_first = tl.where(none, first, full_first)
    full_stop = tl.where(none, first, full_stop)
    return first, full_first, full_stop, stop


@triton.jit
def key_bounds(
    row,
    n,
    length,
    left,
    right,
    BM: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
):
    """First and last visible key of a query tile, and the range every row of it sees."""
    delta = length - n
    last = tl.minimum(row + BM, n) - 1
    begin = 0
    end = length
    full_begin = 0
    full_end = length
    if HAS_RIGHT:
        end = tl.minimum(length, last + delta + right + 1)
        full_end = tl.minimum(length, row + delta + right + 1)
    if HAS_LEFT:
        begin = tl.maximum(0, row + delta - left)
        full_begin = tl.maximum(0, last + delta - left)
    return begin, end, full_begin, full_end


@triton.jit
def query_bounds(
    column,
    n,
    length,
    left,
    right,
    BN: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
):
    """Mirror of `tiles.query_range` up to the rounding."""
    delta = length - n
    last = tl.minimum(column + BN, length) - 1
    begin = 0
    end = n
    full_begin = 0
    full_end = n
    if HAS_RIGHT:
        begin = tl.maximum(0, column - delta - right)
        full_begin = tl.maximum(0, last - delta - right)
    if HAS_LEFT:
        end = tl.minimum(n, last - delta + left + 1)
        full_end = tl.minimum(n, column - delta + left + 1)
    end = tl.where(last < column, 0, end)
    full_end = tl.where(last < column, 0, full_end)
    begin = tl.where(last < column, 0, begin)
    return begin, end, full_begin, full_end


@triton.jit
def visible(i, j, length, delta, left, right, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr):
    """Which pairs of query row i and key j the described masks leave, as a broadcast of both."""
    keep = (j < length) & (i >= 0)
    if HAS_RIGHT:
        keep = keep & (j <= i + (delta + right))
    if HAS_LEFT:
        keep = keep & (j >= i + (delta - left))
    return keep


@triton.jit
def load_block(
    base,
    offsets,
    stride,
    row_mask,
    START: tl.constexpr,
    WIDTH: tl.constexpr,
    TOTAL: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Load columns START .. START + WIDTH of some rows; 0 past TOTAL and for masked rows."""
    columns = START + tl.arange(0, WIDTH)
    pointers = base + offsets[:, None] * stride + columns[None, :]
    if START + WIDTH > TOTAL:
        if MASKED:
            return tl.load(pointers, mask=row_mask[:, None] & (columns < TOTAL)[None, :], other=0.0)
        return tl.load(pointers, mask=(columns < TOTAL)[None, :], other=0.0)
    if MASKED:
        return tl.load(pointers, mask=row_mask[:, None], other=0.0)
    return tl.load(pointers)


@triton.jit
def store_block(
    base,
    offsets,
    stride,
    value,
    row_mask,
    START: tl.constexpr,
    WIDTH: tl.constexpr,
    TOTAL: tl.constexpr,
):
    """Store columns START .. START + WIDTH of the masked rows."""
    columns = START + tl.arange(0, WIDTH)
    pointers = base + offsets[:, None] * stride + columns[None, :]
    tl.store(
        pointers,
        value.to(base.dtype.element_ty),
        mask=row_mask[:, None] & (columns < TOTAL)[None, :],
    )


@triton.jit
def dropout_keep(Rng, i, j, sequence_head, threshold):
    """Which probabilities survive: philox4x32-10 with counter (j, i, b * heads + h, offset).

    `threshold` is ceil(p * 2**32) as the bit pattern of an int32.
    """
    seed = tl.load(Rng)
    offset = tl.load(Rng + 1).to(tl.int32)
    zero = (i * 0) + (j * 0)
    word, _, _, _ = tl.philox(seed, j + zero, i + zero, zero + sequence_head, zero + offset)
    return word >= threshold.to(tl.uint32, bitcast=True)


@triton.jit
def locate(
    Schedule,
    CuQ,
    CuK,
    KvLens,
    slots,
    tiles,
    heads,
    n,
    m,
    PACKED: tl.constexpr,
    KVLENS: tl.constexpr,
    REVERSED: tl.constexpr,
):
    """Turn the program number into (sequence, head, tile) and the sequence's place and lengths.

    Programs of one head are neighbours, so that its keys and values stay in the L2 cache; under a
    causal mask the longest tiles come first.
    """
    pid = tl.program_id(0)
    if PACKED:
        slot = pid % slots
        head = pid // slots
        sequence = tl.load(Schedule + 2 * slot)
        tile = tl.load(Schedule + 2 * slot + 1)
        at = tl.maximum(sequence, 0)
        q_start = tl.load(CuQ + at).to(tl.int32)
        k_start = tl.load(CuK + at).to(tl.int32)
        queries = tl.load(CuQ + at + 1).to(tl.int32) - q_start
        length = tl.load(CuK + at + 1).to(tl.int32) - k_start
    else:
        tile = pid % tiles
        if REVERSED:
            tile = tiles - 1 - tile
        sequence = pid // tiles // heads
        head = pid // tiles % heads
        q_start = 0
        k_start = 0
        queries = n
        length = m
        if KVLENS:
            length = tl.minimum(tl.maximum(tl.load(KvLens + sequence).to(tl.int32), 0), m)
    return sequence, head, tile, q_start, k_start, queries, length


@triton.jit
def tile_plan(
    row, n, length, left, right, kh, Counts, list_row,
    BM: tl.constexpr, BN: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    KVLENS: tl.constexpr, HAS_MASK: tl.constexpr, KW: tl.constexpr, KWP: tl.constexpr,
    EDGES: tl.constexpr,
):  # fmt: skip
    """Ranges of full and partial key tiles of one query tile.

    Returns the visible keys `begin .. end`, the range of full tiles, and the range of a counter
    over partial tiles with its `split` and `jump` (see `edge_tile`).
    """
    split = 0
    jump = 0
    begin, end, full_begin, full_end = key_bounds(
        row, n, length, left, right, BM, HAS_LEFT, HAS_RIGHT
    )
    if KW > 0:
        tiles = tl.cdiv(kh, BN // KWP)
        full_lo = 0
        full_hi = 0 if EDGES else tiles
        edge_lo = 0
        edge_hi = tiles
    elif HAS_MASK:
        full = tl.load(Counts + 2 * list_row)
        partial = tl.load(Counts + 2 * list_row + 1)
        full_lo = 0
        full_hi = full
        if HAS_LEFT or HAS_RIGHT or KVLENS:
            full_hi = 0  # a tile the mask leaves whole may still be cut by the other rules
        edge_lo = full_hi
        edge_hi = full + partial
    else:
        first, full_lo, full_hi, stop = ordered(begin, end, full_begin, full_end, BN)
        edge_lo = full_hi
        edge_hi = stop
        if HAS_LEFT:
            split = full_lo
            edge_lo = first
            jump = full_hi - full_lo
            edge_hi = stop - jump
    return begin, end, full_lo, full_hi, edge_lo, edge_hi, split, jump


@triton.jit
def edge_tile(
    t, split, jump, tile_list,
    HAS_LEFT: tl.constexpr, HAS_MASK: tl.constexpr, KW: tl.constexpr,
):  # fmt: skip
    """Tile number of the t-th partial tile: those before the full ones, then those after."""
    tile = t
    if KW == 0:
        if HAS_MASK:
            tile = tl.load(tile_list + t)
        elif HAS_LEFT:
            tile = tl.where(t >= split, t + jump, t)
    return tile
