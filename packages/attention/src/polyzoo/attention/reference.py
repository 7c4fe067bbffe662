"""The slow, obviously right version: fp32 (fp64 for fp64 inputs), one matrix of scores."""

from __future__ import annotations

import torch
from torch import Tensor

from polyzoo.attention.masks import visible_keys
from polyzoo.attention.philox import keep_mask
from polyzoo.attention.types import Call, DecomposedBias


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """Attend; returns the output and the log-sum-exp. Gradients come from autograd."""
    if call.cu_seqlens is not None:
        return _packed(call)
    q, k = call.q, call.k
    visible = visible_keys(
        q.shape[2],
        k.shape[2],
        left=call.left,
        right=call.right,
        kv_lens=call.kv_lens,
        mask=call.mask,
        device=q.device,
    )
    keep = None
    if call.rng is not None:
        keep = keep_mask(
            call.rng,
            batch=torch.arange(q.shape[0], device=q.device),
            heads=q.shape[1],
            queries=torch.arange(q.shape[2], device=q.device),
            keys=k.shape[2],
            dropout=call.dropout,
        )
    bias = call.bias.dense() if isinstance(call.bias, DecomposedBias) else call.bias
    return attend(
        q, k, call.v, visible=visible, bias=bias, scale=call.scale, keep=keep, dropout=call.dropout
    )


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    visible: Tensor | None,
    bias: Tensor | None,
    scale: float,
    keep: Tensor | None = None,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Compute `softmax(scale * q k^T + bias) v` over the visible keys.

    Args:
        q: `(b, h, n, d)`.
        k: `(b, hk, m, d)`; query head i uses key head `i // (h // hk)`.
        v: `(b, hk, m, dv)`.
        visible: bool, broadcastable to `(b, h, n, m)`; a row that sees nothing gives zeros.
        bias: floating, broadcastable to `(b, h, n, m)`.
        scale: Multiplies the scores.
        keep: bool `(b, h, n, m)`, the probabilities that dropout leaves.
        dropout: The probability it was drawn with.

    Returns:
        `(b, h, n, dv)` in q's dtype, laid out as `(b, n, h, dv)`; and the lse, `(b, h, n)`, not
        differentiable.
    """
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    batch, heads, n, m = q.shape[0], q.shape[1], q.shape[2], k.shape[2]
    group = heads // k.shape[1] if k.shape[1] else 1
    keys = k.to(work).repeat_interleave(group, dim=1)
    values = v.to(work).repeat_interleave(group, dim=1)
    if visible is not None:
        # What no query sees must not leak: 0 * inf is NaN.
        seen = visible.expand(batch, heads, n, m).any(dim=2).unsqueeze(-1)
        keys = keys.masked_fill(~seen, 0.0)
        values = values.masked_fill(~seen, 0.0)
    scores = (q.to(work) @ keys.transpose(-1, -2)) * scale
    if bias is not None:
        scores = scores + bias.to(work)
    if visible is not None:
        scores = scores.masked_fill(~visible, -torch.inf)
    if m == 0:
        top = scores.new_full((batch, heads, n, 1), -torch.inf)
    else:
        top = scores.detach().amax(dim=-1, keepdim=True)
    shift = top.masked_fill(top == -torch.inf, 0.0)
    exponentials = torch.exp(scores - shift)
    total = exponentials.sum(dim=-1, keepdim=True)
    probabilities = exponentials / total.masked_fill(total == 0, 1.0)
    lse = (shift + total.detach().log()).squeeze(-1)
    if keep is not None:
        probabilities = torch.where(keep, probabilities / (1.0 - dropout), 0.0)
    out = (probabilities @ values).to(q.dtype)
    return out.transpose(1, 2).contiguous().transpose(1, 2), lse


def _packed(call: Call) -> tuple[Tensor, Tensor]:
    assert call.cu_seqlens is not None  # noqa: S101 - our caller's promise
    q, k, v = call.q, call.k, call.v
    starts_q, starts_k = call.cu_seqlens.starts()
    # The empty start keeps every input in the graph, whatever the sequences hold.
    nothing = (tensor[:, :, :0] for tensor in (q, k, v))
    outs, lses = ([part] for part in attend(*nothing, visible=None, bias=None, scale=call.scale))
    for index in range(call.cu_seqlens.sequences):
        q0, q1 = starts_q[index], starts_q[index + 1]
        k0, k1 = starts_k[index], starts_k[index + 1]
        n, m = q1 - q0, k1 - k0
        visible = visible_keys(
            n,
            m,
            left=call.left,
            right=call.right,
            kv_lens=None,
            mask=None,
            device=q.device,
        )
        keep = None
        if call.rng is not None:
            keep = keep_mask(
                call.rng,
                batch=torch.full((1,), index, device=q.device),
                heads=q.shape[1],
                queries=torch.arange(n, device=q.device),
                keys=m,
                dropout=call.dropout,
            )
        out, lse = attend(
            q[:, :, q0:q1],
            k[:, :, k0:k1],
            v[:, :, k0:k1],
            visible=visible,
            bias=None,
            scale=call.scale,
            keep=keep,
            dropout=call.dropout,
        )
        outs.append(out)
        lses.append(lse)
    # One memory layout whatever the parts: (1, T, h, dv).
    out = torch.cat([part.transpose(1, 2) for part in outs], dim=1).transpose(1, 2)
    return out, torch.cat(lses, dim=2)
