"""The backend on our Triton kernels: NVIDIA GPUs from sm_80 on."""

from __future__ import annotations

import importlib.util
from functools import cache

from torch import Tensor

from polyzoo.attention import operators
from polyzoo.attention.types import Call

HEAD_DIM_LIMIT = 256


@cache
def unavailable() -> str | None:
    """Say why the kernels cannot be compiled here, or return None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; torch's CUDA builds for Linux bring it"
    return None


def serves_head(d: int) -> bool:
    """Tell whether the kernels take a head size."""
    return 8 <= d <= HEAD_DIM_LIMIT and d % 8 == 0


def forward(call: Call) -> tuple[Tensor, Tensor | None]:
    """Attend; differentiable, deterministic, without any n x m tensor."""
    return operators.attend(call, "triton")
