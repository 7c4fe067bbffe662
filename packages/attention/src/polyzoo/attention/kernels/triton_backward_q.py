"""Gradients of the queries and of a relative position: one program per query tile."""

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportReturnType=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false, reportCallIssue=false
# Triton code only looks like Python: its compiler, not the type checker, knows these types.
from __future__ import annotations

import triton
import triton.language as tl

from polyzoo.attention.kernels.triton_device import (
    LOG2E,
    dropout_keep,
    edge_tile,
    load_block,
    locate,
    store_block,
    tile_plan,
    visible,
)
from polyzoo.attention.kernels.triton_relpos import grid_key, height_term, width_term


@triton.jit
def _key_step(
    dq0, dq1, dwidth, q0, q1, do0, do1, rows, row_mask, lse, delta, width, tile,
    n, m, length, left, right, begin, end, kh, sequence_head, scale, threshold, keep_scale,
    K, V, k_n, v_n, Bias, bias_n, bias_m, Mask, mask_n, mask_m, RelH, rel_h_n, DRelH, Rng,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    DV: tl.constexpr, DV0: tl.constexpr, DV1: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_BIAS: tl.constexpr, NATURAL: tl.constexpr,
    KW: tl.constexpr, KWP: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr, CAREFUL: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add what one key tile gives to the gradients of the queries; CAREFUL as for the keys."""
    start = tile * BN
    local = tl.arange(0, BN)
    k_base = K
    v_base = V
    if KW > 0:
        j = grid_key(start + local, m, KW, KWP)
        offsets = j.to(tl.int64)
    else:
        j = start + local
        offsets = local
        k_base += tl.cast(start, tl.int64) * k_n
        v_base += tl.cast(start, tl.int64) * v_n
    key_mask = (j >= begin) & (j < end)
    keep = row_mask[:, None]
    if MASKED:
        keep = visible(
            rows[:, None], j[None, :], length, length - n, left, right, HAS_LEFT, HAS_RIGHT
        )
        if HAS_MASK:
            safe_keys = tl.minimum(j, m - 1)[None, :].to(tl.int64)
            row_at = tl.minimum(rows, n - 1)[:, None].to(tl.int64) * mask_n
            keep = keep & (tl.load(Mask + row_at + safe_keys * mask_m) != 0)
            key_mask = key_mask & (tl.max(keep.to(tl.int32), 0) > 0)
    k0 = load_block(k_base, offsets, k_n, key_mask, 0, D0, D, MASKED)
    s = tl.dot(q0, tl.trans(k0), input_precision=PRECISION)
    k1 = k0
    if D1 > 0:
        k1 = load_block(k_base, offsets, k_n, key_mask, D0, D1, D, MASKED)
        s = tl.dot(q1, tl.trans(k1), s, input_precision=PRECISION)
    safe_rows = tl.minimum(rows, n - 1)
    if HAS_BIAS:
        safe_keys = tl.minimum(j, m - 1)[None, :].to(tl.int64)
        row_at = safe_rows[:, None].to(tl.int64) * bias_n
        s = s * scale + tl.load(Bias + row_at + safe_keys * bias_m).to(tl.float32)
    elif KW > 0:
        place = (start + local)[None, :]
        s = s * scale + width
        s += height_term(RelH, safe_rows[:, None], rel_h_n, place, tile, kh, BN, KWP, NATURAL)
    else:
        s = s * scale
    p = tl.exp2((s - lse[:, None]) * LOG2E) if NATURAL else tl.exp2(s - lse[:, None])
    v0 = load_block(v_base, offsets, v_n, key_mask, 0, DV0, DV, MASKED)
    dp = tl.dot(do0, tl.trans(v0), input_precision=PRECISION)
    if DV1 > 0:
        v1 = load_block(v_base, offsets, v_n, key_mask, DV0, DV1, DV, MASKED)
        dp = tl.dot(do1, tl.trans(v1), dp, input_precision=PRECISION)
    if DROPOUT:
        kept = dropout_keep(Rng, rows[:, None], j[None, :], sequence_head, threshold)
        dp = tl.where(kept, dp * keep_scale, 0.0)
    ds = p * (dp - delta[:, None])
    if MASKED:
        ds = tl.where(keep, ds, 0.0)
    if KW > 0:
        dwidth += ds
        if BN == KWP:
            tl.store(
                DRelH + safe_rows * kh + tile,
                tl.sum(ds, 1).to(DRelH.dtype.element_ty),
                mask=row_mask,
            )
        else:
            SPAN: tl.constexpr = BN // KWP
            y = tile * SPAN + tl.arange(0, SPAN)
            tl.store(
                DRelH + safe_rows[:, None] * kh + y[None, :],
                tl.sum(tl.reshape(ds, [BM, SPAN, KWP]), 2).to(DRelH.dtype.element_ty),
                mask=row_mask[:, None] & (y < kh)[None, :],
            )
    high = ds.to(K.dtype.element_ty)
    dq0 = tl.dot(high, k0, dq0, input_precision=PRECISION)
    if D1 > 0:
        dq1 = tl.dot(high, k1, dq1, input_precision=PRECISION)
    if CAREFUL:
        low = (ds - high.to(tl.float32)).to(K.dtype.element_ty)
        dq0 = tl.dot(low, k0, dq0, input_precision=PRECISION)
        if D1 > 0:
            dq1 = tl.dot(low, k1, dq1, input_precision=PRECISION)
    return dq0, dq1, dwidth


@triton.jit(
    do_not_specialize=[
        "q_b", "q_h", "q_n", "k_b", "k_h", "k_n", "v_b", "v_h", "v_n", "do_b", "do_h", "do_n",
        "dq_b", "dq_h", "dq_n", "lse_h",
        "bias_b", "bias_h", "bias_n", "bias_m", "mask_b", "mask_h", "mask_n", "mask_m",
        "rel_h_b", "rel_h_h", "rel_h_n", "rel_w_b", "rel_w_h", "rel_w_n",
        "list_b", "list_h", "list_t", "heads", "n", "m", "kh", "slots", "left", "right",
        "threshold",
    ]
)  # fmt: skip
def backward_q_kernel(
    Q, K, V, DOut, Lse, Delta, DQ, DRelH, DRelW, Bias, Mask, RelH, RelW, Index, Counts, KvLens,
    CuQ, CuK, Schedule, Rng,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, do_b, do_h, do_n, dq_b, dq_h, dq_n, lse_h,
    bias_b, bias_h, bias_n, bias_m, mask_b, mask_h, mask_n, mask_m,
    rel_h_b, rel_h_h, rel_h_n, rel_w_b, rel_w_h, rel_w_n, list_b, list_h, list_t,
    heads, n, m, kh, slots, left, right, threshold, scale, keep_scale, true_scale,
    GROUP: tl.constexpr, ALIGN: tl.constexpr,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    DV: tl.constexpr, DV0: tl.constexpr, DV1: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    KVLENS: tl.constexpr, PACKED: tl.constexpr, HAS_MASK: tl.constexpr,
    HAS_BIAS: tl.constexpr, NATURAL: tl.constexpr, KW: tl.constexpr, KWP: tl.constexpr,
    DROPOUT: tl.constexpr, EDGES: tl.constexpr, PRECISION: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    """Gradients of one query tile; DRelH and DRelW are contiguous `(b, h, n, kh or kw)`."""
    sequence, head, tile, q_start, k_start, n, length = locate(
        Schedule, CuQ, CuK, KvLens, slots, tl.cdiv(n, BM), heads, n, m, PACKED, KVLENS, HAS_RIGHT
    )
    if sequence < 0:
        return
    batch = 0 if PACKED else sequence
    place = tl.cast(batch, tl.int64)
    head_at = tl.cast(head, tl.int64)
    key_at = tl.cast(head // GROUP, tl.int64)
    row = tile * BM
    local = tl.arange(0, BM)
    rows = row + local
    row_mask = rows < n
    row_at = tl.cast(q_start, tl.int64) + row
    q_n *= ALIGN
    k_n *= ALIGN
    v_n *= ALIGN
    do_n *= ALIGN
    Q += (place * q_b + head_at * q_h) * ALIGN + row_at * q_n
    K += (place * k_b + key_at * k_h) * ALIGN + tl.cast(k_start, tl.int64) * k_n
    V += (place * v_b + key_at * v_h) * ALIGN + tl.cast(k_start, tl.int64) * v_n
    DOut += (place * do_b + head_at * do_h) * ALIGN + row_at * do_n
    DQ += (place * dq_b + head_at * dq_h + row_at * dq_n) * 8
    stat_at = (place * heads + head) * lse_h + row_at
    lse = tl.load(Lse + stat_at + local, mask=row_mask, other=float("inf"))
    lse = tl.where(lse < -1e30, float("inf"), lse)
    if not NATURAL:
        lse = lse * LOG2E
    delta = tl.load(Delta + stat_at + local, mask=row_mask, other=0.0)
    if HAS_BIAS:
        Bias += place * bias_b + head_at * bias_h
    if HAS_MASK:
        Mask += place * mask_b + head_at * mask_h
    width = 0.0
    dwidth = 0.0
    if KW > 0:
        RelH += place * rel_h_b + head_at * rel_h_h
        RelW += place * rel_w_b + head_at * rel_w_h
        DRelH += (place * heads + head) * n * kh
        DRelW += (place * heads + head) * n * KW
        safe_rows = tl.minimum(rows, n - 1)
        x = tl.arange(0, BN)[None, :]
        width = width_term(RelW, safe_rows[:, None], rel_w_n, x, KW, KWP, NATURAL)
        dwidth = tl.zeros([BM, BN], tl.float32)
    list_row = sequence * list_b + head * list_h + tile * list_t
    tile_list = Index
    if HAS_MASK and KW == 0:
        tile_list += tl.cast(list_row, tl.int64) * tl.cdiv(m, BN)
    begin, end, full_lo, full_hi, edge_lo, edge_hi, split, jump = tile_plan(
        row, n, length, left, right, kh, Counts, list_row,
        BM, BN, HAS_LEFT, HAS_RIGHT, KVLENS, HAS_MASK, KW, KWP, EDGES,
    )  # fmt: skip
    q0 = load_block(Q, local, q_n, row_mask, 0, D0, D, True)
    do0 = load_block(DOut, local, do_n, row_mask, 0, DV0, DV, True)
    q1 = q0
    do1 = do0
    if D1 > 0:
        q1 = load_block(Q, local, q_n, row_mask, D0, D1, D, True)
    if DV1 > 0:
        do1 = load_block(DOut, local, do_n, row_mask, DV0, DV1, DV, True)
    dq0 = tl.zeros([BM, D0], tl.float32)
    dq1 = tl.zeros([BM, D1 if D1 > 0 else 16], tl.float32)
    sequence_head = sequence * heads + head
    for t in tl.range(full_lo, full_hi):
        at = t
        if HAS_MASK and KW == 0:
            at = tl.load(tile_list + t)
        dq0, dq1, dwidth = _key_step(
            dq0, dq1, dwidth, q0, q1, do0, do1, rows, row_mask, lse, delta, width, at,
            n, m, length, left, right, begin, end, kh, sequence_head, scale, threshold,
            keep_scale, K, V, k_n, v_n, Bias, bias_n, bias_m, Mask, mask_n, mask_m,
            RelH, rel_h_n, DRelH, Rng, D, D0, D1, DV, DV0, DV1, BM, BN, HAS_LEFT, HAS_RIGHT,
            HAS_MASK, HAS_BIAS, NATURAL, KW, KWP, DROPOUT, PRECISION, CAREFUL, False,
        )  # fmt: skip
    if EDGES:
        for t in tl.range(edge_lo, edge_hi):
            at = edge_tile(t, split, jump, tile_list, HAS_LEFT, HAS_MASK, KW)
            dq0, dq1, dwidth = _key_step(
                dq0, dq1, dwidth, q0, q1, do0, do1, rows, row_mask, lse, delta, width, at,
                n, m, length, left, right, begin, end, kh, sequence_head, scale, threshold,
                keep_scale, K, V, k_n, v_n, Bias, bias_n, bias_m, Mask, mask_n, mask_m,
                RelH, rel_h_n, DRelH, Rng, D, D0, D1, DV, DV0, DV1, BM, BN, HAS_LEFT, HAS_RIGHT,
                HAS_MASK, HAS_BIAS, NATURAL, KW, KWP, DROPOUT, PRECISION, CAREFUL, True,
            )  # fmt: skip
    store_block(DQ, local, dq_n * 8, dq0 * true_scale, row_mask, 0, D0, D)
    if D1 > 0:
        store_block(DQ, local, dq_n * 8, dq1 * true_scale, row_mask, D0, D1, D)
    if KW > 0:
        safe_rows = tl.minimum(rows, n - 1)
        columns = tl.arange(0, KWP)
        if BN != KWP:
            dwidth = tl.sum(tl.reshape(dwidth, [BM, BN // KWP, KWP]), 1)
        tl.store(
            DRelW + safe_rows[:, None] * KW + columns[None, :],
            dwidth.to(DRelW.dtype.element_ty),
            mask=row_mask[:, None] & (columns < KW)[None, :],
        )
