"""Start the int8 forward pass: means of the keys, quantising, attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from polyzoo.attention.kernels.problem import Problem, alignment, heads_last, strides
from polyzoo.attention.kernels.tiles import head_blocks
from polyzoo.attention.kernels.triton_int8 import int8_kernel, quantize_kernel

_LEAST_WIDTH = 32  # of an int8 product's inner side


def forward(problem: Problem) -> tuple[Tensor, Tensor]:
    """Attention and log-sum-exp, as `launch.forward`; no mask, bias, window, packing or dropout."""
    problem = problem.aligned
    q, k, v = problem.q, problem.k, problem.v
    out = heads_last(q, v.shape[-1])
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    if lse.numel() == 0:
        return out, lse
    if problem.keys == 0:
        return out.zero_(), lse.fill_(-torch.inf)
    d = q.shape[-1]
    d0, d1 = head_blocks(max(d, _LEAST_WIDTH))
    d1 = max(d1, _LEAST_WIDTH) if d1 else 0
    block_m, block_n = (128, 64) if q.is_cuda else (16, 16)
    mean = _mean(problem)
    main = [strides(t, 3) for t in (v, out)]
    align = alignment(main)
    with torch.cuda.device_of(q):
        whole_q, q_scale = _quantize(q, None, None, d0 + d1, block_m)
        whole_k, k_scale = _quantize(k, mean, problem.kv_lens, d0 + d1, block_n)
        constants = problem.constants
        start: Any = int8_kernel[(-(-problem.queries // block_m) * problem.heads * problem.batch,)]
        start(
            whole_q,
            q_scale,
            whole_k,
            k_scale,
            v,
            out,
            lse,
            problem.kv_lens,
            *(stride // align for group in main for stride in group),
            problem.heads,
            problem.queries,
            problem.keys,
            problem.kernel_scale,
            ALIGN=align,
            D0=d0,
            D1=d1,
            BM=block_m,
            BN=block_n,
            CAUSAL=problem.right == 0,
            **{name: constants[name] for name in ("GROUP", "DV", "DV0", "DV1", "KVLENS")},
            num_warps=8 if block_m == 128 else 4,
            num_stages=3,
        )
    # The scores lost scale * q mean(k); the log-sum-exp gets it back.
    shift = torch.einsum("bhnd,bhd->bhn", q.float(), mean.repeat_interleave(problem.group, dim=1))
    return out, lse.add_(shift, alpha=problem.scale)


def _mean(problem: Problem) -> Tensor:
    """Mean of the valid keys of every head, fp32 `(b, hk, d)`."""
    k = problem.k
    if problem.kv_lens is None:
        return k.mean(dim=2, dtype=torch.float32).contiguous()
    valid = torch.arange(problem.keys, device=k.device) < problem.kv_lens[:, None]
    kept = torch.where(valid[:, None, :, None], k, torch.zeros((), dtype=k.dtype, device=k.device))
    count = problem.kv_lens.clamp(min=1)[:, None, None]
    return (kept.sum(dim=2, dtype=torch.float32) / count).contiguous()


def _quantize(
    x: Tensor, mean: Tensor | None, kv_lens: Tensor | None, width: int, block: int
) -> tuple[Tensor, Tensor]:
    b, h, n, d = x.shape
    whole = torch.empty((b, h, n, width), dtype=torch.int8, device=x.device)
    blocks = -(-n // block)
    scale = torch.empty((b, h, blocks), dtype=torch.float32, device=x.device)
    start: Any = quantize_kernel[(b * h * blocks,)]
    start(
        x,
        mean,
        whole,
        scale,
        kv_lens,
        *strides(x, 3),
        h,
        n,
        D=d,
        WIDTH=width,
        PADDED=1 << (width - 1).bit_length(),
        BLOCK=block,
        HAS_MEAN=mean is not None,
        KVLENS=kv_lens is not None,
        num_warps=4,
    )
    return whole, scale
