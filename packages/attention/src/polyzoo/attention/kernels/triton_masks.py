"""Which tiles of a dense mask hold anything, and which need no mask code."""

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportReturnType=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false, reportCallIssue=false
# Triton code only looks like Python: its compiler, not the type checker, knows these types.
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["s_b", "s_h", "s_n", "s_m", "heads", "n", "m"])
def classify_kernel(
    Mask, State, s_b, s_h, s_n, s_m, heads, n, m, BM: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    """State of a tile: 0 empty, 1 full, 2 partial; tiles over the edge are never full."""
    rows = tl.cdiv(n, BM)
    columns = tl.cdiv(m, BN)
    pid = tl.program_id(0)
    column = pid % columns
    row = pid // columns % rows
    outer = pid // columns // rows
    i = row * BM + tl.arange(0, BM)
    j = column * BN + tl.arange(0, BN)
    base = Mask + tl.cast(outer // heads, tl.int64) * s_b + tl.cast(outer % heads, tl.int64) * s_h
    at = i.to(tl.int64)[:, None] * s_n + j.to(tl.int64)[None, :] * s_m
    inside = (i < n)[:, None] & (j < m)[None, :]
    seen = tl.load(base + at, mask=inside, other=0).to(tl.int32)
    count = tl.sum(tl.sum((seen != 0).to(tl.int32), 1), 0)
    state = tl.where(count == 0, 0, tl.where(count == BM * BN, 1, 2))
    tl.store(State + pid, state.to(tl.int8))
