"""Which tile sizes a call gets: a measured table where there is one, safe sizes elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch

from polyzoo.attention.kernels.problem import Problem

Kind = Literal["forward", "backward_q", "backward_kv", "backward_bias", "decode"]


@dataclass(frozen=True, slots=True)
class TileConfig:
    """Launch sizes of one kernel."""

    block_m: int
    """Queries per tile."""
    block_n: int
    """Keys per tile."""
    warps: int
    stages: int
    """Tiles in flight."""
    tma: bool = False
    """Read keys and values with the bulk copy engine of sm_90, where strides allow."""


@lru_cache(maxsize=64)
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 1 where kernels are interpreted."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def choose_config(kind: Kind, problem: Problem) -> TileConfig:
    """Tile sizes for a call."""
    return default_config(kind, problem)


def default_config(kind: Kind, problem: Problem) -> TileConfig:
    """Sizes that work for every head dimension, on sm_80 and later.

    Eight warps only where the rows of the products number 128: with fewer, Triton 3.6 reads outside
    its shared memory on sm_90.
    """
    d = max(problem.q.shape[-1], problem.v.shape[-1])
    if problem.q.device.type != "cuda":
        return TileConfig(16, 16, 4, 1)
    if problem.q.dtype == torch.float32:
        return TileConfig(32, 32, 4, 1) if d <= 128 else TileConfig(16, 16, 4, 1)
    if kind == "decode":
        return TileConfig(16, 64, 4, 2)
    if d > 128:
        return TileConfig(64, 32, 4, 2) if kind == "forward" else TileConfig(32, 32, 4, 2)
    return TileConfig(64, 64 if kind != "backward_q" else 32, 4, 2)
