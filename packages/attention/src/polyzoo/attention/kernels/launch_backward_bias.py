"""Start the backward kernel of a dense bias."""

from __future__ import annotations

import torch
from torch import Tensor

from polyzoo.attention.kernels.backward_inputs import row_strides
from polyzoo.attention.kernels.launch import as_bytes
from polyzoo.attention.kernels.problem import Problem, strides
from polyzoo.attention.kernels.starts import Start, prepared
from polyzoo.attention.kernels.triton_backward import backward_bias_kernel
from polyzoo.attention.kernels.tuning import choose_config


def bias_gradient(problem: Problem, bias: Tensor, statistics: tuple[Tensor, ...]) -> Tensor:
    """Gradient of a dense bias, summed over its broadcast axes."""
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
    main, align = row_strides(problem, dout)
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
