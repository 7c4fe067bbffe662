"""Few queries against many keys: the heads of a group share a tile, the keys are split.

A program holds all queries of one key head, `group * n` rows padded to 16 or more, and walks one
slice of the keys. `merge_kernel` joins the slices by their log-sum-exp, exactly.
"""

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportReturnType=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false, reportCallIssue=false
# Triton code only looks like Python: its compiler, not the type checker, knows these types.
from __future__ import annotations

import triton
import triton.language as tl

from polyzoo.attention.kernels.triton_device import LN2, LOG2E, load_block, visible


@triton.jit(
    do_not_specialize=[
        "q_b", "q_h", "q_n", "k_b", "k_h", "k_n", "v_b", "v_h", "v_n",
        "bias_b", "bias_h", "bias_n", "bias_m", "mask_b", "mask_h", "mask_n", "mask_m",
        "batch", "key_heads", "n", "m", "left", "right", "splits",
    ]
)  # fmt: skip
def decode_kernel(
    Q, K, V, Part, PartLse, Bias, Mask, KvLens,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n,
    bias_b, bias_h, bias_n, bias_m, mask_b, mask_h, mask_n, mask_m,
    batch, key_heads, n, m, left, right, splits, scale,
    GROUP: tl.constexpr, ALIGN: tl.constexpr,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    DV: tl.constexpr, DV0: tl.constexpr, DV1: tl.constexpr,
    ROWS: tl.constexpr, BN: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    KVLENS: tl.constexpr, HAS_MASK: tl.constexpr, HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Part is contiguous `(splits, b, h, n, dv)` fp32, PartLse `(splits, b, h, n)`."""
    pid = tl.program_id(0)
    part = pid % splits
    key_head = pid // splits % key_heads
    b = pid // splits // key_heads
    place = tl.cast(b, tl.int64)
    key_at = tl.cast(key_head, tl.int64)
    length = m
    if KVLENS:
        length = tl.minimum(tl.maximum(tl.load(KvLens + b).to(tl.int32), 0), m)
    row = tl.arange(0, ROWS)
    row_mask = row < GROUP * n
    i = tl.where(row_mask, row % n, 0)
    head = key_head * GROUP + tl.where(row_mask, row // n, 0)
    q_n *= ALIGN
    q_h *= ALIGN
    k_n *= ALIGN
    v_n *= ALIGN
    q_at = head.to(tl.int64) * q_h + i.to(tl.int64) * q_n
    Q += place * q_b * ALIGN
    K += (place * k_b + key_at * k_h) * ALIGN
    V += (place * v_b + key_at * v_h) * ALIGN
    q0 = load_block(Q, q_at, 1, row_mask, 0, D0, D, True)
    q1 = q0
    if D1 > 0:
        q1 = load_block(Q, q_at, 1, row_mask, D0, D1, D, True)
    bias_at = place * bias_b + head.to(tl.int64) * bias_h + i.to(tl.int64) * bias_n
    mask_at = place * mask_b + head.to(tl.int64) * mask_h + i.to(tl.int64) * mask_n

    delta = length - n
    begin = 0
    end = length
    if HAS_RIGHT:
        end = tl.minimum(length, length + right)
    if HAS_LEFT:
        begin = tl.maximum(0, delta - left)
    first = begin // BN
    stop = tl.maximum(first, tl.cdiv(end, BN))
    low = first + (stop - first) * part // splits
    high = first + (stop - first) * (part + 1) // splits

    acc0 = tl.zeros([ROWS, DV0], tl.float32)
    acc1 = tl.zeros([ROWS, DV1 if DV1 > 0 else 16], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    peak = tl.full([ROWS], -float("inf"), tl.float32)
    local = tl.arange(0, BN)
    for tile in tl.range(low, high):
        start = tile * BN
        j = start + local
        key_mask = (j >= begin) & (j < end)
        at = tl.cast(start, tl.int64)
        k0 = load_block(K + at * k_n, local, k_n, key_mask, 0, D0, D, True)
        s = tl.dot(q0, tl.trans(k0), input_precision=PRECISION)
        if D1 > 0:
            k1 = load_block(K + at * k_n, local, k_n, key_mask, D0, D1, D, True)
            s = tl.dot(q1, tl.trans(k1), s, input_precision=PRECISION)
        s = s * scale
        keep = visible(i[:, None], j[None, :], length, delta, left, right, HAS_LEFT, HAS_RIGHT)
        safe_keys = tl.minimum(j, m - 1).to(tl.int64)[None, :]
        if HAS_BIAS:
            s += tl.load(Bias + bias_at[:, None] + safe_keys * bias_m).to(tl.float32)
        if HAS_MASK:
            keep = keep & (tl.load(Mask + mask_at[:, None] + safe_keys * mask_m) != 0)
            key_mask = key_mask & (tl.max((keep & row_mask[:, None]).to(tl.int32), 0) > 0)
        s = tl.where(keep, s, -float("inf"))
        new_peak = tl.maximum(peak, tl.max(s, 1))
        pivot = tl.where(new_peak == -float("inf"), 0.0, new_peak)
        if HAS_BIAS:
            p = tl.exp2((s - pivot[:, None]) * LOG2E)
            decay = tl.exp2((peak - pivot) * LOG2E)
        else:
            p = tl.exp2(s - pivot[:, None])
            decay = tl.exp2(peak - pivot)
        total = total * decay + tl.sum(p, 1)
        peak = new_peak
        p = p.to(V.dtype.element_ty)
        v0 = load_block(V + at * v_n, local, v_n, key_mask, 0, DV0, DV, True)
        acc0 = tl.dot(p, v0, acc0 * decay[:, None], input_precision=PRECISION)
        if DV1 > 0:
            v1 = load_block(V + at * v_n, local, v_n, key_mask, DV0, DV1, DV, True)
            acc1 = tl.dot(p, v1, acc1 * decay[:, None], input_precision=PRECISION)

    dead = total == 0.0
    inverse = (1.0 / tl.where(dead, 1.0, total))[:, None]
    lse = tl.log2(tl.where(dead, 1.0, total)) * LN2
    lse += peak if HAS_BIAS else peak * LN2
    out_row = ((tl.cast(part, tl.int64) * batch + b) * (key_heads * GROUP) + head) * n + i
    tl.store(PartLse + out_row, tl.where(dead, -float("inf"), lse), mask=row_mask)
    columns = tl.arange(0, DV0)
    at0 = Part + out_row[:, None] * DV + columns[None, :]
    tl.store(at0, acc0 * inverse, mask=row_mask[:, None] & (columns < DV)[None, :])
    if DV1 > 0:
        columns1 = DV0 + tl.arange(0, DV1)
        at1 = Part + out_row[:, None] * DV + columns1[None, :]
        tl.store(at1, acc1 * inverse, mask=row_mask[:, None] & (columns1 < DV)[None, :])


@triton.jit(do_not_specialize=["o_b", "o_h", "o_n", "heads", "n", "rows", "splits"])
def merge_kernel(
    Part, PartLse, Out, Lse, o_b, o_h, o_n, heads, n, rows, splits,
    DV: tl.constexpr, DVP: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Join the slices of one query row; slices that saw nothing have lse -inf and weigh nothing."""
    row = tl.program_id(0)
    part = tl.arange(0, SPLITS)
    at = tl.cast(part, tl.int64) * rows + row
    lse = tl.load(PartLse + at, mask=part < splits, other=-float("inf"))
    peak = tl.max(lse, 0)
    pivot = tl.where(peak == -float("inf"), 0.0, peak)
    weight = tl.exp2((lse - pivot) * LOG2E)
    total = tl.sum(weight, 0)
    dead = total == 0.0
    column = tl.arange(0, DVP)
    pointers = Part + at[:, None] * DV + column[None, :]
    value = tl.load(pointers, mask=(part < splits)[:, None] & (column < DV)[None, :], other=0.0)
    merged = tl.sum(value * weight[:, None], 0) / tl.where(dead, 1.0, total)
    b = row // (heads * n)
    h = row // n % heads
    i = row % n
    base = (
        Out + tl.cast(b, tl.int64) * o_b + tl.cast(h, tl.int64) * o_h + tl.cast(i, tl.int64) * o_n
    )
    tl.store(base + column, merged.to(Out.dtype.element_ty), mask=column < DV)
    whole = tl.log2(tl.where(dead, 1.0, total)) * LN2 + pivot
    tl.store(Lse + row, tl.where(dead, -float("inf"), whole))
