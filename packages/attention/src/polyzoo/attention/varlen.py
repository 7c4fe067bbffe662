"""torch's packed attention on CUDA: the flash kernels, called with cumulative lengths.

torch's module is imported at the first call that may use it, never on a CPU: it brings the whole
compiler along, more than a second.
"""

from __future__ import annotations

import inspect
from functools import cache

import torch
from torch import Tensor

from polyzoo.attention.types import Call

_HEAD_DIM_LIMIT = 256


@cache
def _accepted() -> frozenset[str]:
    """Arguments of torch's function, which differ between versions."""
    from torch.nn.attention.varlen import varlen_attn

    return frozenset(inspect.signature(varlen_attn).parameters)


def serves(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Tell whether torch's packed kernels take these tensors."""
    return (
        q.is_cuda
        and q.dtype in (torch.float16, torch.bfloat16)
        and q.shape[3] == v.shape[3]
        and q.shape[3] % 8 == 0
        and q.shape[3] <= _HEAD_DIM_LIMIT
        and q.shape[2] > 0
        and k.shape[2] > 0
        and torch.cuda.get_device_capability(q.device) >= (8, 0)
        and "window_size" in _accepted()  # torch 2.10 has none: it is left alone
    )


def attend_packed(call: Call) -> tuple[Tensor, Tensor | None]:
    """Attend sequence by sequence, in one kernel; the batch axis of the call is 1."""
    assert call.cu_seqlens is not None  # noqa: S101 - our caller's promise
    lengths = call.cu_seqlens
    out, lse = _run(
        call,
        call.q[0].transpose(0, 1),
        call.k[0].transpose(0, 1),
        call.v[0].transpose(0, 1),
        (lengths.q.to(torch.int32), lengths.k.to(torch.int32)),
        (lengths.max_q, lengths.max_k),
    )
    return out.transpose(0, 1).unsqueeze(0), None if lse is None else lse.unsqueeze(0)


def attend_uniform(call: Call) -> tuple[Tensor, Tensor | None]:
    """Attend a dense batch: its bottom-right causal and window rules need no mask this way."""
    b, n, m = call.q.shape[0], call.q.shape[2], call.k.shape[2]
    device = call.q.device
    q, k, v = (t.transpose(1, 2).flatten(0, 1) for t in (call.q, call.k, call.v))
    out, lse = _run(
        call,
        q,
        k,
        v,
        (
            torch.arange(0, (b + 1) * n, n, dtype=torch.int32, device=device),
            torch.arange(0, (b + 1) * m, m, dtype=torch.int32, device=device),
        ),
        (n, m),
    )
    out = out.unflatten(0, (b, n)).transpose(1, 2)
    return out, None if lse is None else lse.unflatten(1, (b, n)).transpose(0, 1)


def _run(
    call: Call,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: tuple[Tensor, Tensor],
    longest: tuple[int, int],
) -> tuple[Tensor, Tensor | None]:
    from torch.nn.attention.varlen import AuxRequest, varlen_attn

    arguments: dict[str, object] = {}
    if "enable_gqa" in _accepted():  # before torch 2.12 grouped heads were implied
        arguments["enable_gqa"] = q.shape[1] != k.shape[1]
    if call.want_lse:
        arguments["return_aux"] = AuxRequest(lse=True)
    result = varlen_attn(
        q,
        k,
        v,
        *starts,
        *longest,
        scale=call.scale,
        window_size=(call.left, call.right),
        **arguments,  # pyright: ignore[reportArgumentType]
    )
    if not call.want_lse:
        return result, None  # pyright: ignore[reportReturnType]
    out, lse = result
    if lse.shape != (q.shape[1], q.shape[0]):
        lse = lse.transpose(0, 1)
    # The kernel marks rows without keys by +inf.
    return out, lse.detach().masked_fill(lse == torch.inf, -torch.inf)
