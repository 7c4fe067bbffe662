"""One call of torch's scaled dot product attention, with its traps avoided and the lse it hides."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from polyzoo.attention.masks import band_mask
from polyzoo.attention.merge import merge_states

GROUP_PACKING_QUERIES = 16
"""Up to so many queries, grouped heads become further queries of their key head."""
_WIDEN_KEYS = 1024
_LSE_SCORES = 1 << 24


def scaled_dot_product(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
    want_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """Attend with torch's kernel for the device.

    Args:
        q: `(b, h, n, d)`.
        k: `(b, hk, m, d)`.
        v: `(b, hk, m, dv)`.
        attn_mask: 4-d, bool (True attends) or additive; None is all.
        is_causal: Only for n == m: torch aligns other shapes at the top left.
        scale: Multiplies the scores.
        want_lse: Compute the log-sum-exp too.

    Returns:
        Output, and the lse or None. A row that sees nothing gives zeros, -inf and no gradient.
    """
    if not (q.shape[0] and q.shape[1] and q.shape[2] and k.shape[2]):
        return _nothing(q, k, v, attn_mask, want_lse)
    grouped = False
    if q.shape[1] != k.shape[1]:  # spelled out: with symbolic sizes a comparison is no bool
        grouped = True
    if grouped and not is_causal and q.shape[2] <= GROUP_PACKING_QUERIES:
        packed = _pack_groups(q, k, attn_mask)
        if packed is not None:
            out, lse = scaled_dot_product(
                packed[0],
                k,
                v,
                attn_mask=packed[1],
                is_causal=False,
                scale=scale,
                want_lse=want_lse,
            )
            shape = q.shape[:3]
            return out.reshape(*shape, v.shape[3]), None if lse is None else lse.reshape(shape)
    if q.device.type == "cpu" and _widens(q, k, v):
        return _half_on_cpu(q, k, v, attn_mask, is_causal, scale, want_lse)
    if grouped and q.is_cuda and (attn_mask is not None or q.dtype == torch.float32):
        # No fused kernel takes grouped heads here; the fallback would hold the n x m scores.
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
        grouped = False
    alive = None
    if attn_mask is not None and (q.is_cuda or want_lse):
        seen = attn_mask if attn_mask.dtype == torch.bool else attn_mask > -torch.inf
        alive = seen.any(dim=-1, keepdim=True)
        if q.is_cuda:
            # Not every CUDA kernel survives a row without keys: let it see all, drop the result.
            fill = True if attn_mask.dtype == torch.bool else 0.0
            attn_mask = attn_mask.masked_fill(~alive, fill)
    lse = None
    if want_lse and _has_cpu_kernel(q, v, attn_mask):
        out, lse = _cpu_kernel(q, k, v, attn_mask, is_causal, scale)
    else:
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=attn_mask, is_causal=is_causal, scale=scale, enable_gqa=grouped
        )
        if want_lse:
            lse = _lse_in_blocks(q, k, attn_mask, is_causal, scale)
    if alive is not None:
        if q.is_cuda:
            out = torch.where(alive, out, 0.0)
        if lse is not None:
            lse = lse.masked_fill(~alive.squeeze(-1), -torch.inf)
    return out, lse


def _nothing(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, want_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Answer without keys or without queries: zeros, from which zero gradients reach every input.

    torch's kernels divide by both lengths, or leave inputs out of the graph.
    """
    inputs = [q, k, v]
    if attn_mask is not None and attn_mask.is_floating_point():
        inputs.append(attn_mask.to(q.dtype))
    zero = torch.stack([tensor[..., :0].sum() for tensor in inputs]).sum()
    out = zero.expand(q.shape[0], q.shape[2], q.shape[1], v.shape[3]).contiguous().transpose(1, 2)
    if not want_lse:
        return out, None
    dtype = torch.promote_types(q.dtype, torch.float32)
    return out, torch.full(q.shape[:3], -torch.inf, dtype=dtype, device=q.device)


def _wants_grad(q: Tensor, k: Tensor, v: Tensor) -> bool:
    return torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)


def _widens(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Tell whether a CPU computes this better in fp32.

    fp16 always: CPUs without fp16 arithmetic convert one number at a time. bf16 for training:
    torch's backward is slower in bf16 than in fp32, and its errors exceed those of rounding.
    """
    if q.dtype == torch.bfloat16:
        return _wants_grad(q, k, v)
    return q.dtype == torch.float16


def _pack_groups(
    q: Tensor, k: Tensor, attn_mask: Tensor | None
) -> tuple[Tensor, Tensor | None] | None:
    """Lay the heads of a group beside its queries, or None where the mask tells them apart."""
    per_head = attn_mask is not None and attn_mask.shape[1] != 1
    per_query = attn_mask is not None and attn_mask.shape[2] != 1 and q.shape[2] != 1
    if per_head or per_query:
        return None
    b, h, n, d = q.shape
    return q.reshape(b, k.shape[1], h // k.shape[1] * n, d), attn_mask


def _has_cpu_kernel(q: Tensor, v: Tensor, attn_mask: Tensor | None) -> bool:
    return (
        q.device.type == "cpu"
        and q.shape[3] == v.shape[3]
        and (attn_mask is None or not attn_mask.requires_grad)
    )


def _cpu_kernel(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Call the operator behind torch's function: it returns the lse that the function drops."""
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        zero = torch.zeros((), dtype=q.dtype, device=q.device)
        attn_mask = torch.where(attn_mask, zero, -torch.inf)
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, is_causal, attn_mask=attn_mask, scale=scale
    )


def _lse_in_blocks(
    q: Tensor, k: Tensor, attn_mask: Tensor | None, is_causal: bool, scale: float
) -> Tensor:
    """Compute the lse apart, some rows at a time: for kernels that do not give theirs."""
    b, h, n, m = q.shape[0], q.shape[1], q.shape[2], k.shape[2]
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    rows = max(1, _LSE_SCORES // max(1, b * h * m))
    with torch.no_grad():
        keys = k.to(work).repeat_interleave(h // k.shape[1], dim=1).transpose(-1, -2)
        parts = []
        for start in range(0, n, rows):
            block = q[:, :, start : start + rows]
            scores = (block.to(work) @ keys) * scale
            if is_causal:
                positions = torch.arange(start, start + block.shape[2], device=q.device)
                visible = band_mask(
                    positions, torch.arange(m, device=q.device), delta=0, left=-1, right=0
                )
                scores = scores.masked_fill(~visible, -torch.inf)
            if attn_mask is not None:
                tile = attn_mask
                if attn_mask.shape[2] != 1:
                    tile = attn_mask[:, :, start : start + rows]
                if tile.dtype == torch.bool:
                    scores = scores.masked_fill(~tile, -torch.inf)
                else:
                    scores = scores + tile
            parts.append(torch.logsumexp(scores, dim=-1))
        return torch.cat(parts, dim=2)


def _half_on_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
    want_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """Compute half precision in fp32."""
    m = k.shape[2]
    if attn_mask is not None and attn_mask.dtype == q.dtype:
        attn_mask = attn_mask.float()
    decoding = q.shape[2] <= GROUP_PACKING_QUERIES and m > _WIDEN_KEYS and attn_mask is None
    if not decoding or _wants_grad(q, k, v) or is_causal:
        out, lse = scaled_dot_product(
            q.float(),
            k.float(),
            v.float(),
            attn_mask=attn_mask,
            is_causal=is_causal,
            scale=scale,
            want_lse=want_lse,
        )
        return out.to(q.dtype), lse
    # A long cache is widened piece by piece, so that the fp32 copy stays in the CPU's cache.
    parts = [
        scaled_dot_product(
            q.float(),
            k[:, :, start : start + _WIDEN_KEYS].float(),
            v[:, :, start : start + _WIDEN_KEYS].float(),
            attn_mask=None,
            is_causal=False,
            scale=scale,
            want_lse=True,
        )
        for start in range(0, m, _WIDEN_KEYS)
    ]
    out, lse = merge_states([part[0] for part in parts], [part[1] for part in parts])  # pyright: ignore[reportArgumentType]
    return out.to(q.dtype), lse if want_lse else None
