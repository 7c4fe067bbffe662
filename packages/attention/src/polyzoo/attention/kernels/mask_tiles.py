"""Work lists built on the device: which tiles a dense mask leaves.

They depend only on the mask, which all layers of a model share, so they are kept per tensor until
it changes. Nothing here waits for the GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from polyzoo.attention.kernels.kept import kept
from polyzoo.attention.kernels.problem import strides
from polyzoo.attention.kernels.triton_masks import classify_kernel


@dataclass(frozen=True, eq=False)
class MaskTiles:
    """For every row of tiles: the tiles the mask leaves whole, then those it cuts."""

    index: Tensor
    """int32 `(mask b, mask h, rows, tiles)`: tile numbers, full ones first, then partial ones."""
    counts: Tensor
    """int32 `(mask b, mask h, rows, 2)`: how many are full and how many partial."""


def classify_mask(mask: Tensor, *, n: int, m: int, block_m: int, block_n: int) -> Tensor:
    """State of every tile of a bool mask `(mask b, mask h, n or 1, m or 1)`, int8.

    A mask that is the same for all queries has one row of tiles.
    """
    if mask.shape[2] == 1:
        n, block_m = 1, 1
    b, h = mask.shape[:2]
    grid = (b, h, -(-n // block_m), -(-m // block_n))
    state = torch.empty(grid, dtype=torch.int8, device=mask.device)
    if state.numel():
        bytes_of = mask.view(torch.uint8)
        s_b, s_h, s_n, s_m = strides(mask, 4)
        start: Any = classify_kernel[(state.numel(),)]
        start(bytes_of, state, s_b, s_h, s_n, s_m, h, n, m, BM=block_m, BN=block_n)
    return state


def mask_tiles(
    mask: Tensor, *, n: int, m: int, block_m: int, block_n: int, by_key: bool = False
) -> MaskTiles:
    """Lists of key tiles per query tile, or of query tiles per key tile (`by_key`)."""

    def build() -> MaskTiles:
        # A mask broadcast over queries has one row; per key tile it needs the whole column.
        whole = mask.expand(-1, -1, n, -1) if by_key else mask
        state = classify_mask(whole, n=n, m=m, block_m=block_m, block_n=block_n)
        if by_key:
            state = state.transpose(-1, -2)
        order = torch.where(state == 0, 3, state.to(torch.int32))
        index = torch.argsort(order, dim=-1, stable=True).to(torch.int32).contiguous()
        counts = torch.stack([(state == 1).sum(-1), (state == 2).sum(-1)], dim=-1)
        return MaskTiles(index, counts.to(torch.int32).contiguous())

    return kept(mask, ("mask", n, m, block_m, block_n, by_key), build)
