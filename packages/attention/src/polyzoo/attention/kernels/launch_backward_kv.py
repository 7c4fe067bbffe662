"""Start the backward pass over key tiles: gradients of keys and values."""

from __future__ import annotations

import torch
from torch import Tensor

from polyzoo.attention.kernels.backward_inputs import Plan, row_strides, tensors
from polyzoo.attention.kernels.launch import list_steps, mask_strides, tile_lists
from polyzoo.attention.kernels.problem import Problem, heads_last
from polyzoo.attention.kernels.schedules import schedule
from polyzoo.attention.kernels.starts import Start, prepared
from polyzoo.attention.kernels.triton_backward_kv import backward_kv_kernel
from polyzoo.attention.kernels.tuning import TileConfig, choose_config, processors

_MAX_PARTS = 16


def keys_and_values(
    problem: Problem,
    statistics: tuple[Tensor, ...],
    config: TileConfig | None,
    parts: int | None,
    careful: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of k and v; arguments as for `launch_backward.backward`.

    `statistics` are dout, lse and delta.
    """
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
        *tensors(problem, statistics, (dk, dv)),
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
) -> Plan:
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
    main, align = row_strides(problem, dout)
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
    return Plan(start, config.block_m, block_n, parts)
