"""Start the backward kernels: row sums, keys and values, queries, then a dense bias."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from polyzoo.attention.kernels.launch import as_bytes, device_of, query_grid, tile_keys
from polyzoo.attention.kernels.mask_tiles import MaskTiles, mask_tiles, packed_schedule
from polyzoo.attention.kernels.problem import Problem, alignment, heads_last, strides
from polyzoo.attention.kernels.tiles import head_blocks
from polyzoo.attention.kernels.triton_backward import backward_bias_kernel, delta_kernel
from polyzoo.attention.kernels.triton_backward_kv import backward_kv_kernel
from polyzoo.attention.kernels.triton_backward_q import backward_q_kernel
from polyzoo.attention.kernels.tuning import TileConfig, choose_config, processors

_MAX_PARTS = 16


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
    """
    wanted = wanted or Wanted()
    if dout.stride(-1) != 1 or 0 in dout.stride()[:-1]:
        dout = heads_last(dout, dout.shape[-1]).copy_(dout)
    if problem.queries * problem.keys * problem.batch * problem.heads == 0:
        return _zeros(problem, wanted)
    delta = _row_sums(out, dout)
    dq = dk = dv = dbias = drel_h = drel_w = None
    with device_of(problem.q):
        if wanted.kv:
            config = config_kv or choose_config("backward_kv", problem)
            dk, dv = _keys_and_values(problem, lse, delta, dout, config, parts)
        if wanted.q:
            config = config_q or choose_config("backward_q", problem)
            dq, drel_h, drel_w = _queries(problem, lse, delta, dout, config)
        if wanted.bias and problem.bias is not None:
            config = choose_config("backward_bias", problem)
            dbias = _bias(problem, lse, delta, dout, config)
    return Gradients(q=dq, k=dk, v=dv, bias=dbias, rel_h=drel_h, rel_w=drel_w)


def _zeros(problem: Problem, wanted: Wanted) -> Gradients:
    def zeros(tensor: Tensor | None, asked: bool) -> Tensor | None:
        return torch.zeros_like(tensor) if asked and tensor is not None else None

    return Gradients(
        q=zeros(problem.q, wanted.q),
        k=zeros(problem.k, wanted.kv),
        v=zeros(problem.v, wanted.kv),
        bias=zeros(problem.bias, wanted.bias),
        rel_h=zeros(problem.rel_h, wanted.q),
        rel_w=zeros(problem.rel_w, wanted.q),
    )


def _row_sums(out: Tensor, dout: Tensor) -> Tensor:
    b, h, n, dv = out.shape
    delta = torch.empty((b, h, n), dtype=torch.float32, device=out.device)
    block = 64
    main = [strides(out, 3), strides(dout, 3)]
    align = alignment(main)
    dv0, dv1 = head_blocks(dv)
    with device_of(out):
        delta_kernel[(-(-n // block) * b * h,)](
            out,
            dout,
            delta,
            *(stride // align for group in main for stride in group),
            h,
            n,
            ALIGN=align,
            DV=dv,
            DV0=dv0,
            DV1=dv1,
            BM=block,
            num_warps=4,
        )
    return delta


def _inputs(problem: Problem, dout: Tensor) -> tuple[list[int], int]:
    main = [strides(t, 3) for t in (problem.q, problem.k, problem.v, dout)]
    align = alignment(main)
    return [stride // align for group in main for stride in group], align


def _mask_strides(problem: Problem) -> list[int]:
    return [
        *strides(problem.bias, 4),
        *strides(problem.mask, 4),
        *strides(problem.rel_h, 3),
        *strides(problem.rel_w, 3),
    ]


def _grid_rows(problem: Problem) -> int:
    return 0 if problem.rel_h is None else problem.rel_h.shape[-1]


def _lists(problem: Problem, block_m: int, block_n: int, *, by_key: bool) -> MaskTiles | None:
    if problem.mask is None or problem.width:
        return None
    return mask_tiles(
        problem.mask,
        n=problem.queries,
        m=problem.keys,
        block_m=block_m,
        block_n=block_n,
        by_key=by_key,
    )


def _keys_and_values(
    problem: Problem,
    lse: Tensor,
    delta: Tensor,
    dout: Tensor,
    config: TileConfig,
    parts: int | None,
) -> tuple[Tensor, Tensor]:
    block_n = tile_keys(problem, config)
    b, heads, m, _ = problem.k.shape
    schedule, slots = None, 0
    if problem.cu_k is not None:
        schedule = packed_schedule(problem.cu_k, total=m, block=block_n)
        slots = schedule.shape[0]
        programs = slots * heads
    elif problem.width:
        span = block_n // int(str(problem.constants["KWP"]))
        programs = -(-_grid_rows(problem) // span) * heads * b
    else:
        programs = -(-m // block_n) * heads * b
    if parts is None:
        query_tiles = -(-problem.longest[0] // config.block_m)
        enough = 2 * processors(problem.q.device)
        parts = max(1, min(_MAX_PARTS, query_tiles, enough // programs))
    if parts > 1:
        dk, dv = (
            torch.empty((parts, *t.shape), dtype=torch.float32, device=t.device)
            for t in (problem.k, problem.v)
        )
        dk_strides, dv_strides = list(dk.stride()[1:4]), list(dv.stride()[1:4])
        steps = [dk.stride(0), dv.stride(0)]
    else:
        dk = heads_last(problem.k, problem.k.shape[-1])
        dv = heads_last(problem.k, problem.v.shape[-1])
        dk_strides, dv_strides = list(dk.stride()[:3]), list(dv.stride()[:3])
        steps = [0, 0]
    lists = _lists(problem, config.block_m, block_n, by_key=True)
    main, align = _inputs(problem, dout)
    backward_kv_kernel[(programs, parts)](
        problem.q,
        problem.k,
        problem.v,
        dout,
        lse,
        delta,
        dk,
        dv,
        problem.bias,
        as_bytes(problem.mask),
        problem.rel_h,
        problem.rel_w,
        None if lists is None else lists.index,
        None if lists is None else lists.counts,
        problem.kv_lens,
        problem.cu_q,
        problem.cu_k,
        schedule,
        problem.rng,
        *main,
        *(stride // 8 for stride in dk_strides),
        *(stride // 8 for stride in dv_strides),
        problem.queries,
        *_mask_strides(problem),
        *((0, 0, 0) if lists is None else lists.steps),
        heads,
        problem.queries,
        m,
        _grid_rows(problem),
        slots,
        *problem.window,
        problem.threshold,
        parts,
        *(step // 8 for step in steps),
        problem.kernel_scale,
        1.0 / (1.0 - problem.dropout),
        problem.scale,
        ALIGN=align,
        BM=config.block_m,
        BN=block_n,
        EDGES=problem.edges or problem.queries % config.block_m != 0,
        num_warps=config.warps,
        num_stages=config.stages,
        **problem.constants,
    )
    if parts > 1:
        dk, dv = dk.sum(0).to(problem.k.dtype), dv.sum(0).to(problem.v.dtype)
    return dk, dv


def _queries(
    problem: Problem, lse: Tensor, delta: Tensor, dout: Tensor, config: TileConfig
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    block_n = tile_keys(problem, config)
    dq = heads_last(problem.q, problem.q.shape[-1])
    drel_h = drel_w = None
    if problem.rel_h is not None and problem.rel_w is not None:
        # Rows of the grid that no query of a tile sees are never written.
        drel_h = torch.zeros_like(problem.rel_h, memory_format=torch.contiguous_format)
        drel_w = torch.empty_like(problem.rel_w, memory_format=torch.contiguous_format)
    schedule, slots, grid = query_grid(problem, config.block_m)
    lists = _lists(problem, config.block_m, block_n, by_key=False)
    main, align = _inputs(problem, dout)
    rough = problem.keys % block_n != 0 and not problem.width
    backward_q_kernel[(grid,)](
        problem.q,
        problem.k,
        problem.v,
        dout,
        lse,
        delta,
        dq,
        drel_h,
        drel_w,
        problem.bias,
        as_bytes(problem.mask),
        problem.rel_h,
        problem.rel_w,
        None if lists is None else lists.index,
        None if lists is None else lists.counts,
        problem.kv_lens,
        problem.cu_q,
        problem.cu_k,
        schedule,
        problem.rng,
        *main,
        *(stride // 8 for stride in dq.stride()[:3]),
        problem.queries,
        *_mask_strides(problem),
        *((0, 0, 0) if lists is None else lists.steps),
        problem.heads,
        problem.queries,
        problem.keys,
        _grid_rows(problem),
        slots,
        *problem.window,
        problem.threshold,
        problem.kernel_scale,
        1.0 / (1.0 - problem.dropout),
        problem.scale,
        ALIGN=align,
        BM=config.block_m,
        BN=block_n,
        EDGES=problem.edges or rough,
        num_warps=config.warps,
        num_stages=config.stages,
        **problem.constants,
    )
    return dq, drel_h, drel_w


def _bias(
    problem: Problem, lse: Tensor, delta: Tensor, dout: Tensor, config: TileConfig
) -> Tensor:
    bias = problem.bias
    if bias is None:
        raise AssertionError("asked for the gradient of a bias that is not there")
    dbias = torch.empty_like(bias, memory_format=torch.contiguous_format)
    b, h, rows, columns = bias.shape
    sum_n, sum_m = rows == 1, columns == 1
    tiles = (1 if sum_n else -(-rows // config.block_m)) * (
        1 if sum_m else -(-columns // config.block_n)
    )
    main, align = _inputs(problem, dout)
    backward_bias_kernel[(tiles * b * h,)](
        problem.q,
        problem.k,
        problem.v,
        dout,
        lse,
        delta,
        dbias,
        bias,
        as_bytes(problem.mask),
        problem.kv_lens,
        problem.rng,
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
        ALIGN=align,
        BM=config.block_m,
        BN=config.block_n,
        SUM_N=sum_n,
        SUM_M=sum_m,
        num_warps=config.warps,
        num_stages=config.stages,
        **problem.constants,
    )
    return dbias
