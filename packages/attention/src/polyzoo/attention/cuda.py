"""The backend on our CUDA C++ kernels: Volta and Turing, which Triton and flash attention left."""

from __future__ import annotations

from functools import cache

from torch import Tensor

from polyzoo.attention.attending import attend
from polyzoo.attention.types import Call

HEAD_DIM_LIMIT = 128
FEATURES = frozenset({"causal", "window", "kv_lens", "varlen", "gqa", "backward", "lse"})


@cache
def unavailable() -> str | None:
    """Say why the kernels cannot be compiled here, or return None."""
    from polyzoo.attention.kernels.nvrtc import is_installed

    if is_installed():
        return None
    return "there is no libnvrtc; torch's CUDA builds bring it, this one has none"


def serves_head(d: int) -> bool:
    """Tell whether the kernels take a head size."""
    return 8 <= d <= HEAD_DIM_LIMIT and d % 8 == 0


def forward(call: Call) -> tuple[Tensor, Tensor | None]:
    """Attend in fp16; differentiable, deterministic, without any n x m tensor."""
    return attend(call, "cuda")
