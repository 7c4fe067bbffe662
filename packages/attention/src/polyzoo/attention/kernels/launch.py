"""Start the kernels: allocate, choose tiles, lay out the arguments."""

from __future__ import annotations

import torch
from torch import Tensor

from polyzoo.attention.kernels.mask_tiles import mask_tiles, packed_schedule
from polyzoo.attention.kernels.problem import Problem, alignment, heads_last, strides
from polyzoo.attention.kernels.triton_forward import forward_kernel
from polyzoo.attention.kernels.tuning import TileConfig, choose_config


def forward(problem: Problem, *, config: TileConfig | None = None) -> tuple[Tensor, Tensor]:
    """Attention and the log-sum-exp of its scores.

    Args:
        problem: The call.
        config: Tile sizes; looked up if left out.

    Returns:
        `(b, h, n, dv)` in the input dtype, laid out with the heads last, and fp32 `(b, h, n)`.
    """
    out = heads_last(problem.q, problem.v.shape[-1])
    lse = torch.empty(problem.q.shape[:3], dtype=torch.float32, device=problem.q.device)
    if out.shape[0] * out.shape[1] * out.shape[2] == 0:
        return out, lse
    if problem.keys == 0:
        return out.zero_(), lse.fill_(-torch.inf)
    config = config or choose_config("forward", problem)
    block_n = tile_keys(problem, config)
    schedule, slots, grid = query_grid(problem, config.block_m)
    main = [strides(t, 3) for t in (problem.q, problem.k, problem.v, out)]
    align = alignment(main)
    index, counts, steps = None, None, (0, 0, 0)
    if problem.mask is not None and not problem.width:
        tiles = mask_tiles(
            problem.mask,
            n=problem.queries,
            m=problem.keys,
            block_m=config.block_m,
            block_n=block_n,
        )
        index, counts, steps = tiles.index, tiles.counts, tiles.steps
    tma = config.tma and align == 8 and _descriptors_fit(problem)
    rough = problem.keys % block_n != 0 and not problem.width
    with device_of(problem.q):
        forward_kernel[(grid,)](
            problem.q,
            problem.k,
            problem.v,
            out,
            lse,
            problem.bias,
            as_bytes(problem.mask),
            problem.rel_h,
            problem.rel_w,
            index,
            counts,
            problem.kv_lens,
            problem.cu_q,
            problem.cu_k,
            schedule,
            problem.rng,
            *(_descriptors(problem, block_n) if tma else (None,) * 4),
            *(stride // align for group in main for stride in group),
            problem.queries,
            *strides(problem.bias, 4),
            *strides(problem.mask, 4),
            *strides(problem.rel_h, 3),
            *strides(problem.rel_w, 3),
            *steps,
            problem.heads,
            problem.queries,
            problem.keys,
            0 if problem.rel_h is None else problem.rel_h.shape[-1],
            slots,
            *problem.window,
            problem.threshold,
            problem.kernel_scale,
            1.0 / (1.0 - problem.dropout),
            ALIGN=align,
            BM=config.block_m,
            BN=block_n,
            EDGES=problem.edges or rough,
            RAW=problem.raw,
            TMA=tma,
            num_warps=config.warps,
            num_stages=config.stages,
            **problem.constants,
        )
    return out, lse


def tile_keys(problem: Problem, config: TileConfig) -> int:
    """Keys per tile: a whole number of padded grid rows under a relative position."""
    return max(config.block_n, int(str(problem.constants["KWP"])))


def query_grid(problem: Problem, block: int) -> tuple[Tensor | None, int, int]:
    """Schedule of a packed call, its slots, and the number of programs over query tiles."""
    if problem.cu_q is None:
        tiles = -(-problem.queries // block)
        return None, 0, tiles * problem.heads * problem.batch
    schedule = packed_schedule(problem.cu_q, total=problem.queries, block=block)
    return schedule, schedule.shape[0], schedule.shape[0] * problem.heads


def as_bytes(mask: Tensor | None) -> Tensor | None:
    """A bool mask as the bytes it is stored in."""
    return None if mask is None else mask.view(torch.uint8)


def device_of(tensor: Tensor) -> torch.cuda.device_of:
    """Make the tensor's GPU the current one, as Triton launches on that."""
    return torch.cuda.device_of(tensor)


def _descriptors_fit(problem: Problem) -> bool:
    """Whether keys and values can be read by the bulk copy engine of sm_90."""
    return (
        problem.q.dtype != torch.float32
        and not problem.width
        and all(t.data_ptr() % 16 == 0 and min(t.shape) > 0 for t in (problem.k, problem.v))
    )


def _descriptors(problem: Problem, block_n: int) -> tuple[object, ...]:
    from triton.tools.tensor_descriptor import TensorDescriptor

    made: list[object] = []
    for name, tensor in (("D", problem.k), ("DV", problem.v)):
        steps = [max(stride, 8) for stride in strides(tensor, 3)] + [1]
        for part in (f"{name}0", f"{name}1"):
            columns = int(str(problem.constants[part]))
            block = [1, 1, block_n, columns]
            made.append(
                TensorDescriptor(tensor, list(tensor.shape), steps, block) if columns else None
            )
    return tuple(made)
