"""Forward kernel: one program per query tile and head, full key tiles first, then the edges."""

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportReturnType=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false, reportCallIssue=false
# Triton code only looks like Python: its compiler, not the type checker, knows these types.
from __future__ import annotations

import triton
import triton.language as tl

from polyzoo.attention.kernels.triton_device import (
    LN2,
    LOG2E,
    dropout_keep,
    edge_tile,
    load_block,
    locate,
    store_block,
    tile_plan,
    visible,
)
from polyzoo.attention.kernels.triton_relpos import grid_key, grid_terms, height_term, width_term


@triton.jit
def _key_step(
    acc0, acc1, total, peak, q0, q1, rows, width, rel, tile,
    n, m, length, left, right, begin, end, kh, batch, key_head, k_start, sequence_head,
    scale, threshold, K, V, k_n, v_n, KD0, KD1, VD0, VD1,
    Bias, bias_n, bias_m, Mask, mask_n, mask_m, RelH, rel_h_n, Grid, Rng,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    DV: tl.constexpr, DV0: tl.constexpr, DV1: tl.constexpr,
    BN: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_MASK: tl.constexpr,
    HAS_BIAS: tl.constexpr, NATURAL: tl.constexpr, KW: tl.constexpr, KWP: tl.constexpr,
    KG: tl.constexpr, DROPOUT: tl.constexpr,
    RAW: tl.constexpr, TMA: tl.constexpr, LOW: tl.constexpr, PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Add one key tile to the running maximum, sum and accumulators."""
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
    if KG > 0:
        grid_base = Grid + tl.cast(start, tl.int64) * KG
        place_of_keys = load_block(grid_base, local, KG, key_mask, 0, KG, KG, MASKED)
        s = tl.dot(rel, tl.trans(place_of_keys), input_precision=PRECISION) * (LOG2E / scale)
    else:
        s = tl.zeros([rows.shape[0], BN], tl.float32)
    if TMA and not MASKED:
        k0 = KD0.load([batch, key_head, k_start + start, 0]).reshape(BN, D0)
        s = tl.dot(q0, tl.trans(k0), s, input_precision=PRECISION)
        if D1 > 0:
            k1 = KD1.load([batch, key_head, k_start + start, D0]).reshape(BN, D1)
            s = tl.dot(q1, tl.trans(k1), s, input_precision=PRECISION)
    else:
        k0 = load_block(k_base, offsets, k_n, key_mask, 0, D0, D, MASKED)
        s = tl.dot(q0, tl.trans(k0), s, input_precision=PRECISION)
        if D1 > 0:
            k1 = load_block(k_base, offsets, k_n, key_mask, D0, D1, D, MASKED)
            s = tl.dot(q1, tl.trans(k1), s, input_precision=PRECISION)
    if not RAW:
        s = s * scale
    safe_rows = tl.minimum(rows, n - 1)
    if KW > 0:
        place = (start + local)[None, :]
        s += width + height_term(
            RelH, safe_rows[:, None], rel_h_n, place, tile, kh, BN, KWP, NATURAL
        )
    if HAS_BIAS:
        safe_keys = tl.minimum(j, m - 1)[None, :].to(tl.int64)
        row_at = safe_rows[:, None].to(tl.int64) * bias_n
        s += tl.load(Bias + row_at + safe_keys * bias_m).to(tl.float32)
    if MASKED:
        keep = visible(
            rows[:, None], j[None, :], length, length - n, left, right, HAS_LEFT, HAS_RIGHT
        )
        if HAS_MASK:
            safe_keys = tl.minimum(j, m - 1)[None, :].to(tl.int64)
            row_at = safe_rows[:, None].to(tl.int64) * mask_n
            keep = keep & (tl.load(Mask + row_at + safe_keys * mask_m) != 0)
            # A key no row of the tile sees must not leak an inf or NaN of its value row.
            key_mask = key_mask & (tl.max(keep.to(tl.int32), 0) > 0)
        s = tl.where(keep, s, -float("inf"))
    if RAW and not LOW:
        # s is unscaled here: the scale is folded into the exponent's multiply-add.
        new_peak = tl.maximum(peak, tl.max(s, 1) * scale)
        pivot = new_peak
        if MASKED:
            pivot = tl.where(new_peak == -float("inf"), 0.0, new_peak)
        p = tl.exp2(s * scale - pivot[:, None])
        decay = tl.exp2(peak - pivot)
    elif RAW:
        # A multiply-add would leave the largest probability beside 1 by the rounding of its score;
        # the backward pass would see that in the last bits of the output. `peak` is unscaled.
        new_peak = tl.maximum(peak, tl.max(s, 1))
        pivot = tl.where(new_peak == -float("inf"), 0.0, new_peak)
        p = tl.exp2((s - pivot[:, None]) * scale)
        decay = tl.exp2((peak - pivot) * scale)
    else:
        new_peak = tl.maximum(peak, tl.max(s, 1))
        pivot = tl.where(new_peak == -float("inf"), 0.0, new_peak)
        if NATURAL:
            # Natural units: a bias of finfo.min times log2(e) would overflow.
            p = tl.exp2((s - pivot[:, None]) * LOG2E)
            decay = tl.exp2((peak - pivot) * LOG2E)
        else:
            p = tl.exp2(s - pivot[:, None])
            decay = tl.exp2(peak - pivot)
    total = total * decay + tl.sum(p, 1)
    if DROPOUT:
        kept = dropout_keep(Rng, rows[:, None], j[None, :], sequence_head, threshold)
        p = tl.where(kept, p, 0.0)
    p = p.to(V.dtype.element_ty)
    acc0 = acc0 * decay[:, None]
    if DV1 > 0:
        acc1 = acc1 * decay[:, None]
    if TMA and not MASKED:
        v0 = VD0.load([batch, key_head, k_start + start, 0]).reshape(BN, DV0)
        acc0 = tl.dot(p, v0, acc0, input_precision=PRECISION)
        if DV1 > 0:
            v1 = VD1.load([batch, key_head, k_start + start, DV0]).reshape(BN, DV1)
            acc1 = tl.dot(p, v1, acc1, input_precision=PRECISION)
    else:
        v0 = load_block(v_base, offsets, v_n, key_mask, 0, DV0, DV, MASKED)
        acc0 = tl.dot(p, v0, acc0, input_precision=PRECISION)
        if DV1 > 0:
            v1 = load_block(v_base, offsets, v_n, key_mask, DV0, DV1, DV, MASKED)
            acc1 = tl.dot(p, v1, acc1, input_precision=PRECISION)
    return acc0, acc1, total, new_peak


@triton.jit(
    do_not_specialize=[
        "q_b", "q_h", "q_n", "k_b", "k_h", "k_n", "v_b", "v_h", "v_n", "o_b", "o_h", "o_n", "lse_h",
        "bias_b", "bias_h", "bias_n", "bias_m", "mask_b", "mask_h", "mask_n", "mask_m",
        "rel_h_b", "rel_h_h", "rel_h_n", "rel_w_b", "rel_w_h", "rel_w_n",
        "list_b", "list_h", "list_t", "heads", "n", "m", "kh", "slots", "left", "right",
        "threshold",
    ]
)  # fmt: skip
def forward_kernel(
    Q, K, V, Out, Low, Lse, Bias, Mask, RelH, RelW, Index, Counts, KvLens, CuQ, CuK, Schedule, Rng,
    KD0, KD1, VD0, VD1, Grid,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, o_b, o_h, o_n, lse_h,
    bias_b, bias_h, bias_n, bias_m, mask_b, mask_h, mask_n, mask_m,
    rel_h_b, rel_h_h, rel_h_n, rel_w_b, rel_w_h, rel_w_n, list_b, list_h, list_t,
    heads, n, m, kh, slots, left, right, threshold, scale, keep_scale,
    GROUP: tl.constexpr, ALIGN: tl.constexpr,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    DV: tl.constexpr, DV0: tl.constexpr, DV1: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    KVLENS: tl.constexpr, PACKED: tl.constexpr, HAS_MASK: tl.constexpr,
    HAS_BIAS: tl.constexpr, NATURAL: tl.constexpr, KW: tl.constexpr, KWP: tl.constexpr,
    KG: tl.constexpr, GRID_WIDTH: tl.constexpr, DROPOUT: tl.constexpr,
    EDGES: tl.constexpr, RAW: tl.constexpr, TMA: tl.constexpr, LOW: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Attention of one query tile; `launch.py` says what the arguments are."""
    sequence, head, tile, q_start, k_start, n, length = locate(
        Schedule, CuQ, CuK, KvLens, slots, tl.cdiv(n, BM), heads, n, m, PACKED, KVLENS, HAS_RIGHT
    )
    if sequence < 0:
        return
    batch = 0 if PACKED else sequence
    place = tl.cast(batch, tl.int64)
    key_head = head // GROUP
    head_at = tl.cast(head, tl.int64)
    key_at = tl.cast(key_head, tl.int64)
    row = tile * BM
    local = tl.arange(0, BM)
    rows = row + local
    row_mask = rows < n
    row_at = tl.cast(q_start, tl.int64) + row
    q_n *= ALIGN
    k_n *= ALIGN
    v_n *= ALIGN
    o_n *= ALIGN
    Q += (place * q_b + head_at * q_h) * ALIGN + row_at * q_n
    K += (place * k_b + key_at * k_h) * ALIGN + tl.cast(k_start, tl.int64) * k_n
    V += (place * v_b + key_at * v_h) * ALIGN + tl.cast(k_start, tl.int64) * v_n
    out_at = (place * o_b + head_at * o_h) * ALIGN + row_at * o_n
    Out += out_at
    Lse += (place * heads + head) * lse_h + row_at
    if HAS_BIAS:
        Bias += place * bias_b + head_at * bias_h
    if HAS_MASK:
        Mask += place * mask_b + head_at * mask_h
    width = 0.0
    if KW > 0:
        RelH += place * rel_h_b + head_at * rel_h_h
        RelW += place * rel_w_b + head_at * rel_w_h
        safe_rows = tl.minimum(rows, n - 1)
        x = tl.arange(0, BN)[None, :]
        width = width_term(RelW, safe_rows[:, None], rel_w_n, x, KW, KWP, NATURAL)
    rel = 0.0
    nowhere = rows < 0
    if KG > 0:
        RelH += place * rel_h_b + head_at * rel_h_h
        RelW += place * rel_w_b + head_at * rel_w_h
        rel, nowhere = grid_terms(RelH, RelW, rows, row_mask, rel_h_n, rel_w_n, kh, GRID_WIDTH, KG)

    list_row = sequence * list_b + head * list_h + tile * list_t
    tile_list = Index
    if HAS_MASK and KW == 0:
        tile_list += tl.cast(list_row, tl.int64) * tl.cdiv(m, BN)
    begin, end, full_lo, full_hi, edge_lo, edge_hi, split, jump = tile_plan(
        row, n, length, left, right, kh, Counts, list_row,
        BM, BN, HAS_LEFT, HAS_RIGHT, KVLENS, HAS_MASK, KW, KWP, EDGES,
    )  # fmt: skip

    q0 = load_block(Q, local, q_n, row_mask, 0, D0, D, True)
    q1 = q0
    if D1 > 0:
        q1 = load_block(Q, local, q_n, row_mask, D0, D1, D, True)
    acc0 = tl.zeros([BM, DV0], tl.float32)
    acc1 = tl.zeros([BM, DV1 if DV1 > 0 else 16], tl.float32)
    total = tl.zeros([BM], tl.float32)
    peak = tl.full([BM], -float("inf"), tl.float32)
    sequence_head = sequence * heads + head
    for t in tl.range(full_lo, full_hi):
        at = t
        if HAS_MASK and KW == 0:
            at = tl.load(tile_list + t)
        acc0, acc1, total, peak = _key_step(
            acc0, acc1, total, peak, q0, q1, rows, width, rel, at,
            n, m, length, left, right, begin, end, kh, batch, key_head, k_start, sequence_head,
            scale, threshold, K, V, k_n, v_n, KD0, KD1, VD0, VD1,
            Bias, bias_n, bias_m, Mask, mask_n, mask_m, RelH, rel_h_n, Grid, Rng,
            D, D0, D1, DV, DV0, DV1, BN, HAS_LEFT, HAS_RIGHT, HAS_MASK, HAS_BIAS, NATURAL, KW, KWP,
            KG, DROPOUT, RAW, TMA, LOW, PRECISION, False,
        )  # fmt: skip
    if EDGES:
        for t in tl.range(edge_lo, edge_hi):
            at = edge_tile(t, split, jump, tile_list, HAS_LEFT, HAS_MASK, KW)
            acc0, acc1, total, peak = _key_step(
                acc0, acc1, total, peak, q0, q1, rows, width, rel, at,
                n, m, length, left, right, begin, end, kh, batch, key_head, k_start, sequence_head,
                scale, threshold, K, V, k_n, v_n, KD0, KD1, VD0, VD1,
                Bias, bias_n, bias_m, Mask, mask_n, mask_m, RelH, rel_h_n, Grid, Rng,
                D, D0, D1, DV, DV0, DV1, BN, HAS_LEFT, HAS_RIGHT, HAS_MASK, HAS_BIAS, NATURAL,
                KW, KWP, KG, DROPOUT, RAW, TMA, LOW, PRECISION, True,
            )  # fmt: skip

    dead = total == 0.0
    inverse = keep_scale / tl.where(dead, 1.0, total)
    if KG > 0:
        dead = dead | nowhere
        inverse = tl.where(dead, 0.0, inverse)
    acc0 = acc0 * inverse[:, None]
    store_block(Out, local, o_n, acc0, row_mask, 0, DV0, DV)
    if DV1 > 0:
        acc1 = acc1 * inverse[:, None]
        store_block(Out, local, o_n, acc1, row_mask, DV0, DV1, DV)
    if LOW:
        # What rounding took away, for the backward pass.
        Low += out_at
        acc0 -= acc0.to(Out.dtype.element_ty).to(tl.float32)
        store_block(Low, local, o_n, acc0, row_mask, 0, DV0, DV)
        if DV1 > 0:
            acc1 -= acc1.to(Out.dtype.element_ty).to(tl.float32)
            store_block(Low, local, o_n, acc1, row_mask, DV0, DV1, DV)
    lse = tl.log2(tl.where(dead, 1.0, total)) * LN2
    if RAW and LOW:
        peak = peak * scale
    lse += peak if NATURAL else peak * LN2
    tl.store(Lse + local, tl.where(dead, -float("inf"), lse), mask=row_mask)
