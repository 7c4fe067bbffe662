"""Forward kernel for few keys: all of them stay on the chip while a program walks query tiles.

Cross-attention to text has thousands of queries and a hundred keys; a window of SAM has 196 of
each. Keys and values are read once, as up to three tiles of powers of two (196 = 128 + 64 + 16),
and the loop over query tiles is pipelined.
"""

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportReturnType=false
# pyright: reportPossiblyUnboundVariable=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false, reportCallIssue=false
# Triton code only looks like Python: its compiler, not the type checker, knows these types.
from __future__ import annotations

import triton
import triton.language as tl

from polyzoo.attention.kernels.triton_device import LN2, LOG2E, load_block, store_block
from polyzoo.attention.kernels.triton_relpos import grid_terms


@triton.jit
def _load_keys(
    K, V, Grid, k_n, v_n, length,
    START: tl.constexpr, BN: tl.constexpr, KG: tl.constexpr,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    DV: tl.constexpr, DV0: tl.constexpr, DV1: tl.constexpr,
):  # fmt: skip
    """Keys and values from START on, their places in the grid, and which of them there are."""
    j = START + tl.arange(0, BN)
    there = j < length
    k0 = load_block(K, j, k_n, there, 0, D0, D, True)
    v0 = load_block(V, j, v_n, there, 0, DV0, DV, True)
    k1 = k0
    v1 = v0
    grid = k0
    if D1 > 0:
        k1 = load_block(K, j, k_n, there, D0, D1, D, True)
    if DV1 > 0:
        v1 = load_block(V, j, v_n, there, DV0, DV1, DV, True)
    if KG > 0:
        grid = load_block(Grid, j, KG, there, 0, KG, KG, True)
    return k0, k1, v0, v1, grid, there


@triton.jit
def _attend(
    q0, q1, rel, k0, k1, v0, v1, grid, there, acc0, acc1, total, peak, scale,
    FIRST: tl.constexpr, D1: tl.constexpr, DV1: tl.constexpr, KG: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Add one key tile; the first one starts maximum, sum and accumulators."""
    if KG > 0:
        s = tl.dot(rel, tl.trans(grid), input_precision=PRECISION) * (LOG2E / scale)
        s = tl.dot(q0, tl.trans(k0), s, input_precision=PRECISION)
    else:
        s = tl.dot(q0, tl.trans(k0), input_precision=PRECISION)
    if D1 > 0:
        s = tl.dot(q1, tl.trans(k1), s, input_precision=PRECISION)
    s = tl.where(there[None, :], s * scale, -float("inf"))
    new_peak = tl.max(s, 1)
    if not FIRST:
        new_peak = tl.maximum(peak, new_peak)
    pivot = tl.where(new_peak == -float("inf"), 0.0, new_peak)
    p = tl.exp2(s - pivot[:, None])
    if FIRST:
        total = tl.sum(p, 1)
        p = p.to(v0.dtype)
        acc0 = tl.dot(p, v0, input_precision=PRECISION)
        if DV1 > 0:
            acc1 = tl.dot(p, v1, input_precision=PRECISION)
    else:
        decay = tl.exp2(peak - pivot)
        total = total * decay + tl.sum(p, 1)
        p = p.to(v0.dtype)
        acc0 = tl.dot(p, v0, acc0 * decay[:, None], input_precision=PRECISION)
        if DV1 > 0:
            acc1 = tl.dot(p, v1, acc1 * decay[:, None], input_precision=PRECISION)
    return acc0, acc1, total, new_peak


@triton.jit
def _walk(
    Q, K, V, Out, Low, Lse, RelH, RelW, Grid,
    q_n, k_n, v_n, o_n, rel_h_n, rel_w_n, n, kh, length, walk, walks, scale,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    DV: tl.constexpr, DV0: tl.constexpr, DV1: tl.constexpr,
    BM: tl.constexpr, B0: tl.constexpr, B1: tl.constexpr, B2: tl.constexpr,
    KG: tl.constexpr, GRID_WIDTH: tl.constexpr, LOW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Every `walks`-th query tile of a head over its first B0 + B1 + B2 keys."""
    ka0, ka1, va0, va1, grid_a, there_a = _load_keys(
        K, V, Grid, k_n, v_n, length, 0, B0, KG, D, D0, D1, DV, DV0, DV1
    )
    if B1 > 0:
        kb0, kb1, vb0, vb1, grid_b, there_b = _load_keys(
            K, V, Grid, k_n, v_n, length, B0, B1, KG, D, D0, D1, DV, DV0, DV1
        )
    if B2 > 0:
        kc0, kc1, vc0, vc1, grid_c, there_c = _load_keys(
            K, V, Grid, k_n, v_n, length, B0 + B1, B2, KG, D, D0, D1, DV, DV0, DV1
        )
    local = tl.arange(0, BM)
    for tile in tl.range(walk, tl.cdiv(n, BM), walks):
        row = tl.cast(tile, tl.int64) * BM
        rows = tile * BM + local
        row_mask = rows < n
        q0 = load_block(Q + row * q_n, local, q_n, row_mask, 0, D0, D, True)
        q1 = q0
        if D1 > 0:
            q1 = load_block(Q + row * q_n, local, q_n, row_mask, D0, D1, D, True)
        rel = q0
        nowhere = row_mask
        if KG > 0:
            rel, nowhere = grid_terms(
                RelH, RelW, rows, row_mask, rel_h_n, rel_w_n, kh, GRID_WIDTH, KG
            )
        acc0, acc1, total, peak = _attend(
            q0, q1, rel, ka0, ka1, va0, va1, grid_a, there_a, 0.0, 0.0, 0.0, 0.0, scale,
            True, D1, DV1, KG, PRECISION,
        )  # fmt: skip
        if B1 > 0:
            acc0, acc1, total, peak = _attend(
                q0, q1, rel, kb0, kb1, vb0, vb1, grid_b, there_b, acc0, acc1, total, peak, scale,
                False, D1, DV1, KG, PRECISION,
            )  # fmt: skip
        if B2 > 0:
            acc0, acc1, total, peak = _attend(
                q0, q1, rel, kc0, kc1, vc0, vc1, grid_c, there_c, acc0, acc1, total, peak, scale,
                False, D1, DV1, KG, PRECISION,
            )  # fmt: skip
        dead = total == 0.0
        if KG > 0:
            dead = dead | nowhere
        total = tl.where(dead, 1.0, total)
        inverse = tl.where(dead, 0.0, 1.0 / total)[:, None]
        out0 = acc0 * inverse
        store_block(Out + row * o_n, local, o_n, out0, row_mask, 0, DV0, DV)
        if LOW:
            out0 -= out0.to(Out.dtype.element_ty).to(tl.float32)
            store_block(Low + row * o_n, local, o_n, out0, row_mask, 0, DV0, DV)
        if DV1 > 0:
            out1 = acc1 * inverse
            store_block(Out + row * o_n, local, o_n, out1, row_mask, DV0, DV1, DV)
            if LOW:
                out1 -= out1.to(Out.dtype.element_ty).to(tl.float32)
                store_block(Low + row * o_n, local, o_n, out1, row_mask, DV0, DV1, DV)
        lse = tl.where(dead, -float("inf"), (peak + tl.log2(total)) * LN2)
        tl.store(Lse + row + local, lse, mask=row_mask)


@triton.jit(
    do_not_specialize=[
        "q_b", "q_h", "q_n", "k_b", "k_h", "k_n", "v_b", "v_h", "v_n", "o_b", "o_h", "o_n",
        "rel_h_b", "rel_h_h", "rel_h_n", "rel_w_b", "rel_w_h", "rel_w_n",
        "heads", "n", "m", "kh", "walks",
    ]
)  # fmt: skip
def short_kernel(
    Q, K, V, Out, Low, Lse, KvLens, RelH, RelW, Grid,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, o_b, o_h, o_n,
    rel_h_b, rel_h_h, rel_h_n, rel_w_b, rel_w_h, rel_w_n,
    heads, n, m, kh, walks, scale,
    GROUP: tl.constexpr, ALIGN: tl.constexpr,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    DV: tl.constexpr, DV0: tl.constexpr, DV1: tl.constexpr,
    BM: tl.constexpr, B0: tl.constexpr, B1: tl.constexpr, B2: tl.constexpr,
    HALF: tl.constexpr, KVLENS: tl.constexpr, KG: tl.constexpr, GRID_WIDTH: tl.constexpr,
    LOW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One of `walks` programs of a head; takes every `walks`-th query tile. `scale` is log2."""
    pid = tl.program_id(0)
    walk = pid % walks
    head = pid // walks % heads
    b = pid // walks // heads
    place = tl.cast(b, tl.int64)
    head_at = tl.cast(head, tl.int64)
    key_at = tl.cast(head // GROUP, tl.int64)
    length = m
    if KVLENS:
        length = tl.minimum(tl.maximum(tl.load(KvLens + b).to(tl.int32), 0), m)
    q_n *= ALIGN
    k_n *= ALIGN
    v_n *= ALIGN
    o_n *= ALIGN
    Q += (place * q_b + head_at * q_h) * ALIGN
    K += (place * k_b + key_at * k_h) * ALIGN
    V += (place * v_b + key_at * v_h) * ALIGN
    out_at = (place * o_b + head_at * o_h) * ALIGN
    Out += out_at
    if LOW:
        Low += out_at
    if KG > 0:
        RelH += place * rel_h_b + head_at * rel_h_h
        RelW += place * rel_w_b + head_at * rel_w_h
    Lse += (place * heads + head) * n
    # Right padding: where the first HALF keys are all there are, the others cost nothing.
    if KVLENS and HALF > 0:
        if length <= HALF:
            _walk(
                Q, K, V, Out, Low, Lse, RelH, RelW, Grid,
                q_n, k_n, v_n, o_n, rel_h_n, rel_w_n, n, kh, length, walk, walks, scale,
                D, D0, D1, DV, DV0, DV1, BM, HALF, 0, 0, KG, GRID_WIDTH, LOW, PRECISION,
            )  # fmt: skip
        else:
            _walk(
                Q, K, V, Out, Low, Lse, RelH, RelW, Grid,
                q_n, k_n, v_n, o_n, rel_h_n, rel_w_n, n, kh, length, walk, walks, scale,
                D, D0, D1, DV, DV0, DV1, BM, B0, B1, B2, KG, GRID_WIDTH, LOW, PRECISION,
            )  # fmt: skip
    else:
        _walk(
            Q, K, V, Out, Low, Lse, RelH, RelW, Grid,
            q_n, k_n, v_n, o_n, rel_h_n, rel_w_n, n, kh, length, walk, walks, scale,
            D, D0, D1, DV, DV0, DV1, BM, B0, B1, B2, KG, GRID_WIDTH, LOW, PRECISION,
        )  # fmt: skip
