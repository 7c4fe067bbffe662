"""Start the backward kernels: row sums, keys and values, queries, then a dense bias."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from polyzoo.attention.kernels.launch_backward_bias import bias_gradient
from polyzoo.attention.kernels.launch_backward_kv import keys_and_values
from polyzoo.attention.kernels.launch_backward_q import queries
from polyzoo.attention.kernels.problem import (
    Problem,
    alignment,
    heads_last,
    reads_whole,
    strides,
)
from polyzoo.attention.kernels.starts import Start, prepared
from polyzoo.attention.kernels.triton_backward import delta_kernel
from polyzoo.attention.kernels.tuning import TileConfig

_DELTA_ROWS = 64


@dataclass(frozen=True, eq=False, kw_only=True)
class Gradients:
    """What was asked for; the rest is None."""

    q: Tensor | None = None
    k: Tensor | None = None
    v: Tensor | None = None
    bias: Tensor | None = None
    rel_h: Tensor | None = None
    rel_w: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """Which gradients to compute; queries and relative position share a kernel, as k and v do."""

    q: bool = True
    kv: bool = True
    bias: bool = True


def backward(
    problem: Problem,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    *,
    wanted: Wanted | None = None,
    config_q: TileConfig | None = None,
    config_kv: TileConfig | None = None,
    parts: int | None = None,
    low: Tensor | None = None,
    careful: bool = True,
) -> Gradients:
    """Gradients of `sum(out * dout)`; the same bits in every run.

    Args:
        problem: The call.
        out: Its result.
        lse: Its log-sum-exp.
        dout: Gradient of the result.
        wanted: What to compute; everything if left out.
        config_q: Tile sizes of the pass over query tiles; looked up if left out.
        config_kv: Tile sizes of the pass over key tiles; looked up if left out.
        parts: Slices of the queries in the pass over key tiles; by the number of programs if left
            out.
        low: What rounding took away from `out`, if `forward` was asked to keep it.
        careful: Keep the gradient of the scores at twice the bits of the inputs, so that half
            precision gradients err by little more than their own rounding. One more product in
            each pass.
    """
    wanted = wanted or Wanted()
    problem = problem.aligned
    if not reads_whole(dout):
        dout = heads_last(dout, dout.shape[-1]).copy_(dout)
    if problem.queries * problem.keys * problem.batch * problem.heads == 0:
        return _zeros(problem, wanted)
    careful = careful and problem.q.dtype != torch.float32
    dq = dk = dv = dbias = drel_h = drel_w = None
    with torch.cuda.device_of(problem.q):
        delta = _row_sums(problem, out, low, dout)
        statistics = (dout, lse, delta)
        if wanted.kv:
            dk, dv = keys_and_values(problem, statistics, config_kv, parts, careful)
        if wanted.q:
            dq, drel_h, drel_w = queries(problem, statistics, config_q, careful)
        if wanted.bias and problem.bias is not None:
            dbias = bias_gradient(problem, problem.bias, statistics)
    return Gradients(q=dq, k=dk, v=dv, bias=dbias, rel_h=drel_h, rel_w=drel_w)


def _zeros(problem: Problem, wanted: Wanted) -> Gradients:
    def zeros(tensor: Tensor | None, asked: bool) -> Tensor | None:
        return tensor.new_zeros(tensor.shape) if asked and tensor is not None else None

    def zero_heads(tensor: Tensor, asked: bool) -> Tensor | None:
        return heads_last(tensor, tensor.shape[3]).zero_() if asked else None

    return Gradients(
        q=zero_heads(problem.q, wanted.q),
        k=zero_heads(problem.k, wanted.kv),
        v=zero_heads(problem.v, wanted.kv),
        bias=zeros(problem.bias, wanted.bias),
        rel_h=zeros(problem.rel_h, wanted.q),
        rel_w=zeros(problem.rel_w, wanted.q),
    )


def _row_sums(problem: Problem, out: Tensor, low: Tensor | None, dout: Tensor) -> Tensor:
    b, h, n, _ = out.shape
    delta = torch.empty((b, h, n), dtype=torch.float32, device=out.device)

    def build() -> Start:
        main = [strides(out, 3), strides(dout, 3)]
        align = alignment(main)
        return Start(
            delta_kernel,
            (-(-n // _DELTA_ROWS) * b * h, 1, 1),
            (*(stride // align for group in main for stride in group), h, n),
            {
                "ALIGN": align,
                **{name: problem.constants[name] for name in ("DV", "DV0", "DV1")},
                "BM": _DELTA_ROWS,
                "LOW": low is not None,
            },
            {"num_warps": 4},
        )

    shapes = (out.dtype, out.shape, out.stride(), dout.stride(), out.device, low is None)
    prepared(("delta", shapes), build)(out, low, dout, delta)
    return delta
