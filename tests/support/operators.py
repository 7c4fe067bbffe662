"""Which operators run, and with which shapes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

KERNEL = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


class Recorder(TorchDispatchMode):
    """Notes what attention kernels get, and the largest tensor that any operator makes."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: list[tuple[torch.dtype, tuple[int, ...], tuple[int, ...]]] = []
        self.masks: list[tuple[int, ...]] = []
        self.backward: list[torch.dtype] = []
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is KERNEL:
            self.kernels.append((args[0].dtype, tuple(args[0].shape), tuple(args[1].shape)))
            mask = (kwargs or {}).get("attn_mask")
            if mask is not None:
                self.masks.append(tuple(mask.shape))
        if func is BACKWARD:
            self.backward.append(args[0].dtype)
        if isinstance(result, Tensor) and result._base is None:
            self.largest = max(self.largest, result.untyped_storage().nbytes() // 4)
        return result
