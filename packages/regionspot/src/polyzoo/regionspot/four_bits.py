"""Matrices in four bits an entry, with one half-precision scale a row."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_LEVELS = 16
_CLIP = 0.85
"""Share of a row's peak at which it is cut: a few entries lose, all others gain."""


def pack(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return uint8 `(n, d / 2)` and float16 scales `(n,)` for `(n, d)`; d must be even."""
    if rows.ndim != 2 or rows.shape[1] % 2:
        raise ValueError(f"rows must be (n, even d), not {tuple(rows.shape)}")
    scales = (rows.abs().amax(1) * _CLIP / (_LEVELS / 2 - 0.5)).clamp(min=1e-7).half()
    steps = (rows / scales.float()[:, None] - 0.5).round().clamp(-8, 7) + 8
    low, high = steps.to(torch.uint8).unflatten(1, (-1, 2)).unbind(-1)
    return low | (high << 4), scales


def unpack(packed: Tensor, scales: Tensor) -> Tensor:
    """Return float32 `(n, d)`."""
    steps = torch.stack([packed & 15, packed >> 4], -1).flatten(1).float() - 7.5
    return steps * scales.float()[:, None]


def cosine_basis(size: int) -> Tensor:
    """Return the orthonormal DCT-II matrix `(size, size)`.

    In it a vector's energy is spread over all entries, which is what four bits need; multiply by
    the transpose to pack and by the matrix to get back.
    """
    place = torch.arange(size, dtype=torch.float64)
    matrix = torch.cos(math.pi * (place[None] + 0.5) * place[:, None] / size) * math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix.float()
