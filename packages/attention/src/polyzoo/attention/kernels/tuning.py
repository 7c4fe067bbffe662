"""Tile sizes."""
from __future__ import annotations
from dataclasses import dataclass

@dataclass(frozen=True, slots=True)
class TileConfig:
    block_m: int
    block_n: int
    warps: int
    stages: int
    tma: bool = False

def choose_config(kind, problem):
    return TileConfig(16, 16, 4, 1)

def processors(device):
    return 1
