"""Start the split-key kernel for few queries."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from polyzoo.attention.kernels.launch import as_bytes
from polyzoo.attention.kernels.problem import Problem, alignment, heads_last, strides
from polyzoo.attention.kernels.starts import Start, prepared
from polyzoo.attention.kernels.triton_decode import decode_kernel, merge_kernel
from polyzoo.attention.kernels.tuning import TileConfig, choose_config, processors

MAX_QUERIES = 16
MAX_ROWS = 64
_MAX_SPLITS = 64


@dataclass(frozen=True, eq=False)
class _Plan:
    attend: Start
    merge: Start
    splits: int


def suits(problem: Problem) -> bool:
    """Whether splitting the keys pays: few query rows, and keys enough to share out."""
    rows = problem.group * problem.queries
    return (
        0 < problem.queries <= MAX_QUERIES
        and rows <= MAX_ROWS
        and problem.keys >= 256
        and not problem.packed
        and not problem.width
        and problem.dropout == 0.0
    )


def decode(
    problem: Problem, *, config: TileConfig | None = None, splits: int | None = None
) -> tuple[Tensor, Tensor]:
    """Attention and log-sum-exp, as `launch.forward`, for calls that `suits`.

    Args:
        problem: The call.
        config: Tile sizes; looked up if left out. `block_m` is not used.
        splits: Slices of the keys; enough to fill the GPU if left out.
    """
    problem = problem.aligned
    q = problem.q
    b, h, n, _ = q.shape
    dv = problem.v.shape[-1]
    plan = prepared(
        ("decode", problem.signature, config, splits), lambda: _plan(problem, config, splits)
    )
    out = heads_last(q, dv)
    lse = torch.empty((b, h, n), dtype=torch.float32, device=q.device)
    part = torch.empty((plan.splits, b, h, n, dv), dtype=torch.float32, device=q.device)
    part_lse = torch.empty((plan.splits, b, h, n), dtype=torch.float32, device=q.device)
    with torch.cuda.device_of(q):
        plan.attend(
            q,
            problem.k,
            problem.v,
            part,
            part_lse,
            problem.bias,
            as_bytes(problem.mask),
            problem.kv_lens,
        )
        plan.merge(part, part_lse, out, lse)
    return out, lse


def _plan(problem: Problem, config: TileConfig | None, splits: int | None) -> _Plan:
    b, h, n, _ = problem.q.shape
    hk, m = problem.k.shape[1], problem.k.shape[2]
    dv = problem.v.shape[-1]
    config = config or choose_config("decode", problem)
    if splits is None:
        # One program per multiprocessor reads at full bandwidth; more only cost merging.
        wanted = processors(problem.q.device) // (b * hk)
        splits = max(1, min(wanted, -(-m // config.block_n), _MAX_SPLITS))
    main = [strides(t, 3) for t in (problem.q, problem.k, problem.v)]
    align = alignment(main)
    attend = Start(
        decode_kernel,
        (b * hk * splits, 1, 1),
        (
            *(stride // align for group in main for stride in group),
            *strides(problem.bias, 4),
            *strides(problem.mask, 4),
            b,
            hk,
            n,
            m,
            *problem.window,
            splits,
            problem.kernel_scale,
        ),
        {
            **{
                name: value
                for name, value in problem.constants.items()
                if name not in ("PACKED", "NATURAL", "KW", "KWP", "DROPOUT")
            },
            "ALIGN": align,
            "ROWS": max(16, 1 << (problem.group * n - 1).bit_length()),
            "BN": config.block_n,
        },
        {"num_warps": config.warps, "num_stages": config.stages},
    )
    merge = Start(
        merge_kernel,
        (b * h * n, 1, 1),
        (n * h * dv, dv, h * dv, h, n, b * h * n, splits),
        {
            "DV": dv,
            "DVP": 1 << (dv - 1).bit_length(),
            "SPLITS": 1 << (splits - 1).bit_length(),
        },
        {"num_warps": 4 if splits > 4 else 1},
    )
    return _Plan(attend, merge, splits)
