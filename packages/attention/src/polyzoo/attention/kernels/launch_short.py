"""Start the kernel for few keys."""

from __future__ import annotations

import torch
from torch import Tensor

from polyzoo.attention.kernels.grid_table import grid_channels, grid_table
from polyzoo.attention.kernels.problem import Problem, alignment, heads_last, strides
from polyzoo.attention.kernels.starts import Start, prepared
from polyzoo.attention.kernels.triton_short import short_kernel
from polyzoo.attention.kernels.tuning import TileConfig, processors

MAX_KEYS = 128
MAX_GRID_KEYS = 256
_LEAST_QUERIES = 1024
_LEAST_GRID_QUERIES = 64
_WIDEST = 128
_TILES = 3


def suits(problem: Problem) -> bool:
    """Whether all keys fit on the chip and there are queries enough to walk."""
    grid = grid_channels(problem) > 0
    return (
        problem.keys <= (MAX_GRID_KEYS if grid else MAX_KEYS)
        and problem.queries >= (_LEAST_GRID_QUERIES if grid else _LEAST_QUERIES)
        and max(problem.q.shape[-1], problem.v.shape[-1]) <= _WIDEST
        and problem.q.dtype != torch.float32
        and problem.left < 0
        and problem.right < 0
        and not problem.packed
        and problem.mask is None
        and problem.bias is None
        and (grid or not problem.width)
        and problem.dropout == 0.0
    )


def key_tiles(keys: int) -> tuple[int, int, int]:
    """Up to three tiles of powers of two from 16 to 128 that cover the keys; 0 where not needed."""
    tiles: list[int] = []
    left = keys
    while left > 0:
        whole = min(_WIDEST, max(16, 1 << (left.bit_length() - 1)))
        if len(tiles) == _TILES - 1 or left - whole > whole // 2:
            whole = min(_WIDEST, max(16, 1 << (left - 1).bit_length()))
        tiles.append(whole)
        left -= whole
    if len(tiles) > _TILES:
        raise ValueError(f"{keys} keys do not fit {_TILES} tiles of {_WIDEST}")
    tiles += [0] * (_TILES - len(tiles))
    return tiles[0], tiles[1], tiles[2]


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
        lambda: _plan(problem, out, low is not None, config or _config(problem), waves),
    )
    grid = grid_table(problem) if problem.width else None
    with torch.cuda.device_of(problem.q):
        start(
            problem.q, problem.k, problem.v, out, low, lse,
            problem.kv_lens, problem.rel_h, problem.rel_w, grid,
        )  # fmt: skip
    return out, lse


def _config(problem: Problem) -> TileConfig:
    return TileConfig(64, 0, 4, 2 if problem.width else 3)


def _plan(problem: Problem, out: Tensor, low: bool, config: TileConfig, waves: int) -> Start:
    b, h, n, _ = problem.q.shape
    m = problem.keys
    main = [strides(t, 3) for t in (problem.q, problem.k, problem.v, out)]
    align = alignment(main)
    enough = -(-waves * processors(problem.q.device) // (b * h))
    walks = max(1, min(enough, -(-n // config.block_m)))
    first, second, third = key_tiles(m)
    # Half of a lone tile, or the first of several.
    half = first if second else (first // 2 if first > 32 else 0)
    names = ("GROUP", "D", "D0", "D1", "DV", "DV0", "DV1", "KVLENS", "PRECISION")
    return Start(
        short_kernel,
        (walks * b * h, 1, 1),
        (
            *(stride // align for group in main for stride in group),
            *strides(problem.rel_h, 3),
            *strides(problem.rel_w, 3),
            h,
            n,
            m,
            problem.grid_rows,
            walks,
            problem.kernel_scale,
        ),
        {
            **{name: problem.constants[name] for name in names},
            "ALIGN": align,
            "BM": config.block_m,
            "B0": first,
            "B1": second,
            "B2": third,
            "HALF": half,
            "KG": grid_channels(problem),
            "GRID_WIDTH": problem.width,
            "LOW": low,
        },
        {"num_warps": config.warps, "num_stages": config.stages},
    )
