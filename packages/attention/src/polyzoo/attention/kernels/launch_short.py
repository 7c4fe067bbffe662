"""Start the kernel for few keys."""

from __future__ import annotations

import torch
from torch import Tensor

from polyzoo.attention.kernels.problem import Problem, alignment, heads_last, strides
from polyzoo.attention.kernels.starts import Start, prepared
from polyzoo.attention.kernels.triton_short import short_kernel
from polyzoo.attention.kernels.tuning import TileConfig, processors

MAX_KEYS = 128
_LEAST_QUERIES = 1024


def suits(problem: Problem) -> bool:
    """Whether all keys fit one tile and there are queries enough to walk."""
    return (
        problem.keys <= MAX_KEYS
        and problem.queries >= _LEAST_QUERIES
        and max(problem.q.shape[-1], problem.v.shape[-1]) <= 128
        and problem.q.dtype != torch.float32
        and problem.left < 0
        and problem.right < 0
        and not problem.packed
        and problem.mask is None
        and problem.bias is None
        and not problem.width
        and problem.dropout == 0.0
    )


def forward(
    problem: Problem,
    *,
    low: Tensor | None = None,
    config: TileConfig | None = None,
    waves: int = 3,
) -> tuple[Tensor, Tensor]:
    """Attention and log-sum-exp, as `launch.forward`, for calls that `suits`.

    Args:
        problem: The call.
        low: As for `launch.forward`.
        config: `block_m`, warps and stages.
        waves: Programs per multiprocessor.
    """
    problem = problem.aligned
    out = heads_last(problem.q, problem.v.shape[-1])
    lse = torch.empty(problem.q.shape[:3], dtype=torch.float32, device=problem.q.device)
    start = prepared(
        ("short", problem.signature, config, waves, low is None),
        lambda: _plan(problem, out, low is not None, config or TileConfig(64, 0, 4, 3), waves),
    )
    with torch.cuda.device_of(problem.q):
        start(problem.q, problem.k, problem.v, out, low, lse, problem.kv_lens)
    return out, lse


def _plan(problem: Problem, out: Tensor, low: bool, config: TileConfig, waves: int) -> Start:
    b, h, n, _ = problem.q.shape
    m = problem.keys
    main = [strides(t, 3) for t in (problem.q, problem.k, problem.v, out)]
    align = alignment(main)
    enough = -(-waves * processors(problem.q.device) // (b * h))
    walks = max(1, min(enough, -(-n // config.block_m)))
    names = ("GROUP", "D", "D0", "D1", "DV", "DV0", "DV1", "KVLENS", "PRECISION")
    return Start(
        short_kernel,
        (walks * b * h, 1, 1),
        (
            *(stride // align for group in main for stride in group),
            h,
            n,
            m,
            walks,
            problem.kernel_scale,
        ),
        {
            **{name: problem.constants[name] for name in names},
            "ALIGN": align,
            "BM": config.block_m,
            "BN": max(16, 1 << (m - 1).bit_length()),
            "LOW": low,
        },
        {"num_warps": config.warps, "num_stages": config.stages},
    )
