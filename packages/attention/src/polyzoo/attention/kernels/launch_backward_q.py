"""Start the backward pass over query tiles: gradients of queries and relative position."""

from __future__ import annotations

import torch
from torch import Tensor

from polyzoo.attention.kernels.backward_inputs import Plan, row_strides, tensors
from polyzoo.attention.kernels.launch import list_steps, mask_strides, tile_lists
from polyzoo.attention.kernels.problem import Problem, heads_last
from polyzoo.attention.kernels.schedules import query_programs, schedule
from polyzoo.attention.kernels.starts import Start, prepared
from polyzoo.attention.kernels.triton_backward_q import backward_q_kernel
from polyzoo.attention.kernels.tuning import TileConfig, choose_config


def queries(
    problem: Problem, statistics: tuple[Tensor, ...], config: TileConfig | None, careful: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of q, rel_h and rel_w; `statistics` are dout, lse and delta."""
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
        *tensors(problem, statistics, (dq, drel_h, drel_w)),
        None if lists is None else lists.index,
        None if lists is None else lists.counts,
        problem.kv_lens,
        problem.cu_q,
        problem.cu_k,
        schedule(problem.cu_q, problem.queries, plan.block_m),
        problem.rng,
    )
    return dq, drel_h, drel_w


def _plan_q(problem: Problem, dout: Tensor, config: TileConfig | None, careful: bool) -> Plan:
    config = config or choose_config("backward_q", problem)
    block_n = max(config.block_n, problem.key_block)
    slots, programs = query_programs(problem, config.block_m)
    main, align = row_strides(problem, dout)
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
    return Plan(start, config.block_m, block_n)
