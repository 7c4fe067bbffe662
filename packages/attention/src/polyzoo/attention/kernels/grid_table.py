"""Row and column of every key of a small grid, as the second factor of a matrix product."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from polyzoo.attention.kernels.graph_memory import borrowed_memory
from polyzoo.attention.kernels.problem import Problem

_MOST_CHANNELS = 64


def grid_channels(problem: Problem) -> int:
    """Channels that hold a query's relative position, or 0 where the grid is walked by rows.

    fp32 inputs, negative scales and dense masks on top keep to the rows.
    """
    sides = problem.grid_rows + problem.width
    if (
        not problem.width
        or sides > _MOST_CHANNELS
        or problem.q.dtype == torch.float32
        or problem.scale <= 0
        or problem.mask is not None
        or problem.bias is not None
    ):
        return 0
    return max(16, 1 << (sides - 1).bit_length())


def grid_table(problem: Problem) -> Tensor:
    """`(m, channels)` with a one in the row and one in the column of each key."""
    sizes = (problem.grid_rows, problem.width, grid_channels(problem))
    device, dtype = problem.q.device, problem.q.dtype
    if borrowed_memory(device):
        return one_hot(*sizes, device, dtype)
    return _kept(*sizes, device, dtype)


def one_hot(
    rows: int, columns: int, channels: int, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Build the table: channel y of key (y, x), and channel `rows + x`, are one."""
    key = torch.arange(rows * columns, device=device)[:, None]
    channel = torch.arange(channels, device=device)
    return ((channel == key // columns) | (channel == rows + key % columns)).to(dtype)


_kept = lru_cache(maxsize=64)(one_hot)
