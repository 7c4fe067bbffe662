"""A checked call to our kernels: straight in eager code, as an operator where torch compiles."""

from __future__ import annotations

import torch
from torch import Tensor

from polyzoo.attention.operators import Attend, attention_forward, run_forward
from polyzoo.attention.types import Call, DecomposedBias


def attend(call: Call, kernels: str) -> tuple[Tensor, Tensor | None]:
    """Serve a checked call with our kernels, eager or compiled, with or without gradients.

    Args:
        call: The call.
        kernels: "triton" or "cuda".
    """
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
        kernels,
        needs_grad and call.q.dtype != torch.float32,
    )
    if torch.compiler.is_compiling():
        out, lse, _ = attention_forward(*arguments)
        return out, lse.detach()
    if needs_grad:
        return Attend.apply(*arguments)  # pyright: ignore[reportReturnType]
    out, lse, _ = run_forward(*arguments)
    return out, lse
