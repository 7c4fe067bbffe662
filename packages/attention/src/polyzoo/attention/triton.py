"""The backend on our Triton kernels: NVIDIA GPUs from sm_80 on."""

from __future__ import annotations

import importlib.util
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from polyzoo.attention.attending import attend
from polyzoo.attention.features import BIT
from polyzoo.attention.types import Call

if TYPE_CHECKING:
    from polyzoo.attention.registry import Request

HEAD_DIM_LIMIT = 256
_CUDNN_HEADS = (64, 128)
"""Head sizes at which cuDNN beat these kernels on an H100; at 72 to 96 it did not."""
_CUDNN_VERSION = 90900
_CUDNN = BIT["causal"] | BIT["gqa"]
_FP32_BY_TORCH = _CUDNN | BIT["kv_lens"] | BIT["dv_ne_d"]


@cache
def unavailable() -> str | None:
    """Say why the kernels cannot be compiled here, or return None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; torch's CUDA builds for Linux bring it"
    return None


def serves_head(d: int) -> bool:
    """Tell whether the kernels take a head size."""
    return 8 <= d <= HEAD_DIM_LIMIT and d % 8 == 0


def kept_back(request: Request) -> str | None:
    """Say why torch's function is the faster choice for a request, or return None.

    Its CUDA kernels are not reproducible backward, so what has gradients stays here.
    """
    asked = request.features
    if asked & BIT["backward"]:
        return None
    if not request.long_square:
        return None
    if request.dtype == torch.float32:
        # Products of full precision have no tensor cores here. On an H100 they made SAM's encoder
        # slower (47 ms) than the n x m matrices of the original do (23 ms).
        return None if asked & ~_FP32_BY_TORCH else "fp32 without gradients: slow products"
    if asked & ~_CUDNN or request.head_dim not in _CUDNN_HEADS:
        return None
    if request.value_dim != request.head_dim or not _has_cudnn(request.device):
        return None
    return "cuDNN, which torch's function takes here, is faster at this head size"


@cache
def _has_cudnn(device: torch.device) -> bool:
    """Whether torch's function prefers cuDNN's kernel: on Hopper, where nothing switched it off."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return False
    return (
        torch.cuda.get_device_capability(device) == (9, 0)
        and torch.backends.cuda.cudnn_sdp_enabled()
        and (torch.backends.cudnn.version() or 0) >= _CUDNN_VERSION
    )


def forward(call: Call) -> tuple[Tensor, Tensor | None]:
    """Attend; differentiable, deterministic, without any n x m tensor."""
    return attend(call, "triton")
