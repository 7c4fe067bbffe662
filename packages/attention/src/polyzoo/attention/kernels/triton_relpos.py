"""Decomposed relative position inside the kernels: no n x m tensor is ever read or written.

Keys form a grid of `kh` rows of KW. Inside the kernels a grid row is laid out over KWP columns,
the next power of two, and a key tile holds BN // KWP whole grid rows. With BN == KWP the height
term of a tile is one column per query row and the width term is the same tile in every step.

Where the whole grid is small (windows), the forward pass makes both terms a matrix product: KG
channels that hold `rel_h` and `rel_w` of a query, times a table with ones in the row and in the
column of each key (`grid_table.py`). Products with 0 and 1 are exact, and keys stay in their order.
"""

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportReturnType=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false, reportCallIssue=false
# Triton code only looks like Python: its compiler, not the type checker, knows these types.
from __future__ import annotations

import triton
import triton.language as tl

from polyzoo.attention.kernels.triton_device import LOG2E


@triton.jit
def grid_key(j, m, KW: tl.constexpr, KWP: tl.constexpr):
    """Key number of laid-out column j; columns that hold no key repeat a neighbouring one."""
    key = j
    if KW != KWP:
        key = tl.minimum(j // KWP * KW + j % KWP, m - 1)
    else:
        key = tl.minimum(j, m - 1)
    return key


@triton.jit
def grid_valid(j, kh, KW: tl.constexpr, KWP: tl.constexpr):
    """Which laid-out columns hold a key."""
    return (j % KWP < KW) & (j // KWP < kh)


@triton.jit
def width_term(
    base, i, stride, j, KW: tl.constexpr, KWP: tl.constexpr, NATURAL: tl.constexpr
):  # fmt: skip
    """rel_w[i, j % KWP] in log2 or NATURAL units, -inf where there is no key; i and j broadcast."""
    x = j % KWP
    term = tl.load(base + i * stride + x, mask=(x < KW) & (i >= 0), other=-float("inf"))
    term = term.to(tl.float32)
    return term if NATURAL else term * LOG2E


@triton.jit
def height_term(
    base, i, stride, j, tile, kh,
    BN: tl.constexpr, KWP: tl.constexpr, NATURAL: tl.constexpr,
):  # fmt: skip
    """rel_h[i, j // KWP] in log2 or NATURAL units, -inf below the grid; i and j broadcast."""
    if BN == KWP:
        term = tl.load(base + i * stride + tile).to(tl.float32)
    else:
        y = j // KWP
        term = tl.load(base + i * stride + y, mask=(y < kh) & (i >= 0), other=-float("inf"))
        term = term.to(tl.float32)
    return term if NATURAL else term * LOG2E


@triton.jit
def grid_terms(
    RelH, RelW, rows, row_mask, h_stride, w_stride, kh, WIDTH: tl.constexpr, KG: tl.constexpr
):  # fmt: skip
    """`rel_h` then `rel_w` of each row over KG channels, and which rows see no key at all.

    -inf times 0 would be NaN: it becomes a number whose probability is 0 beside any other.
    """
    channel = tl.arange(0, KG)[None, :]
    column = channel - kh
    row = rows[:, None].to(tl.int64)
    in_h = (channel < kh) & row_mask[:, None]
    in_w = (column >= 0) & (column < WIDTH) & row_mask[:, None]
    h = tl.load(RelH + row * h_stride + channel, mask=in_h, other=-float("inf"))
    w = tl.load(RelW + row * w_stride + column, mask=in_w, other=-float("inf"))
    nowhere = tl.max(h.to(tl.float32), 1) == -float("inf")
    nowhere = (tl.max(w.to(tl.float32), 1) == -float("inf")) | nowhere
    term = tl.where(channel < kh, h, w)
    term = tl.where(term == -float("inf"), -60000.0, term)
    term = tl.where(in_h | in_w, term, 0.0)
    return term.to(RelH.dtype.element_ty), nowhere & row_mask
