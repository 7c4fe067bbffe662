"""Forward kernel for few keys: one tile holds them all, and a program walks many query tiles.

Cross-attention to text has thousands of queries and a hundred keys: keys and values stay on the
chip, no running maximum is needed, and the loop over query tiles is pipelined, so that the time is
that of reading the queries and writing the result.
"""

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportReturnType=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false, reportCallIssue=false
# Triton code only looks like Python: its compiler, not the type checker, knows these types.
from __future__ import annotations

import triton
import triton.language as tl

from polyzoo.attention.kernels.triton_device import LN2, load_block, store_block


@triton.jit
def _walk(
    Q, K, V, Out, Low, Lse, q_n, k_n, v_n, o_n, n, length, walk, walks, scale,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    DV: tl.constexpr, DV0: tl.constexpr, DV1: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, LOW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Every `walks`-th query tile of a head over its first BN keys, which stay on the chip."""
    j = tl.arange(0, BN)
    key_mask = j < length
    k0 = load_block(K, j, k_n, key_mask, 0, D0, D, True)
    v0 = load_block(V, j, v_n, key_mask, 0, DV0, DV, True)
    k1 = k0
    v1 = v0
    if D1 > 0:
        k1 = load_block(K, j, k_n, key_mask, D0, D1, D, True)
    if DV1 > 0:
        v1 = load_block(V, j, v_n, key_mask, DV0, DV1, DV, True)
    local = tl.arange(0, BM)
    for tile in tl.range(walk, tl.cdiv(n, BM), walks):
        row = tl.cast(tile, tl.int64) * BM
        row_mask = tile * BM + local < n
        q0 = load_block(Q + row * q_n, local, q_n, row_mask, 0, D0, D, True)
        s = tl.dot(q0, tl.trans(k0), input_precision=PRECISION)
        if D1 > 0:
            q1 = load_block(Q + row * q_n, local, q_n, row_mask, D0, D1, D, True)
            s = tl.dot(q1, tl.trans(k1), s, input_precision=PRECISION)
        s = tl.where(key_mask[None, :], s * scale, -float("inf"))
        peak = tl.max(s, 1)
        pivot = tl.where(peak == -float("inf"), 0.0, peak)
        p = tl.exp2(s - pivot[:, None])
        total = tl.sum(p, 1)
        dead = total == 0.0
        total = tl.where(dead, 1.0, total)
        inverse = (1.0 / total)[:, None]
        p = p.to(V.dtype.element_ty)
        out0 = tl.dot(p, v0, input_precision=PRECISION) * inverse
        store_block(Out + row * o_n, local, o_n, out0, row_mask, 0, DV0, DV)
        if LOW:
            out0 -= out0.to(Out.dtype.element_ty).to(tl.float32)
            store_block(Low + row * o_n, local, o_n, out0, row_mask, 0, DV0, DV)
        if DV1 > 0:
            out1 = tl.dot(p, v1, input_precision=PRECISION) * inverse
            store_block(Out + row * o_n, local, o_n, out1, row_mask, DV0, DV1, DV)
            if LOW:
                out1 -= out1.to(Out.dtype.element_ty).to(tl.float32)
                store_block(Low + row * o_n, local, o_n, out1, row_mask, DV0, DV1, DV)
        lse = tl.where(dead, -float("inf"), (peak + tl.log2(total)) * LN2)
        tl.store(Lse + row + local, lse, mask=row_mask)


@triton.jit(
    do_not_specialize=[
        "q_b", "q_h", "q_n", "k_b", "k_h", "k_n", "v_b", "v_h", "v_n", "o_b", "o_h", "o_n",
        "heads", "n", "m", "walks",
    ]
)  # fmt: skip
def short_kernel(
    Q, K, V, Out, Low, Lse, KvLens,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, o_b, o_h, o_n,
    heads, n, m, walks, scale,
    GROUP: tl.constexpr, ALIGN: tl.constexpr,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    DV: tl.constexpr, DV0: tl.constexpr, DV1: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, KVLENS: tl.constexpr, LOW: tl.constexpr,
    PRECISION: tl.constexpr,
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
    Lse += (place * heads + head) * n
    # Right padding: where half of the keys are enough, half of the work is.
    if KVLENS and BN > 32:
        if length <= BN // 2:
            _walk(
                Q, K, V, Out, Low, Lse, q_n, k_n, v_n, o_n, n, length, walk, walks, scale,
                D, D0, D1, DV, DV0, DV1, BM, BN // 2, LOW, PRECISION,
            )  # fmt: skip
        else:
            _walk(
                Q, K, V, Out, Low, Lse, q_n, k_n, v_n, o_n, n, length, walk, walks, scale,
                D, D0, D1, DV, DV0, DV1, BM, BN, LOW, PRECISION,
            )  # fmt: skip
    else:
        _walk(
            Q, K, V, Out, Low, Lse, q_n, k_n, v_n, o_n, n, length, walk, walks, scale,
            D, D0, D1, DV, DV0, DV1, BM, BN, LOW, PRECISION,
        )  # fmt: skip
