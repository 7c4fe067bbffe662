"""Work lists built on the device: tiles of a dense mask, tiles of packed sequences.

Both depend only on tensors that all layers of a model share, so they are kept per tensor until it
changes. Nothing here waits for the GPU.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from polyzoo.attention.kernels.graph_memory import borrowed_memory
from polyzoo.attention.kernels.problem import strides
from polyzoo.attention.kernels.triton_masks import classify_kernel

_Built = TypeVar("_Built")


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

    return _kept(mask, ("mask", n, m, block_m, block_n, by_key), build)


def packed_schedule(cu: Tensor, *, total: int, block: int) -> Tensor:
    """Sequence and tile number of every program of a packed call: int32 `(slots, 2)`.

    The number of slots is an upper bound known without asking the GPU; unused slots hold -1.
    """

    def build() -> Tensor:
        sequences = cu.shape[0] - 1
        slots = total // block + sequences
        tiles = (cu[1:] - cu[:-1] + (block - 1)) // block
        ends = torch.cumsum(tiles, 0)
        slot = torch.arange(slots, device=cu.device)
        sequence = torch.searchsorted(ends, slot, right=True)
        used = sequence < sequences
        at = sequence.clamp(max=max(sequences - 1, 0))
        tile = slot - (ends - tiles)[at]
        unused = torch.full_like(slot, -1)
        rows = [torch.where(used, at, unused), torch.where(used, tile, unused)]
        return torch.stack(rows, dim=-1).to(torch.int32).contiguous()

    return _kept(cu, ("packed", total, block), build)


class _Cache:
    """Derived values per tensor, dropped with the tensor or when it changes in place."""

    def __init__(self) -> None:
        self._entries: dict[int, tuple[weakref.ref[Tensor], int, dict[object, object]]] = {}

    def values(self, tensor: Tensor) -> dict[object, object]:
        """What is kept for a tensor as it is now."""
        number = id(tensor)
        entry = self._entries.get(number)
        if entry is not None and entry[0]() is tensor and entry[1] == tensor._version:
            return entry[2]
        kept: dict[object, object] = {}
        reference = weakref.ref(tensor, lambda _: self._entries.pop(number, None))
        self._entries[number] = (reference, tensor._version, kept)
        return kept


_CACHE = _Cache()


def _kept(tensor: Tensor, key: object, build: Callable[[], _Built]) -> _Built:
    """Build once per tensor; again for tensors whose changes cannot be seen.

    Inference tensors have no version counter, and a graph being captured must hold the building
    itself, since a replay may see other contents.
    """
    if borrowed_memory(tensor.device) or tensor.is_inference():
        return build()
    # Views are made anew by every call; they share their base's version counter.
    root = tensor if tensor._base is None else tensor._base
    values = _CACHE.values(root)
    place = (key, tensor.storage_offset(), tensor.shape, tensor.stride())
    if place not in values:
        values[place] = build()
    return cast(_Built, values[place])
