"""The backend on our Triton kernels: NVIDIA GPUs from sm_80 on."""

from __future__ import annotations

import importlib.util
from functools import cache

import torch
from torch import Tensor

from polyzoo.attention import operators
from polyzoo.attention.types import Call, DecomposedBias

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
    packed = call.cu_seqlens
    bias, rel_h, rel_w = call.bias, None, None
    if isinstance(bias, DecomposedBias):
        bias, rel_h, rel_w = None, bias.rel_h, bias.rel_w
    differentiable = (call.q, call.k, call.v, bias, rel_h, rel_w)
    needs_grad = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in differentiable
    )
    arguments = (
        *differentiable,
        call.mask,
        call.kv_lens,
        None if packed is None else packed.q,
        None if packed is None else packed.k,
        call.rng,
        0 if packed is None else packed.max_q,
        0 if packed is None else packed.max_k,
        call.scale,
        call.left,
        call.right,
        call.dropout,
        needs_grad and call.q.dtype != torch.float32,
    )
    if torch.compiler.is_compiling():
        out, lse, _ = operators.attention_forward(*arguments)
        return out, lse.detach()
    if needs_grad:
        return operators.Attend.apply(*arguments)  # pyright: ignore[reportReturnType]
    out, lse, _ = operators.run_forward(*arguments)
    return out, lse
