"""Which program takes which tile of which packed sequence. Nothing here waits for the GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from polyzoo.attention.kernels.kept import kept
from polyzoo.attention.kernels.problem import Problem


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

    return kept(cu, ("packed", total, block), build)


def query_programs(problem: Problem, block: int) -> tuple[int, int]:
    """Slots of a packed call's schedule, and the number of programs over query tiles."""
    if problem.cu_q is None:
        return 0, -(-problem.queries // block) * problem.heads * problem.batch
    slots = problem.queries // block + problem.cu_q.shape[0] - 1
    return slots, slots * problem.heads


def schedule(cu: Tensor | None, total: int, block: int) -> Tensor | None:
    """Sequence and tile of every program of a packed call."""
    return None if cu is None else packed_schedule(cu, total=total, block=block)
