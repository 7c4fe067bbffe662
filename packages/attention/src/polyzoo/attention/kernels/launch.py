"""Start the forward kernel: allocate, choose tiles, lay out the arguments."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from polyzoo.attention.kernels.grid_table import grid_channels, grid_table
from polyzoo.attention.kernels.mask_tiles import MaskTiles, mask_tiles
from polyzoo.attention.kernels.problem import Problem, alignment, heads_last, strides
from polyzoo.attention.kernels.schedules import query_programs, schedule
from polyzoo.attention.kernels.starts import Start, prepared
from polyzoo.attention.kernels.triton_forward import forward_kernel
from polyzoo.attention.kernels.tuning import TileConfig, choose_config


@dataclass(frozen=True, eq=False)
class _Plan:
    start: Start
    block_m: int
    block_n: int
    tma: bool
    channels: int


def forward(
    problem: Problem, *, config: TileConfig | None = None, low: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention and the log-sum-exp of its scores.

    Args:
        problem: The call.
        config: Tile sizes; looked up if left out.
        low: Receives what rounding the output took away, laid out as the output; an exact backward
            pass wants it.

    Returns:
        `(b, h, n, dv)` in the input dtype, laid out with the heads last, and fp32 `(b, h, n)`.
    """
    problem = problem.aligned
    out = heads_last(problem.q, problem.v.shape[-1])
    lse = torch.empty(problem.q.shape[:3], dtype=torch.float32, device=problem.q.device)
    if out.shape[0] * out.shape[1] * out.shape[2] == 0:
        return out, lse
    if problem.keys == 0:
        if low is not None:
            low.zero_()
        return out.zero_(), lse.fill_(-torch.inf)
    plan = prepared(
        ("forward", problem.signature, config, low is None),
        lambda: _plan(problem, out, config, low is not None),
    )
    lists = tile_lists(problem, plan.block_m, plan.block_n)
    with torch.cuda.device_of(problem.q):
        plan.start(
            problem.q,
            problem.k,
            problem.v,
            out,
            low,
            lse,
            problem.bias,
            as_bytes(problem.mask),
            problem.rel_h,
            problem.rel_w,
            None if lists is None else lists.index,
            None if lists is None else lists.counts,
            problem.kv_lens,
            problem.cu_q,
            problem.cu_k,
            schedule(problem.cu_q, problem.queries, plan.block_m),
            problem.rng,
            *(_descriptors(problem, plan.block_n) if plan.tma else (None,) * 4),
            grid_table(problem) if plan.channels else None,
        )
    return out, lse


def _plan(problem: Problem, out: Tensor, config: TileConfig | None, low: bool) -> _Plan:
    config = config or choose_config("forward", problem)
    channels = grid_channels(problem)
    by_rows = problem.width > 0 and not channels
    block_n = max(config.block_n, problem.key_block) if by_rows else config.block_n
    main = [strides(t, 3) for t in (problem.q, problem.k, problem.v, out)]
    align = alignment(main)
    tma = config.tma and align == 8 and not by_rows and _descriptors_fit(problem)
    rough = problem.keys % block_n != 0 and not by_rows
    slots, programs = query_programs(problem, config.block_m)
    start = Start(
        forward_kernel,
        (programs, 1, 1),
        (
            *(stride // align for group in main for stride in group),
            problem.queries,
            *mask_strides(problem),
            *list_steps(problem, config.block_m, by_key=False),
            problem.heads,
            problem.queries,
            problem.keys,
            problem.grid_rows,
            slots,
            *problem.window,
            problem.threshold,
            problem.kernel_scale,
            1.0 / (1.0 - problem.dropout),
        ),
        {
            **problem.constants,
            "ALIGN": align,
            "BM": config.block_m,
            "BN": block_n,
            **({"KW": 0, "KWP": 1} if channels else {}),
            "KG": channels,
            "GRID_WIDTH": problem.width,
            "EDGES": problem.edges or rough,
            "RAW": problem.raw or channels > 0,
            "TMA": tma,
            "LOW": low,
        },
        {"num_warps": config.warps, "num_stages": config.stages},
    )
    return _Plan(start, config.block_m, block_n, tma, channels)


def tile_lists(
    problem: Problem, block_m: int, block_n: int, *, by_key: bool = False
) -> MaskTiles | None:
    """Tiles that a dense mask leaves; a relative position walks the whole grid instead."""
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


def list_steps(problem: Problem, block: int, *, by_key: bool) -> tuple[int, int, int]:
    """Rows of the tile lists to skip per batch item, head and tile; 0 where the mask is broadcast.

    `block` is the tile size along the axis that has a list per tile.
    """
    if problem.mask is None or problem.width:
        return 0, 0, 0
    b, h, n, _ = problem.mask.shape
    rows = -(-problem.keys // block) if by_key else (1 if n == 1 else -(-n // block))
    return (h * rows if b > 1 else 0, rows if h > 1 else 0, 1 if rows > 1 else 0)


def mask_strides(problem: Problem) -> list[int]:
    """Strides of bias, mask and relative position, 0 along broadcast axes."""
    return [
        *strides(problem.bias, 4),
        *strides(problem.mask, 4),
        *strides(problem.rel_h, 3),
        *strides(problem.rel_w, 3),
    ]


def as_bytes(mask: Tensor | None) -> Tensor | None:
    """A bool mask as the bytes it is stored in."""
    return None if mask is None else mask.view(torch.uint8)


def _descriptors_fit(problem: Problem) -> bool:
    """Whether keys and values can be read by the bulk copy engine of sm_90."""
    return (
        problem.q.dtype != torch.float32
        and problem.q.is_cuda
        and torch.cuda.get_device_capability(problem.q.device) >= (9, 0)
    )


def _descriptors(problem: Problem, block_n: int) -> tuple[object, ...]:
    from triton.tools.tensor_descriptor import TensorDescriptor

    made: list[object] = []
    for tensor, parts in ((problem.k, ("D0", "D1")), (problem.v, ("DV0", "DV1"))):
        steps = [max(stride, 8) for stride in strides(tensor, 3)] + [1]
        for part in parts:
            columns = problem.constants[part]
            block = [1, 1, block_n, columns]
            made.append(
                TensorDescriptor(tensor, list(tensor.shape), steps, block) if columns else None
            )
    return tuple(made)
