"""Which tile sizes a call gets.

In this order: what this machine measured itself (`POLYZOO_ATTENTION_TUNE=1`, kept in a cache file),
the table measured on an H100, then sizes that work everywhere.
"""

from __future__ import annotations

import os
from dataclasses import astuple, dataclass
from functools import lru_cache
from typing import Literal

import torch

from polyzoo.attention.kernels.problem import Problem
from polyzoo.attention.kernels.tuned_h100 import BY_HEAD, H100

Kind = Literal["forward", "backward_q", "backward_kv", "backward_bias", "decode"]
_VARIABLE = "POLYZOO_ATTENTION_TUNE"
_SMALLEST, _LARGEST = 16, 4096


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


def case_key(kind: Kind, problem: Problem) -> str:
    """Name of the class of calls that share tile sizes."""
    n, m = (_bucket(length) for length in problem.longest)
    d = max(problem.q.shape[-1], problem.v.shape[-1])
    rules: list[str] = []
    if problem.left >= 0 or problem.right >= 0:
        rules.append("causal" if problem.left < 0 and problem.right == 0 else "window")
    if problem.kv_lens is not None or problem.packed:
        rules.append("lens")
    if problem.mask is not None:
        rules.append("mask")
    if problem.bias is not None:
        rules.append("bias")
    if problem.width:
        rules.append(f"grid{problem.key_block}")
    if problem.dropout:
        rules.append("dropout")
    return f"{kind}|{d}|{'+'.join(rules)}|{n}|{m}"


def choose_config(kind: Kind, problem: Problem) -> TileConfig:
    """Tile sizes for a call."""
    if problem.q.device.type != "cuda" or problem.q.dtype == torch.float32:
        return default_config(kind, problem)
    from polyzoo.attention.kernels.autotune import kept_config, tune

    config = kept_config(kind, problem)
    if config is None and os.environ.get(_VARIABLE) == "1":
        config = tune(kind, problem)
    if config is None and torch.cuda.get_device_capability(problem.q.device) == (9, 0):
        config = _measured(kind, problem)
    return config or default_config(kind, problem)


def _measured(kind: Kind, problem: Problem) -> TileConfig | None:
    sizes = H100.get(case_key(kind, problem))
    if sizes is not None:
        return TileConfig(*sizes)
    d = max(problem.q.shape[-1], problem.v.shape[-1])
    # Terms beside the scores cost registers; without a measurement small tiles are safer.
    plain = problem.width == 0 and problem.bias is None and not problem.dropout
    if plain:
        for reach, sizes in BY_HEAD.get(kind, ()):
            if d <= reach:
                return TileConfig(*sizes)
    return None


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
        return TileConfig(16, 64, 4, 3 if d <= 128 else 2)
    if problem.key_block > 128:
        return TileConfig(32, 32, 4, 1)
    if d > 128:
        return TileConfig(64, 32, 4, 2) if kind == "forward" else TileConfig(32, 32, 4, 2)
    return TileConfig(64, 64 if kind in ("forward", "backward_kv") else 32, 4, 2)


def as_list(config: TileConfig) -> list[int | bool]:
    """The sizes as JSON can hold them."""
    return list(astuple(config))


def _bucket(length: int) -> int:
    """The next power of two, within the range that matters."""
    return min(_LARGEST, max(_SMALLEST, 1 << (max(length, 1) - 1).bit_length()))
