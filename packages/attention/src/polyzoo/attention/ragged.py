"""Batches of unequal lengths on torch's kernels: padding is cut off or masked."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from polyzoo.attention import varlen
from polyzoo.attention.limits import MATRIX_LIMIT, matrix_error
from polyzoo.attention.masks import band_mask, length_mask, visible_keys
from polyzoo.attention.types import Call, CuSeqlens, DecomposedBias

Result = tuple[Tensor, Tensor | None]
Dense = Callable[[Call], Result]

_CPU_FLOPS = 4e10
_CALL_SECONDS = (25e-6, 80e-6)
"""What one more call costs on a CPU, without and with gradients."""


def attend_kv_lens(call: Call, dense: Dense) -> Result:
    """Attend to the first `kv_lens[i]` keys of batch item i.

    Where the lengths can be read for free (CPU), padding is cut off; elsewhere it is masked by a
    `(b, 1, 1, m)` mask, without waiting for the device.
    """
    assert call.kv_lens is not None  # noqa: S101 - our caller's promise
    b, h, n, d = call.q.shape
    m = call.k.shape[2]
    if call.q.device.type == "cpu" and not torch.compiler.is_compiling():
        lengths = [min(max(length, 0), m) for length in call.kv_lens.tolist()]
        longest = max(lengths, default=m)
        if min(lengths, default=m) == longest:
            return dense(_cut(call, longest)._replace(kv_lens=None))
        wasted = 4 * h * n * d * (b * longest - sum(lengths)) / _CPU_FLOPS
        if wasted > b * _CALL_SECONDS[torch.is_grad_enabled()]:
            return _item_by_item(call, lengths, dense)
        call = _cut(call, longest)
    return _masked(call, dense)


def _cut(call: Call, length: int) -> Call:
    """Keep the first `length` keys."""
    if length == call.k.shape[2]:
        return call
    bias = call.bias.dense() if isinstance(call.bias, DecomposedBias) else call.bias
    mask = call.mask
    if bias is not None and bias.shape[3] != 1:
        bias = bias[..., :length]
    if mask is not None and mask.shape[3] != 1:
        mask = mask[..., :length]
    return call._replace(k=call.k[:, :, :length], v=call.v[:, :, :length], mask=mask, bias=bias)


def _item_by_item(call: Call, lengths: list[int], dense: Dense) -> Result:
    outs: list[Tensor] = []
    lses: list[Tensor] = []
    bias = call.bias.dense() if isinstance(call.bias, DecomposedBias) else call.bias
    mask = call.mask
    # split is one node of the graph: slicing each item would make a full-size gradient per item
    items = zip(call.q.split(1), call.k.split(1), call.v.split(1), lengths, strict=True)
    for index, (q, k, v, length) in enumerate(items):
        item = call._replace(
            q=q,
            k=k,
            v=v,
            kv_lens=None,
            mask=mask if mask is None or mask.shape[0] == 1 else mask[index : index + 1],
            bias=bias if bias is None or bias.shape[0] == 1 else bias[index : index + 1],
        )
        out, lse = dense(_cut(item, length))
        outs.append(out.transpose(1, 2))
        if lse is not None:
            lses.append(lse)
    return torch.cat(outs).transpose(1, 2), torch.cat(lses) if lses else None


def _masked(call: Call, dense: Dense) -> Result:
    assert call.kv_lens is not None  # noqa: S101 - our caller's promise
    n, m = call.q.shape[2], call.k.shape[2]
    if call.left >= 0 or (call.right >= 0 and n > 1):
        size = call.q.shape[0] * n * m
        if size > MATRIX_LIMIT:
            raise matrix_error(
                "kv_lens together with causal or window, on this device,",
                size,
                "pack the batch with cu_seqlens",
            )
    visible = visible_keys(
        n,
        m,
        left=call.left,
        right=call.right,
        kv_lens=call.kv_lens,
        mask=call.mask,
        device=call.q.device,
    )
    # Padding may hold anything, and 0 * inf is NaN.
    padding = ~length_mask(call.kv_lens, m).transpose(2, 3)
    return dense(
        call._replace(
            k=call.k.masked_fill(padding, 0.0),
            v=call.v.masked_fill(padding, 0.0),
            left=-1,
            right=-1,
            kv_lens=None,
            mask=visible,
        )
    )


def attend_packed(call: Call, dense: Dense) -> Result:
    """Attend each sequence of a packed batch to its own keys."""
    assert call.cu_seqlens is not None  # noqa: S101 - our caller's promise
    if varlen.serves(call.q, call.k, call.v):
        return varlen.attend_packed(call)
    if call.q.device.type == "cpu" and not torch.compiler.is_compiling():
        return _by_runs(call, call.cu_seqlens, dense)
    return _padded(call, dense)


def _by_runs(call: Call, lengths: CuSeqlens, dense: Dense) -> Result:
    """Serve every run of equal neighbours with one batched call on views."""
    q, k, v = call.q, call.k, call.v
    runs = lengths.runs()
    call = call._replace(cu_seqlens=None)
    # split is one node of the graph: slicing would make a full-size gradient per run. Along the
    # first axis the pieces of its gradient are joined by plain copies.
    q_sizes = [run.sequences * run.q_length for run in runs]
    k_sizes = [run.sequences * run.k_length for run in runs]
    q_runs, k_runs, v_runs = (
        tokens[0].transpose(0, 1).split(sizes)
        for tokens, sizes in ((q, q_sizes), (k, k_sizes), (v, k_sizes))
    )
    grads = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))
    # Without gradients each part is copied home while it is in the cache; autograd wants one cat.
    whole = v.new_empty((0 if grads else q.shape[2], q.shape[1], v.shape[3]))
    outs = [whole]
    lses: list[Tensor] = []
    token = 0
    for run, q_run, k_run, v_run in zip(runs, q_runs, k_runs, v_runs, strict=True):
        if run.q_length == 0:
            continue
        out, lse = dense(
            call._replace(
                q=_as_batch(q_run, run.sequences, run.q_length),
                k=_as_batch(k_run, run.sequences, run.k_length),
                v=_as_batch(v_run, run.sequences, run.k_length),
            )
        )
        out = out.transpose(1, 2).flatten(0, 1)
        if grads:
            outs.append(out)
        else:
            whole[token : token + out.shape[0]] = out
            token += out.shape[0]
        if lse is not None:
            lses.append(lse.transpose(0, 1).flatten(1))
    joined = (torch.cat(outs) if grads else whole).transpose(0, 1).unsqueeze(0)
    if not call.want_lse:
        return joined, None
    if not lses:
        return joined, torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    return joined, torch.cat(lses, dim=1).unsqueeze(0)


def _as_batch(tokens: Tensor, count: int, length: int) -> Tensor:
    """View `(count * length, h, d)` as `(count, h, length, d)`."""
    return tokens.unflatten(0, (count, length)).transpose(1, 2)


def _padded(call: Call, dense: Dense) -> Result:
    """Spread the sequences over a padded batch; needs no length on the host."""
    assert call.cu_seqlens is not None  # noqa: S101 - our caller's promise
    padded, queries = pad_packed(call)
    out, lse = dense(padded)
    return unpad(out, queries), None if lse is None else unpad(lse.unsqueeze(-1), queries)[..., 0]


def pad_packed(call: Call) -> tuple[Call, tuple[Tensor, Tensor]]:
    """Return the padded call and, for each packed query, its sequence and position."""
    assert call.cu_seqlens is not None  # noqa: S101 - our caller's promise
    lengths = call.cu_seqlens
    device = call.q.device
    q_lens, k_lens = lengths.q.diff(), lengths.k.diff()
    i = torch.arange(lengths.max_q, device=device)
    j = torch.arange(lengths.max_k, device=device)
    visible = length_mask(k_lens, lengths.max_k)
    if call.left >= 0 or call.right >= 0:
        size = lengths.sequences * lengths.max_q * lengths.max_k
        if size > MATRIX_LIMIT:
            raise matrix_error(
                "cu_seqlens with causal or window, on this device and dtype,",
                size,
                "use fp16/bf16 on a GPU, or fewer sequences at a time",
            )
        delta = (k_lens - q_lens)[:, None, None, None]
        visible = visible & band_mask(i, j, delta=delta, left=call.left, right=call.right)
    valid_keys = (j < k_lens[:, None])[:, None, :, None]
    q = _spread(call.q, lengths.q, i)
    k = _spread(call.k, lengths.k, j).masked_fill(~valid_keys, 0.0)
    v = _spread(call.v, lengths.k, j).masked_fill(~valid_keys, 0.0)
    tokens = torch.arange(call.q.shape[2], dtype=lengths.q.dtype, device=device)
    sequence = torch.searchsorted(lengths.q[1:].contiguous(), tokens, right=True)
    position = tokens - lengths.q[sequence]
    padded = call._replace(q=q, k=k, v=v, left=-1, right=-1, cu_seqlens=None, mask=visible)
    return padded, (sequence, position)


def unpad(out: Tensor, queries: tuple[Tensor, Tensor]) -> Tensor:
    """Take the packed rows back out of a padded `(b, h, n, dv)` result."""
    return out.transpose(1, 2)[queries].transpose(0, 1).unsqueeze(0)


def _spread(packed: Tensor, starts: Tensor, positions: Tensor) -> Tensor:
    """Gather `(1, h, T, d)` into `(sequences, h, longest, d)`; rows past an end repeat others."""
    tokens = packed[0].transpose(0, 1)
    if tokens.shape[0] == 0:
        shape = (starts.shape[0] - 1, packed.shape[1], positions.shape[0], packed.shape[3])
        return packed.new_zeros(shape)
    index = (starts[:-1, None] + positions).clamp(max=tokens.shape[0] - 1)
    return tokens[index].transpose(1, 2)
