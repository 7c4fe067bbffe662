"""Fixed embeddings: positions of tokens, and scalars such as the timestep (sections 2.2, 2.3)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

SCALAR_CHANNELS = 256


def position_table(rows: int, columns: int, *, width: int, base_size: int, scale: float) -> Tensor:
    """Sine and cosine of the position of each token of a grid, row by row.

    Both directions are divided by their own length, so a 2:1 grid spans the same range twice.

    Args:
        rows: Height of the grid in tokens.
        columns: Width of the grid in tokens.
        width: Channels; the first half is the column, the second the row.
        base_size: Side of the grid of the training size.
        scale: Divides positions.

    Returns:
        `(rows * columns, width)` float32, worked out in float64.
    """
    omega = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    down = torch.arange(rows, dtype=torch.float64) / (rows / base_size) / scale
    across = torch.arange(columns, dtype=torch.float64) / (columns / base_size) / scale
    down, across = (torch.outer(p, omega) for p in (down, across))
    by_row = torch.cat([down.sin(), down.cos()], dim=1)[:, None].expand(-1, columns, -1)
    by_column = torch.cat([across.sin(), across.cos()], dim=1)[None].expand(rows, -1, -1)
    return torch.cat([by_column, by_row], dim=2).reshape(rows * columns, width).float()


def scalar_embedding(values: Tensor) -> Tensor:
    """Cosine and sine of scalars at 128 frequencies, in float32 whatever the model's dtype.

    Args:
        values: `(n,)`, never rounded to half precision before: bf16 makes 999 of 1000.

    Returns:
        `(n, 256)` float32, cosines first.
    """
    half = SCALAR_CHANNELS // 2
    steps = torch.arange(half, dtype=torch.float32, device=values.device)
    angles = values.float()[:, None] * torch.exp(-math.log(10000) * steps / half)
    return torch.cat([angles.cos(), angles.sin()], dim=1)
