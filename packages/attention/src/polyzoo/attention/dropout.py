"""Dropout on torch's kernels, exactly that of every backend.

torch's fused kernels draw their own numbers, so probabilities dropped as the counters say need the
matrix of scores. It exists for one chunk at a time and is computed again in the backward pass.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from polyzoo.attention.masks import visible_keys
from polyzoo.attention.philox import keep_mask
from polyzoo.attention.ragged import pad_packed, unpad
from polyzoo.attention.reference import attend
from polyzoo.attention.types import Call, DecomposedBias

_CHUNK_SCORES = {"cpu": 1 << 18, "cuda": 1 << 26}
"""Scores held at once: what fits a CPU's cache, 256 MiB of fp32 on a GPU."""


def attend_with_dropout(call: Call) -> tuple[Tensor, Tensor | None]:
    """Attend and drop; the lse is that of the probabilities before dropping."""
    if call.cu_seqlens is None:
        visible = visible_keys(
            call.q.shape[2],
            call.k.shape[2],
            left=call.left,
            right=call.right,
            kv_lens=call.kv_lens,
            mask=call.mask,
            device=call.q.device,
        )
        return _in_chunks(call, visible, 0)
    if call.q.device.type != "cpu" or torch.compiler.is_compiling():
        padded, queries = pad_packed(call)
        out, lse = _in_chunks(padded, padded.mask, 0)
        return unpad(out, queries), unpad(lse.unsqueeze(-1), queries)[..., 0]
    return _packed_on_cpu(call)


def _packed_on_cpu(call: Call) -> tuple[Tensor, Tensor]:
    assert call.cu_seqlens is not None  # noqa: S101 - our caller's promise
    starts = call.cu_seqlens.starts()
    q_sizes, k_sizes = ([end - start for start, end in pairwise(side)] for side in starts)
    outs: list[Tensor] = []
    lses: list[Tensor] = []
    parts = zip(
        call.q.split(q_sizes, 2), call.k.split(k_sizes, 2), call.v.split(k_sizes, 2), strict=True
    )
    for index, (q, k, v) in enumerate(parts):
        part = call._replace(q=q, k=k, v=v, cu_seqlens=None)
        visible = visible_keys(
            q.shape[2],
            k.shape[2],
            left=call.left,
            right=call.right,
            kv_lens=None,
            mask=None,
            device=q.device,
        )
        out, lse = _in_chunks(part, visible, index)
        outs.append(out.transpose(1, 2))
        lses.append(lse)
    return torch.cat(outs, dim=1).transpose(1, 2), torch.cat(lses, dim=2)


def _in_chunks(call: Call, visible: Tensor | None, first: int) -> tuple[Tensor, Tensor]:
    """Attend some batch items and queries at a time; `first` is the number of the first item."""
    assert call.rng is not None  # noqa: S101 - our caller's promise
    b, h, n, m = *call.q.shape[:3], call.k.shape[2]
    bias = call.bias.dense() if isinstance(call.bias, DecomposedBias) else call.bias
    while visible is not None and visible.dim() < 4:
        visible = visible.unsqueeze(0)
    limit = _CHUNK_SCORES.get(call.q.device.type, _CHUNK_SCORES["cuda"])
    rows = min(n, max(16, limit // max(1, h * m)))
    items = max(1, limit // max(1, h * rows * m))
    grads = torch.is_grad_enabled() and not torch.compiler.is_compiling()
    columns: list[Tensor] = []
    lses: list[Tensor] = []
    for low in range(0, max(b, 1), items):
        high = min(b, low + items)
        q_items, k_items, v_items = (t[low:high] for t in (call.q, call.k, call.v))
        outs: list[Tensor] = []
        row_lses: list[Tensor] = []
        for start in range(0, max(n, 1), max(rows, 1)):
            stop = min(n, start + rows)
            arguments = (
                q_items[:, :, start:stop],
                k_items,
                v_items,
                _chunk(visible, low, high, start, stop),
                _chunk(bias, low, high, start, stop),
                call.scale,
                call.rng,
                call.dropout,
                first + low,
                start,
            )
            if grads:  # the numbers depend on the counters alone: no random state to restore
                out, lse = checkpoint(
                    _dropped, *arguments, use_reentrant=False, preserve_rng_state=False
                )  # pyright: ignore[reportGeneralTypeIssues]
            else:
                out, lse = _dropped(*arguments)
            outs.append(out.transpose(1, 2))
            row_lses.append(lse)
        columns.append(torch.cat(outs, dim=1))
        lses.append(torch.cat(row_lses, dim=2))
    return torch.cat(columns).transpose(1, 2), torch.cat(lses)


def _chunk(matrix: Tensor | None, low: int, high: int, start: int, stop: int) -> Tensor | None:
    if matrix is None:
        return None
    if matrix.shape[0] != 1:
        matrix = matrix[low:high]
    return matrix if matrix.shape[2] == 1 else matrix[:, :, start:stop]


def _dropped(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor | None,
    bias: Tensor | None,
    scale: float,
    rng: Tensor,
    dropout: float,
    first_item: int,
    first_row: int,
) -> tuple[Tensor, Tensor]:
    keep = keep_mask(
        rng,
        batch=torch.arange(first_item, first_item + q.shape[0], device=q.device),
        heads=q.shape[1],
        queries=torch.arange(first_row, first_row + q.shape[2], device=q.device),
        keys=k.shape[2],
        dropout=dropout,
    )
    return attend(q, k, v, visible=visible, bias=bias, scale=scale, keep=keep, dropout=dropout)
