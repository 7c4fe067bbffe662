"""Gradients of keys and values: one program per key tile, looping over the query tiles.

Scores are held transposed, `(keys, queries)`, so that the probabilities feed the second product
from registers. No atomics: a program owns its key tile, or a numbered slice of the queries of it
that a later sum adds up in fixed order.
"""

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportReturnType=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false, reportCallIssue=false
# Triton code only looks like Python: its compiler, not the type checker, knows these types.
from __future__ import annotations

import triton
import triton.language as tl

from polyzoo.attention.kernels.triton_device import (
    LOG2E,
    dropout_keep,
    load_block,
    locate,
    ordered,
    query_bounds,
    store_block,
    visible,
)
from polyzoo.attention.kernels.triton_relpos import grid_key, height_term, width_term


@triton.jit
def _query_step(
    dk0, dk1, dv0, dv1, k0, k1, v0, v1, j, laid_out, tile, key_tile,
    n, m, length, left, right, kh, sequence_head, scale, threshold, keep_scale,
    Q, DOut, Lse, Delta, q_n, do_n, Bias, bias_n, bias_m, Mask, mask_n, mask_m,
    RelH, RelW, rel_h_n, rel_w_n, Rng,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    DV: tl.constexpr, DV0: tl.constexpr, DV1: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_BIAS: tl.constexpr, NATURAL: tl.constexpr,
    KW: tl.constexpr, KWP: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr, CAREFUL: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add what one query tile gives to the gradients of the keys and values.

    CAREFUL multiplies the gradient of the scores as the sum of two halves, so that its rounding
    does not show in the result.
    """
    row = tile * BM
    local = tl.arange(0, BM)
    i = row + local
    row_mask = i < n
    row_at = tl.cast(row, tl.int64)
    q_base = Q + row_at * q_n
    do_base = DOut + row_at * do_n
    q0 = load_block(q_base, local, q_n, row_mask, 0, D0, D, MASKED)
    s = tl.dot(k0, tl.trans(q0), input_precision=PRECISION)
    q1 = q0
    if D1 > 0:
        q1 = load_block(q_base, local, q_n, row_mask, D0, D1, D, MASKED)
        s = tl.dot(k1, tl.trans(q1), s, input_precision=PRECISION)
    # +inf stands for rows past the end, rows that see nothing and rows whose bias is everywhere so
    # low that the sum of exponentials is lost in it: their probabilities are 0.
    if MASKED:
        lse = tl.load(Lse + row_at + local, mask=row_mask, other=float("inf"))
        delta = tl.load(Delta + row_at + local, mask=row_mask, other=0.0)
    else:
        lse = tl.load(Lse + row_at + local)
        delta = tl.load(Delta + row_at + local)
    lse = tl.where(lse < -1e30, float("inf"), lse)
    safe_rows = tl.minimum(i, n - 1)[None, :]
    if HAS_BIAS:
        safe_keys = tl.minimum(j, m - 1)[:, None].to(tl.int64)
        at = safe_rows.to(tl.int64) * bias_n + safe_keys * bias_m
        s = s * scale + tl.load(Bias + at).to(tl.float32)
    elif KW > 0:
        place = laid_out[:, None]
        s = s * scale + width_term(RelW, safe_rows, rel_w_n, place, KW, KWP, NATURAL)
        s += height_term(RelH, safe_rows, rel_h_n, place, key_tile, kh, BN, KWP, NATURAL)
    else:
        s = s * scale
    if NATURAL:
        p = tl.exp2((s - lse[None, :]) * LOG2E)
    else:
        p = tl.exp2(s - lse[None, :] * LOG2E)
    keep = (j < length)[:, None]
    if MASKED:
        keep = visible(i[None, :], j[:, None], length, length - n, left, right, HAS_LEFT, HAS_RIGHT)
        if HAS_MASK:
            safe_keys = tl.minimum(j, m - 1)[:, None].to(tl.int64)
            at = safe_rows.to(tl.int64) * mask_n + safe_keys * mask_m
            keep = keep & (tl.load(Mask + at) != 0)
        p = tl.where(keep, p, 0.0)
    do0 = load_block(do_base, local, do_n, row_mask, 0, DV0, DV, MASKED)
    dp = tl.dot(v0, tl.trans(do0), input_precision=PRECISION)
    do1 = do0
    if DV1 > 0:
        do1 = load_block(do_base, local, do_n, row_mask, DV0, DV1, DV, MASKED)
        dp = tl.dot(v1, tl.trans(do1), dp, input_precision=PRECISION)
    dropped = p
    if DROPOUT:
        kept = dropout_keep(Rng, i[None, :], j[:, None], sequence_head, threshold)
        dropped = tl.where(kept, p * keep_scale, 0.0)
        dp = tl.where(kept, dp * keep_scale, 0.0)
    dropped = dropped.to(Q.dtype.element_ty)
    dv0 = tl.dot(dropped, do0, dv0, input_precision=PRECISION)
    if DV1 > 0:
        dv1 = tl.dot(dropped, do1, dv1, input_precision=PRECISION)
    ds = p * (dp - delta[None, :])
    if MASKED:
        ds = tl.where(keep, ds, 0.0)
    high = ds.to(Q.dtype.element_ty)
    dk0 = tl.dot(high, q0, dk0, input_precision=PRECISION)
    if D1 > 0:
        dk1 = tl.dot(high, q1, dk1, input_precision=PRECISION)
    if CAREFUL:
        low = (ds - high.to(tl.float32)).to(Q.dtype.element_ty)
        dk0 = tl.dot(low, q0, dk0, input_precision=PRECISION)
        if D1 > 0:
            dk1 = tl.dot(low, q1, dk1, input_precision=PRECISION)
    return dk0, dk1, dv0, dv1


@triton.jit(
    do_not_specialize=[
        "q_b", "q_h", "q_n", "k_b", "k_h", "k_n", "v_b", "v_h", "v_n", "do_b", "do_h", "do_n",
        "dk_b", "dk_h", "dk_n", "dv_b", "dv_h", "dv_n", "lse_h",
        "bias_b", "bias_h", "bias_n", "bias_m", "mask_b", "mask_h", "mask_n", "mask_m",
        "rel_h_b", "rel_h_h", "rel_h_n", "rel_w_b", "rel_w_h", "rel_w_n",
        "list_b", "list_h", "list_t", "heads", "n", "m", "kh", "slots", "left", "right",
        "threshold", "parts", "dk_part", "dv_part",
    ]
)  # fmt: skip
def backward_kv_kernel(
    Q, K, V, DOut, Lse, Delta, DK, DV_, Bias, Mask, RelH, RelW, Index, Counts, KvLens, CuQ, CuK,
    Schedule, Rng,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, do_b, do_h, do_n,
    dk_b, dk_h, dk_n, dv_b, dv_h, dv_n, lse_h,
    bias_b, bias_h, bias_n, bias_m, mask_b, mask_h, mask_n, mask_m,
    rel_h_b, rel_h_h, rel_h_n, rel_w_b, rel_w_h, rel_w_n, list_b, list_h, list_t,
    heads, n, m, kh, slots, left, right, threshold, parts, dk_part, dv_part,
    scale, keep_scale, true_scale,
    GROUP: tl.constexpr, ALIGN: tl.constexpr,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    DV: tl.constexpr, DV0: tl.constexpr, DV1: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    KVLENS: tl.constexpr, PACKED: tl.constexpr, HAS_MASK: tl.constexpr,
    HAS_BIAS: tl.constexpr, NATURAL: tl.constexpr, KW: tl.constexpr, KWP: tl.constexpr,
    DROPOUT: tl.constexpr, EDGES: tl.constexpr, PRECISION: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    """Gradients of one key tile; `heads` counts key heads here."""
    key_tiles = tl.cdiv(kh, BN // KWP) if KW > 0 else tl.cdiv(m, BN)
    sequence, key_head, tile, q_start, k_start, n, length = locate(
        Schedule, CuQ, CuK, KvLens, slots, key_tiles, heads, n, m, PACKED, KVLENS, False
    )
    if sequence < 0:
        return
    part = tl.program_id(1)
    if PACKED:
        m = length
    batch = 0 if PACKED else sequence
    place = tl.cast(batch, tl.int64)
    key_at = tl.cast(key_head, tl.int64)
    q_n *= ALIGN
    k_n *= ALIGN
    v_n *= ALIGN
    do_n *= ALIGN
    column = tile * BN
    local = tl.arange(0, BN)
    laid_out = column + local
    k_first = tl.cast(k_start, tl.int64)
    K += (place * k_b + key_at * k_h) * ALIGN + k_first * k_n
    V += (place * v_b + key_at * v_h) * ALIGN + k_first * v_n
    # Our own outputs: every stride is a multiple of the head dimension, so of 8.
    part_at = tl.cast(part, tl.int64)
    DK += (part_at * dk_part + place * dk_b + key_at * dk_h + k_first * dk_n) * 8
    DV_ += (part_at * dv_part + place * dv_b + key_at * dv_h + k_first * dv_n) * 8
    dk_n *= 8
    dv_n *= 8
    if KW > 0:
        j = grid_key(laid_out, m, KW, KWP)
        written = (laid_out % KWP < KW) & (laid_out // KWP < kh)
    else:
        j = laid_out
        written = j < m
    offsets = j.to(tl.int64)
    live = j < length
    k0 = load_block(K, offsets, k_n, live, 0, D0, D, True)
    v0 = load_block(V, offsets, v_n, live, 0, DV0, DV, True)
    k1 = k0
    v1 = v0
    if D1 > 0:
        k1 = load_block(K, offsets, k_n, live, D0, D1, D, True)
    if DV1 > 0:
        v1 = load_block(V, offsets, v_n, live, DV0, DV1, DV, True)
    dk0 = tl.zeros([BN, D0], tl.float32)
    dk1 = tl.zeros([BN, D1 if D1 > 0 else 16], tl.float32)
    dv0 = tl.zeros([BN, DV0], tl.float32)
    dv1 = tl.zeros([BN, DV1 if DV1 > 0 else 16], tl.float32)

    list_row = 0
    tile_list = Index
    if KW > 0:
        full_lo = 0
        full_hi = 0 if EDGES else tl.cdiv(n, BM)
        edge_lo = 0
        edge_hi = tl.cdiv(n, BM)
    else:
        begin, end, full_begin, full_end = query_bounds(
            column, n, length, left, right, BN, HAS_LEFT, HAS_RIGHT
        )
        edge_lo, full_lo, full_hi, edge_hi = ordered(begin, end, full_begin, full_end, BM)
    for member in tl.range(0, GROUP):
        head = key_head * GROUP + member
        head_at = tl.cast(head, tl.int64)
        sequence_head = sequence * (heads * GROUP) + head
        q_first = tl.cast(q_start, tl.int64)
        q_base = Q + (place * q_b + head_at * q_h) * ALIGN + q_first * q_n
        do_base = DOut + (place * do_b + head_at * do_h) * ALIGN + q_first * do_n
        stat_at = (place * (heads * GROUP) + head) * lse_h + q_first
        bias_base = Bias
        mask_base = Mask
        rel_h_base = RelH
        rel_w_base = RelW
        if HAS_BIAS:
            bias_base += place * bias_b + head_at * bias_h
        if KW > 0:
            rel_h_base += place * rel_h_b + head_at * rel_h_h
            rel_w_base += place * rel_w_b + head_at * rel_w_h
        if HAS_MASK:
            mask_base += place * mask_b + head_at * mask_h
            if KW == 0:
                list_row = sequence * list_b + head * list_h + tile * list_t
                tile_list = Index + tl.cast(list_row, tl.int64) * tl.cdiv(n, BM)
                full_lo = 0
                full_hi = tl.load(Counts + 2 * list_row)
                edge_hi = full_hi + tl.load(Counts + 2 * list_row + 1)
                if HAS_LEFT or HAS_RIGHT or KVLENS:
                    full_hi = 0
                edge_lo = full_hi
        # This program's slice of the full and of the partial tiles.
        full_from = full_lo + (full_hi - full_lo) * part // parts
        full_to = full_lo + (full_hi - full_lo) * (part + 1) // parts
        for t in tl.range(full_from, full_to):
            at = t
            if HAS_MASK and KW == 0:
                at = tl.load(tile_list + t)
            dk0, dk1, dv0, dv1 = _query_step(
                dk0, dk1, dv0, dv1, k0, k1, v0, v1, j, laid_out, at, tile,
                n, m, length, left, right, kh, sequence_head, scale, threshold, keep_scale,
                q_base, do_base, Lse + stat_at, Delta + stat_at, q_n, do_n,
                bias_base, bias_n, bias_m, mask_base, mask_n, mask_m,
                rel_h_base, rel_w_base, rel_h_n, rel_w_n, Rng,
                D, D0, D1, DV, DV0, DV1, BM, BN, HAS_LEFT, HAS_RIGHT, HAS_MASK, HAS_BIAS, NATURAL,
                KW, KWP, DROPOUT, PRECISION, CAREFUL, False,
            )  # fmt: skip
        if EDGES:
            partial = edge_hi - edge_lo
            if not HAS_MASK and KW == 0:
                partial -= full_hi - full_lo
            edge_from = partial * part // parts
            edge_to = partial * (part + 1) // parts
            for t in tl.range(edge_from, edge_to):
                at = edge_lo + t
                if KW == 0:
                    if HAS_MASK:
                        at = tl.load(tile_list + at)
                    else:
                        at = tl.where(at >= full_lo, at + (full_hi - full_lo), at)
                dk0, dk1, dv0, dv1 = _query_step(
                    dk0, dk1, dv0, dv1, k0, k1, v0, v1, j, laid_out, at, tile,
                    n, m, length, left, right, kh, sequence_head, scale, threshold, keep_scale,
                    q_base, do_base, Lse + stat_at, Delta + stat_at, q_n, do_n,
                    bias_base, bias_n, bias_m, mask_base, mask_n, mask_m,
                    rel_h_base, rel_w_base, rel_h_n, rel_w_n, Rng,
                    D, D0, D1, DV, DV0, DV1, BM, BN, HAS_LEFT, HAS_RIGHT, HAS_MASK, HAS_BIAS,
                    NATURAL, KW, KWP, DROPOUT, PRECISION, CAREFUL, True,
                )  # fmt: skip

    # Rows of keys past the sequence's length hold garbage: they get zero gradients.
    dk0 = tl.where(live[:, None], dk0 * true_scale, 0.0)
    dv0 = tl.where(live[:, None], dv0, 0.0)
    store_block(DK, offsets, dk_n, dk0, written, 0, D0, D)
    store_block(DV_, offsets, dv_n, dv0, written, 0, DV0, DV)
    if D1 > 0:
        dk1 = tl.where(live[:, None], dk1 * true_scale, 0.0)
        store_block(DK, offsets, dk_n, dk1, written, D0, D1, D)
    if DV1 > 0:
        dv1 = tl.where(live[:, None], dv1, 0.0)
        store_block(DV_, offsets, dv_n, dv1, written, DV0, DV1, DV)
