"""Forward pass whose products of queries and keys are int8: a recipe of SageAttention's.

Keys lose their mean over the sequence, which softmax does not see; queries and keys become int8
with a scale for every block of rows. Probabilities times values stay in half precision.
"""

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportReturnType=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false, reportCallIssue=false
# Triton code only looks like Python: its compiler, not the type checker, knows these types.
from __future__ import annotations

import triton
import triton.language as tl

from polyzoo.attention.kernels.triton_device import LN2, load_block, store_block


@triton.jit(do_not_specialize=["x_b", "x_h", "x_n", "heads", "n"])
def quantize_kernel(
    X, Mean, Out, Scale, KvLens, x_b, x_h, x_n, heads, n,
    D: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr,
    HAS_MEAN: tl.constexpr, KVLENS: tl.constexpr,
):  # fmt: skip
    """One block of rows of one head to int8, `WIDTH` channels wide, and its scale."""
    blocks = tl.cdiv(n, BLOCK)
    pid = tl.program_id(0)
    block = pid % blocks
    outer = pid // blocks
    b = outer // heads
    head = outer % heads
    length = n
    if KVLENS:
        length = tl.minimum(tl.maximum(tl.load(KvLens + b).to(tl.int32), 0), n)
    rows = block * BLOCK + tl.arange(0, BLOCK)
    columns = tl.arange(0, PADDED)
    there = (rows < length)[:, None] & (columns < D)[None, :]
    at = rows.to(tl.int64)[:, None] * x_n + columns[None, :]
    base = X + tl.cast(b, tl.int64) * x_b + tl.cast(head, tl.int64) * x_h
    x = tl.load(base + at, mask=there, other=0.0).to(tl.float32)
    if HAS_MEAN:
        mean = tl.load(Mean + tl.cast(outer, tl.int64) * D + columns, mask=columns < D, other=0.0)
        x = tl.where(there, x - mean[None, :], 0.0)
    largest = tl.max(tl.max(tl.abs(x), 1), 0)
    scale = tl.where(largest > 0.0, largest / 127.0, 1.0)
    steps = x / scale
    whole = tl.where(steps >= 0.0, steps + 0.5, steps - 0.5).to(tl.int8)
    to = Out + tl.cast(outer, tl.int64) * n * WIDTH + rows.to(tl.int64)[:, None] * WIDTH
    inside = (rows < n)[:, None] & (columns < WIDTH)[None, :]
    tl.store(to + columns[None, :], whole, mask=inside)
    tl.store(Scale + pid, scale)


@triton.jit
def _step(
    acc0, acc1, total, peak, q0, q1, q_scale, K, KScale, V, v_n, tile, row, local, length, delta,
    D0: tl.constexpr, D1: tl.constexpr,
    DV: tl.constexpr, DV0: tl.constexpr, DV1: tl.constexpr,
    BN: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One key tile, which is one block of the keys' scales."""
    WIDTH: tl.constexpr = D0 + D1
    j = tile * BN + tl.arange(0, BN)
    there = j < length
    offsets = j.to(tl.int64)
    k0 = load_block(K, offsets, WIDTH, there, 0, D0, WIDTH, MASKED)
    s = tl.dot(q0, tl.trans(k0))
    if D1 > 0:
        k1 = load_block(K, offsets, WIDTH, there, D0, D1, WIDTH, MASKED)
        s = tl.dot(q1, tl.trans(k1), s)
    s = s.to(tl.float32) * (q_scale * tl.load(KScale + tile))
    if MASKED:
        keep = there[None, :]
        if CAUSAL:
            keep = keep & (j[None, :] <= (row + local)[:, None] + delta)
        s = tl.where(keep, s, -float("inf"))
    new_peak = tl.maximum(peak, tl.max(s, 1))
    pivot = tl.where(new_peak == -float("inf"), 0.0, new_peak)
    p = tl.exp2(s - pivot[:, None])
    decay = tl.exp2(peak - pivot)
    total = total * decay + tl.sum(p, 1)
    p = p.to(V.dtype.element_ty)
    v0 = load_block(V, offsets, v_n, there, 0, DV0, DV, MASKED)
    acc0 = tl.dot(p, v0, acc0 * decay[:, None])
    if DV1 > 0:
        v1 = load_block(V, offsets, v_n, there, DV0, DV1, DV, MASKED)
        acc1 = tl.dot(p, v1, acc1 * decay[:, None])
    return acc0, acc1, total, new_peak


@triton.jit(
    do_not_specialize=["v_b", "v_h", "v_n", "o_b", "o_h", "o_n", "heads", "n", "m"]
)  # fmt: skip
def int8_kernel(
    Q, QScale, K, KScale, V, Out, Lse, KvLens,
    v_b, v_h, v_n, o_b, o_h, o_n, heads, n, m, scale,
    GROUP: tl.constexpr, ALIGN: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    DV: tl.constexpr, DV0: tl.constexpr, DV1: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr, KVLENS: tl.constexpr,
):  # fmt: skip
    """Attention of one query tile, which is one block of the queries' scales."""
    tiles = tl.cdiv(n, BM)
    pid = tl.program_id(0)
    tile = pid % tiles
    if CAUSAL:
        tile = tiles - 1 - tile
    outer = tl.cast(pid // tiles, tl.int64)
    b = outer // heads
    head = outer % heads
    key_outer = b * (heads // GROUP) + head // GROUP
    length = m
    if KVLENS:
        length = tl.minimum(tl.maximum(tl.load(KvLens + b).to(tl.int32), 0), m)
    delta = length - n
    row = tile * BM
    local = tl.arange(0, BM)
    row_mask = row + local < n
    WIDTH: tl.constexpr = D0 + D1
    v_n *= ALIGN
    o_n *= ALIGN
    Q += (outer * n + row) * WIDTH
    K += key_outer * m * WIDTH
    KScale += key_outer * tl.cdiv(m, BN)
    V += (b * v_b + head // GROUP * v_h) * ALIGN
    Out += (b * o_b + head * o_h) * ALIGN + tl.cast(row, tl.int64) * o_n
    q0 = load_block(Q, local, WIDTH, row_mask, 0, D0, WIDTH, True)
    q1 = q0
    if D1 > 0:
        q1 = load_block(Q, local, WIDTH, row_mask, D0, D1, WIDTH, True)
    q_scale = tl.load(QScale + outer * tiles + tile) * scale
    end = length
    full = length
    if CAUSAL:
        end = tl.minimum(length, tl.minimum(row + BM, n) + delta)
        full = tl.minimum(length, row + delta + 1)
    full_tiles = tl.maximum(full, 0) // BN
    acc0 = tl.zeros([BM, DV0], tl.float32)
    acc1 = tl.zeros([BM, DV1 if DV1 > 0 else 16], tl.float32)
    total = tl.zeros([BM], tl.float32)
    peak = tl.full([BM], -float("inf"), tl.float32)
    for at in tl.range(0, full_tiles):
        acc0, acc1, total, peak = _step(
            acc0, acc1, total, peak, q0, q1, q_scale, K, KScale, V, v_n, at, row, local, length,
            delta, D0, D1, DV, DV0, DV1, BN, CAUSAL, False,
        )  # fmt: skip
    for at in tl.range(full_tiles, tl.cdiv(tl.maximum(end, 0), BN)):
        acc0, acc1, total, peak = _step(
            acc0, acc1, total, peak, q0, q1, q_scale, K, KScale, V, v_n, at, row, local, length,
            delta, D0, D1, DV, DV0, DV1, BN, CAUSAL, True,
        )  # fmt: skip
    dead = total == 0.0
    total = tl.where(dead, 1.0, total)
    store_block(Out, local, o_n, acc0 / total[:, None], row_mask, 0, DV0, DV)
    if DV1 > 0:
        store_block(Out, local, o_n, acc1 / total[:, None], row_mask, DV0, DV1, DV)
    lse = tl.where(dead, -float("inf"), (peak + tl.log2(total)) * LN2)
    tl.store(Lse + outer * n + row + local, lse, mask=row_mask)
