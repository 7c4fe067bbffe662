"""Which dtype the forward pass computes in; master weights are always fp32."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from polyzoo.training.config import Precision

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def compute_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """Return the dtype of the forward pass; auto is bf16 on CUDA and fp32 elsewhere."""
    if precision == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return _DTYPES[precision]


def forward_context(dtype: torch.dtype, device: torch.device) -> AbstractContextManager[object]:
    """Return the context a forward pass runs in."""
    if dtype == torch.float32:
        return nullcontext()
    return torch.autocast(device.type, dtype=dtype)


def keep_masters_fp32(model: nn.Module) -> None:
    """Make trainable parameters fp32 in place, so that small updates are not rounded away."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.is_floating_point():
            parameter.data = parameter.data.float()


def freeze(module: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Return the module ready for use beside training: no gradients, eval mode, compute dtype."""
    return module.requires_grad_(False).eval().to(device=device, dtype=dtype)


def build_frozen(
    builders: Mapping[str, nn.Module | Callable[[], nn.Module]],
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, nn.Module]:
    """Build and freeze the modules that a step uses but does not train."""
    return {
        name: freeze(made if isinstance(made, nn.Module) else made(), device, dtype)
        for name, made in builders.items()
    }
