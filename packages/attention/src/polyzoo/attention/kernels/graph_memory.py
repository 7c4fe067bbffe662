"""Whether what is allocated now may be kept for later calls."""

from __future__ import annotations

import sys

import torch


def borrowed_memory(device: torch.device) -> bool:
    """Tell whether new tensors live in memory that a CUDA graph will use again.

    So it is while a graph is captured, and in the warm-up of torch.compile's graph trees, which
    check that nothing but outputs stays.
    """
    if device.type != "cuda":
        return False
    if torch.cuda.is_current_stream_capturing():
        return True
    trees = sys.modules.get("torch._inductor.cudagraph_trees")
    if trees is None:
        return False
    index = torch.cuda.current_device() if device.index is None else device.index
    return trees.get_manager(index, create_if_none_exists=False) is not None
