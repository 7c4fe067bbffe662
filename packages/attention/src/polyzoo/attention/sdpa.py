"""The backend on torch's scaled dot product attention: any device, forward and backward."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from polyzoo.attention import ragged, varlen
from polyzoo.attention.dropout import attend_with_dropout
from polyzoo.attention.limits import MATRIX_LIMIT, matrix_error
from polyzoo.attention.masks import band_mask, effective_band
from polyzoo.attention.sdpa_kernel import scaled_dot_product
from polyzoo.attention.types import Call, DecomposedBias

_MASK_TILE = 1 << 22
_BAND_ROWS = (64, 512)


def forward(call: Call) -> tuple[Tensor, Tensor | None]:
    """Attend; returns the output, laid out as `(b, n, h, dv)`, and the lse if asked for."""
    if call.q.shape[2] == 0:
        out, lse = attend_dense(call._replace(cu_seqlens=None, kv_lens=None))
    elif call.rng is not None:
        out, lse = attend_with_dropout(call)
    elif call.cu_seqlens is not None:
        out, lse = ragged.attend_packed(call, attend_dense)
    elif call.kv_lens is not None:
        out, lse = ragged.attend_kv_lens(call, attend_dense)
    else:
        out, lse = attend_dense(call)
    heads, channels = out.shape[1], out.shape[3]
    if out.stride()[1:] != (channels, heads * channels, 1):
        out = out.transpose(1, 2).contiguous().transpose(1, 2)
    return out, lse


def attend_dense(call: Call) -> tuple[Tensor, Tensor | None]:
    """Attend with as many keys for every batch item: no kv_lens, no packing, no dropout."""
    q, k, v, left, right = call.q, call.k, call.v, call.left, call.right
    n, m = q.shape[2], k.shape[2]
    if left >= 0 or right >= 0:
        left, right = effective_band(n, m, left, right)
    banded = left >= 0 or right >= 0
    plain = call.mask is None and call.bias is None
    served = plain and (banded or call.want_lse) and varlen.serves(q, k, v)
    square = plain and n == m and right == 0 and left < 0
    if served and (call.want_lse or not square):
        return varlen.attend_uniform(call)  # masks by position, and gives its lse
    if not banded or square:
        return scaled_dot_product(
            q,
            k,
            v,
            attn_mask=None if plain else _additive(call.mask, _bias(call), q),
            is_causal=banded,
            scale=call.scale,
            want_lse=call.want_lse,
        )
    return _in_row_blocks(call, left, right)


def _in_row_blocks(call: Call, left: int, right: int) -> tuple[Tensor, Tensor | None]:
    """Attend some queries at a time, each block over only the keys its band can reach."""
    q, k, v, mask = call.q, call.k, call.v, call.mask
    bias = _bias(call)
    n, m = q.shape[2], k.shape[2]
    delta = m - n
    if _needs_grad(call) and n * m * q.element_size() > MATRIX_LIMIT and (left < 0 or right < 0):
        _too_large(call, n * m * q.element_size())
    rows = _block_rows(n, m, left, right)
    outs: list[Tensor] = []
    lses: list[Tensor] = []
    for queries, start in zip(q.split(rows, dim=2), range(0, max(n, 1), rows), strict=True):
        stop = start + queries.shape[2]
        low = min(m, max(0, start + delta - left)) if left >= 0 else 0
        high = max(low, min(m, stop + delta + right)) if right >= 0 else m
        visible = band_mask(
            torch.arange(start, stop, device=q.device),
            torch.arange(low, high, device=q.device),
            delta=delta,
            left=left,
            right=right,
        )[None, None]
        if mask is not None:
            visible = visible & _tile(mask, start, stop, low, high)
        tile_bias = None if bias is None else _tile(bias, start, stop, low, high)
        out, lse = scaled_dot_product(
            queries,
            k[:, :, low:high],
            v[:, :, low:high],
            attn_mask=_additive(visible, tile_bias, q),
            is_causal=False,
            scale=call.scale,
            want_lse=call.want_lse,
        )
        outs.append(out)
        if lse is not None:
            lses.append(lse)
    if len(outs) == 1:
        return outs[0], lses[0] if lses else None
    joined = torch.cat([out.transpose(1, 2) for out in outs], dim=1).transpose(1, 2)
    return joined, torch.cat(lses, dim=2) if lses else None


def _block_rows(n: int, m: int, left: int, right: int) -> int:
    width = left + right + 1
    if left >= 0 and right >= 0 and 2 * width <= m:
        return min(max(width, _BAND_ROWS[0]), _BAND_ROWS[1])
    return max(n, 1) if n * m <= _MASK_TILE else max(_BAND_ROWS[0], _MASK_TILE // m)


def _tile(matrix: Tensor, start: int, stop: int, low: int, high: int) -> Tensor:
    """Cut rows and columns out of a matrix whose axes may be broadcast."""
    if matrix.shape[2] != 1:
        matrix = matrix[:, :, start:stop]
    return matrix if matrix.shape[3] == 1 else matrix[:, :, :, low:high]


def _bias(call: Call) -> Tensor | None:
    return call.bias.dense() if isinstance(call.bias, DecomposedBias) else call.bias


def _additive(mask: Tensor | None, bias: Tensor | None, q: Tensor) -> Tensor | None:
    """Join mask and bias into what torch's function takes."""
    if bias is None:
        return mask
    if bias.dtype != q.dtype:
        # The CPU kernels add an fp32 bias to half-precision scores; the CUDA ones need q's dtype.
        half = q.dtype in (torch.float16, torch.bfloat16)
        bias = bias.to(torch.float32 if half and not q.is_cuda else q.dtype)
    if mask is None:
        return bias
    size = bias.element_size()
    for axis in range(4):
        size *= max(mask.shape[axis], bias.shape[axis])
    if size > MATRIX_LIMIT:
        raise matrix_error(
            "mask together with bias",
            size,
            "write -inf into the bias, or use kv_lens / causal / window for the mask",
        )
    return bias.masked_fill(~mask, -torch.inf)


def _needs_grad(call: Call) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in (call.q, call.k, call.v))


def _too_large(call: Call, size: int) -> NoReturn:
    forced = "causal with fewer queries than keys" if call.right == 0 else "an open window"
    raise matrix_error(
        f"{forced}, with gradients, on this device and dtype,",
        size,
        "use equal numbers of queries and keys, bound the window on both sides, "
        "or run in fp16/bf16 on a GPU",
    )
