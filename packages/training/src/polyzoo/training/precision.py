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
    """Make trainable parameters fp32 in place, so that small updates are not rounded away.

    The running statistics beside them follow: a layer computes with both.
    """
    for module in model.modules():
        trained = [p for p in module.parameters(recurse=False) if p.requires_grad]
        for tensor in (*trained, *(module.buffers(recurse=False) if trained else ())):
            if tensor.is_floating_point():
                tensor.data = tensor.data.float()


def freeze(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Take a module's parameters out of training, in place, and store them in the compute dtype.

    Layers with running statistics stay as they are: rounding those would shift their output.
    """
    module.requires_grad_(False)
    for part in module.modules():
        if any(buffer.is_floating_point() for buffer in part.buffers(recurse=False)):
            continue
        for parameter in part.parameters(recurse=False):
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
    return module


def build_frozen(
    builders: Mapping[str, nn.Module | Callable[[], nn.Module]],
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, nn.Module]:
    """Build the modules that a step uses but does not train, in eval mode on the device."""
    return {
        name: freeze(made if isinstance(made, nn.Module) else made(), dtype).eval().to(device)
        for name, made in builders.items()
    }
