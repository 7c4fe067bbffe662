"""Start the backward kernels: row sums, keys and values, queries, then a dense bias."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from polyzoo.attention.kernels.launch import (
    as_bytes,
    list_steps,
    mask_strides,
    tile_lists,
)
from polyzoo.attention.kernels.problem import (
    Problem,
    alignment,
    heads_last,
    reads_whole,
    strides,
)
from polyzoo.attention.kernels.schedules import query_programs, schedule
from polyzoo.attention.kernels.starts import Start, prepared
from polyzoo.attention.kernels.triton_backward import backward_bias_kernel, delta_kernel
from polyzoo.attention.kernels.triton_backward_kv import backward_kv_kernel
from polyzoo.attention.kernels.triton_backward_q import backward_q_kernel
from polyzoo.attention.kernels.tuning import TileConfig, choose_config, processors

_MAX_PARTS = 16
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


@dataclass(frozen=True, eq=False)
class _Plan:
    start: Start
    block_m: int
    block_n: int
    parts: int = 1


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
            dk, dv = _keys_and_values(problem, statistics, config_kv, parts, careful)
        if wanted.q:
            dq, drel_h, drel_w = _queries(problem, statistics, config_q, careful)
        if wanted.bias and problem.bias is not None:
            dbias = _bias(problem, problem.bias, statistics)
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


def _inputs(problem: Problem, dout: Tensor) -> tuple[list[int], int]:
    main = [strides(t, 3) for t in (problem.q, problem.k, problem.v, dout)]
    align = alignment(main)
    return [stride // align for group in main for stride in group], align


def _tensors(problem: Problem, statistics: tuple[Tensor, ...], made: tuple[object, ...]) -> list:
    return [
        problem.q,
        problem.k,
        problem.v,
        *statistics,
        *made,
        problem.bias,
        as_bytes(problem.mask),
        problem.rel_h,
        problem.rel_w,
    ]


def _keys_and_values(
    problem: Problem,
    statistics: tuple[Tensor, ...],
    config: TileConfig | None,
    parts: int | None,
    careful: bool,
) -> tuple[Tensor, Tensor]:
    dout = statistics[0]
    plan = prepared(
        ("backward_kv", problem.signature, dout.stride(), config, parts, careful),
        lambda: _plan_kv(problem, dout, config, parts, careful),
    )
    if plan.parts > 1:
        b, heads, m, _ = problem.k.shape
        dk, dv = (
            torch.empty((plan.parts, b, m, heads, t.shape[3]), dtype=torch.float32, device=t.device)
            for t in (problem.k, problem.v)
        )
    else:
        dk, dv = (heads_last(t, t.shape[-1]) for t in (problem.k, problem.v))
    lists = tile_lists(problem, plan.block_m, plan.block_n, by_key=True)
    plan.start(
        *_tensors(problem, statistics, (dk, dv)),
        None if lists is None else lists.index,
        None if lists is None else lists.counts,
        problem.kv_lens,
        problem.cu_q,
        problem.cu_k,
        schedule(problem.cu_k, problem.keys, plan.block_n),
        problem.rng,
    )
    if plan.parts > 1:
        dk, dv = (t.sum(0).to(problem.k.dtype).transpose(1, 2) for t in (dk, dv))
    return dk, dv


def _plan_kv(
    problem: Problem, dout: Tensor, config: TileConfig | None, parts: int | None, careful: bool
) -> _Plan:
    config = config or choose_config("backward_kv", problem)
    block_n = max(config.block_n, problem.key_block)
    b, heads, m, d = problem.k.shape
    dv = problem.v.shape[-1]
    slots = 0
    if problem.cu_k is not None:
        slots = m // block_n + problem.cu_k.shape[0] - 1
        programs = slots * heads
    elif problem.width:
        programs = -(-problem.grid_rows // (block_n // problem.key_block)) * heads * b
    else:
        programs = -(-m // block_n) * heads * b
    if parts is None:
        query_tiles = -(-problem.longest[0] // config.block_m)
        enough = 2 * processors(problem.q.device)
        parts = max(1, min(_MAX_PARTS, query_tiles, enough // programs))
    # Strides of the results in units of 8 elements, as allocated by `_keys_and_values`.
    places = [(size * heads * m // 8, size // 8, size * heads // 8) for size in (d, dv)]
    steps = [b * heads * m * size // 8 for size in (d, dv)]
    main, align = _inputs(problem, dout)
    start = Start(
        backward_kv_kernel,
        (programs, parts, 1),
        (
            *main,
            *places[0],
            *places[1],
            problem.queries,
            *mask_strides(problem),
            *list_steps(problem, block_n, by_key=True),
            heads,
            problem.queries,
            m,
            problem.grid_rows,
            slots,
            *problem.window,
            problem.threshold,
            parts,
            *steps,
            problem.kernel_scale,
            1.0 / (1.0 - problem.dropout),
            problem.scale,
        ),
        {
            **problem.constants,
            "ALIGN": align,
            "BM": config.block_m,
            "BN": block_n,
            "EDGES": problem.edges or problem.queries % config.block_m != 0,
            "CAREFUL": careful,
        },
        {"num_warps": config.warps, "num_stages": config.stages},
    )
    return _Plan(start, config.block_m, block_n, parts)


def _queries(
    problem: Problem, statistics: tuple[Tensor, ...], config: TileConfig | None, careful: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    dout = statistics[0]
    plan = prepared(
        ("backward_q", problem.signature, dout.stride(), config, careful),
        lambda: _plan_q(problem, dout, config, careful),
    )
    dq = heads_last(problem.q, problem.q.shape[-1])
    drel_h = drel_w = None
    if problem.rel_h is not None and problem.rel_w is not None:
        # Rows of the grid that no query of a tile sees are never written.
        drel_h = torch.zeros_like(problem.rel_h, memory_format=torch.contiguous_format)
        drel_w = torch.empty_like(problem.rel_w, memory_format=torch.contiguous_format)
    lists = tile_lists(problem, plan.block_m, plan.block_n)
    plan.start(
        *_tensors(problem, statistics, (dq, drel_h, drel_w)),
        None if lists is None else lists.index,
        None if lists is None else lists.counts,
        problem.kv_lens,
        problem.cu_q,
        problem.cu_k,
        schedule(problem.cu_q, problem.queries, plan.block_m),
        problem.rng,
    )
    return dq, drel_h, drel_w


def _plan_q(problem: Problem, dout: Tensor, config: TileConfig | None, careful: bool) -> _Plan:
    config = config or choose_config("backward_q", problem)
    block_n = max(config.block_n, problem.key_block)
    slots, programs = query_programs(problem, config.block_m)
    main, align = _inputs(problem, dout)
    rough = problem.keys % block_n != 0 and not problem.width
    _, h, n, d = problem.q.shape
    start = Start(
        backward_q_kernel,
        (programs, 1, 1),
        (
            *main,
            *(n * h * d // 8, d // 8, h * d // 8),
            n,
            *mask_strides(problem),
            *list_steps(problem, config.block_m, by_key=False),
            h,
            n,
            problem.keys,
            problem.grid_rows,
            slots,
            *problem.window,
            problem.threshold,
            problem.kernel_scale,
            1.0 / (1.0 - problem.dropout),
            problem.scale,
        ),
        {
            **problem.constants,
            "ALIGN": align,
            "BM": config.block_m,
            "BN": block_n,
            "EDGES": problem.edges or rough,
            "CAREFUL": careful,
        },
        {"num_warps": config.warps, "num_stages": config.stages},
    )
    return _Plan(start, config.block_m, block_n)


def _bias(problem: Problem, bias: Tensor, statistics: tuple[Tensor, ...]) -> Tensor:
    if bias.shape[-1] == 1 < problem.keys:
        # The same for every key: softmax does not see it.
        return bias.new_zeros(bias.shape)
    dout = statistics[0]
    dbias = torch.empty_like(bias, memory_format=torch.contiguous_format)
    start = prepared(
        ("backward_bias", problem.signature, dout.stride()),
        lambda: _plan_bias(problem, bias, dout),
    )
    start(
        problem.q,
        problem.k,
        problem.v,
        *statistics,
        dbias,
        bias,
        as_bytes(problem.mask),
        problem.kv_lens,
        problem.rng,
    )
    return dbias


def _plan_bias(problem: Problem, bias: Tensor, dout: Tensor) -> Start:
    config = choose_config("backward_bias", problem)
    b, h, rows, columns = bias.shape
    sum_n = rows == 1 < problem.queries
    row_tiles = 1 if sum_n else -(-rows // config.block_m)
    main, align = _inputs(problem, dout)
    return Start(
        backward_bias_kernel,
        (row_tiles * -(-columns // config.block_n) * b * h, 1, 1),
        (
            *main,
            *strides(bias, 4),
            *strides(problem.mask, 4),
            problem.batch,
            problem.heads,
            problem.queries,
            problem.keys,
            b,
            h,
            rows,
            columns,
            *problem.window,
            problem.threshold,
            problem.scale,
            1.0 / (1.0 - problem.dropout),
        ),
        {
            **problem.constants,
            "ALIGN": align,
            "BM": config.block_m,
            "BN": config.block_n,
            "SUM_N": sum_n,
        },
        {"num_warps": config.warps, "num_stages": config.stages},
    )
