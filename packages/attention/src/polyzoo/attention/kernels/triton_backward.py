"""Small kernels of the backward pass: row sums of dout * out, and the gradient of a dense bias."""

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportReturnType=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false, reportCallIssue=false
# Triton code only looks like Python: its compiler, not the type checker, knows these types.
from __future__ import annotations

import triton
import triton.language as tl

from polyzoo.attention.kernels.triton_device import LOG2E, dropout_keep, load_block, visible


@triton.jit(do_not_specialize=["o_b", "o_h", "o_n", "do_b", "do_h", "do_n", "heads", "n"])
def delta_kernel(
    Out, Low, DOut, Delta, o_b, o_h, o_n, do_b, do_h, do_n, heads, n,
    ALIGN: tl.constexpr, DV: tl.constexpr, DV0: tl.constexpr, DV1: tl.constexpr, BM: tl.constexpr,
    LOW: tl.constexpr,
):  # fmt: skip
    """Delta = rowsum(dout * (out + low)) in fp32, contiguous `(b, h, n)`."""
    tiles = tl.cdiv(n, BM)
    pid = tl.program_id(0)
    outer = pid // tiles
    row = tl.cast(pid % tiles * BM, tl.int64)
    local = tl.arange(0, BM)
    row_mask = row + local < n
    place = tl.cast(outer // heads, tl.int64)
    head = tl.cast(outer % heads, tl.int64)
    o_n *= ALIGN
    do_n *= ALIGN
    out_at = (place * o_b + head * o_h) * ALIGN + row * o_n
    Out += out_at
    if LOW:
        Low += out_at
    DOut += (place * do_b + head * do_h) * ALIGN + row * do_n
    o0 = load_block(Out, local, o_n, row_mask, 0, DV0, DV, True).to(tl.float32)
    if LOW:
        o0 += load_block(Low, local, o_n, row_mask, 0, DV0, DV, True).to(tl.float32)
    do0 = load_block(DOut, local, do_n, row_mask, 0, DV0, DV, True).to(tl.float32)
    delta = tl.sum(o0 * do0, 1)
    if DV1 > 0:
        o1 = load_block(Out, local, o_n, row_mask, DV0, DV1, DV, True).to(tl.float32)
        if LOW:
            o1 += load_block(Low, local, o_n, row_mask, DV0, DV1, DV, True).to(tl.float32)
        do1 = load_block(DOut, local, do_n, row_mask, DV0, DV1, DV, True).to(tl.float32)
        delta += tl.sum(o1 * do1, 1)
    tl.store(Delta + tl.cast(outer, tl.int64) * n + row + local, delta, mask=row_mask)


@triton.jit(
    do_not_specialize=[
        "q_b", "q_h", "q_n", "k_b", "k_h", "k_n", "v_b", "v_h", "v_n", "do_b", "do_h", "do_n",
        "bias_b", "bias_h", "bias_n", "bias_m", "mask_b", "mask_h", "mask_n", "mask_m",
        "batch", "heads", "n", "m", "rows_out", "columns_out", "batch_out", "heads_out",
        "left", "right", "threshold",
    ]
)  # fmt: skip
def backward_bias_kernel(
    Q, K, V, DOut, Lse, Delta, DBias, Bias, Mask, KvLens, Rng,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, do_b, do_h, do_n,
    bias_b, bias_h, bias_n, bias_m, mask_b, mask_h, mask_n, mask_m,
    batch, heads, n, m, batch_out, heads_out, rows_out, columns_out, left, right, threshold,
    scale, keep_scale,
    GROUP: tl.constexpr, ALIGN: tl.constexpr,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    DV: tl.constexpr, DV0: tl.constexpr, DV1: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    KVLENS: tl.constexpr, PACKED: tl.constexpr, HAS_MASK: tl.constexpr,
    HAS_BIAS: tl.constexpr, NATURAL: tl.constexpr, KW: tl.constexpr, KWP: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr, SUM_N: tl.constexpr,
):  # fmt: skip
    """Gradient of one tile of the bias, summed in fixed order over the axes it is broadcast on.

    SUM_N says that the bias has one row for all queries. One column for all keys never gets here:
    softmax does not see it, so its gradient is zero.
    """
    row_tiles = 1 if SUM_N else tl.cdiv(n, BM)
    column_tiles = tl.cdiv(m, BN)
    pid = tl.program_id(0)
    column_tile = pid % column_tiles
    row_tile = pid // column_tiles % row_tiles
    outer = pid // column_tiles // row_tiles
    out_head = outer % heads_out
    out_batch = outer // heads_out
    q_n *= ALIGN
    k_n *= ALIGN
    v_n *= ALIGN
    do_n *= ALIGN
    row_steps = tl.cdiv(n, BM) if SUM_N else 1
    head_steps = heads // heads_out
    batch_steps = batch // batch_out
    local_m = tl.arange(0, BM)
    local_n = tl.arange(0, BN)
    total = tl.zeros([BM, BN], tl.float32)
    for step in tl.range(0, batch_steps * head_steps * row_steps):
        b = out_batch + step // (head_steps * row_steps)
        h = out_head + step // row_steps % head_steps
        row = (row_tile + step % row_steps) * BM
        column = column_tile * BN
        place = tl.cast(b, tl.int64)
        head_at = tl.cast(h, tl.int64)
        key_at = tl.cast(h // GROUP, tl.int64)
        length = m
        if KVLENS:
            length = tl.minimum(tl.maximum(tl.load(KvLens + b).to(tl.int32), 0), m)
        i = row + local_m
        j = column + local_n
        row_mask = i < n
        row_at = tl.cast(row, tl.int64)
        column_at = tl.cast(column, tl.int64)
        keep = row_mask[:, None] & visible(
            i[:, None], j[None, :], length, length - n, left, right, HAS_LEFT, HAS_RIGHT
        )
        safe_rows = tl.minimum(i, n - 1)[:, None].to(tl.int64)
        safe_keys = tl.minimum(j, m - 1)[None, :].to(tl.int64)
        if HAS_MASK:
            mask_base = Mask + place * mask_b + head_at * mask_h
            keep = keep & (tl.load(mask_base + safe_rows * mask_n + safe_keys * mask_m) != 0)
        key_mask = tl.max(keep.to(tl.int32), 0) > 0
        q_base = Q + (place * q_b + head_at * q_h) * ALIGN + row_at * q_n
        do_base = DOut + (place * do_b + head_at * do_h) * ALIGN + row_at * do_n
        k_base = K + (place * k_b + key_at * k_h) * ALIGN + column_at * k_n
        v_base = V + (place * v_b + key_at * v_h) * ALIGN + column_at * v_n
        q0 = load_block(q_base, local_m, q_n, row_mask, 0, D0, D, True)
        k0 = load_block(k_base, local_n, k_n, key_mask, 0, D0, D, True)
        s = tl.dot(q0, tl.trans(k0), input_precision=PRECISION)
        if D1 > 0:
            q1 = load_block(q_base, local_m, q_n, row_mask, D0, D1, D, True)
            k1 = load_block(k_base, local_n, k_n, key_mask, D0, D1, D, True)
            s = tl.dot(q1, tl.trans(k1), s, input_precision=PRECISION)
        do0 = load_block(do_base, local_m, do_n, row_mask, 0, DV0, DV, True)
        v0 = load_block(v_base, local_n, v_n, key_mask, 0, DV0, DV, True)
        dp = tl.dot(do0, tl.trans(v0), input_precision=PRECISION)
        if DV1 > 0:
            do1 = load_block(do_base, local_m, do_n, row_mask, DV0, DV1, DV, True)
            v1 = load_block(v_base, local_n, v_n, key_mask, DV0, DV1, DV, True)
            dp = tl.dot(do1, tl.trans(v1), dp, input_precision=PRECISION)
        stat_at = (place * heads + h) * n + row_at
        lse = tl.load(Lse + stat_at + local_m, mask=row_mask, other=float("inf"))
        lse = tl.where(lse < -1e30, float("inf"), lse)
        delta = tl.load(Delta + stat_at + local_m, mask=row_mask, other=0.0)
        bias_base = Bias + place * bias_b + head_at * bias_h
        bias = tl.load(bias_base + safe_rows * bias_n + safe_keys * bias_m).to(tl.float32)
        p = tl.exp2((s * scale + bias - lse[:, None]) * LOG2E)
        if DROPOUT:
            kept = dropout_keep(Rng, i[:, None], j[None, :], b * heads + h, threshold)
            dp = tl.where(kept, dp * keep_scale, 0.0)
        total += tl.where(keep, p * (dp - delta[:, None]), 0.0)

    out = DBias + tl.cast(outer, tl.int64) * rows_out * columns_out
    i = row_tile * BM + local_m
    j = column_tile * BN + local_n
    if SUM_N:
        tl.store(out + j, tl.sum(total, 0).to(DBias.dtype.element_ty), mask=j < m)
    else:
        at = i.to(tl.int64)[:, None] * columns_out + j[None, :]
        mask = (i < n)[:, None] & (j < m)[None, :]
        tl.store(out + at, total.to(DBias.dtype.element_ty), mask=mask)
