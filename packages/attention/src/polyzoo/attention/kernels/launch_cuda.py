"""Start the CUDA C++ kernels: attention and its gradients on Volta and Turing."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from polyzoo.attention.kernels.cuda_program import Program, Variant, is_volta, load
from polyzoo.attention.kernels.problem import Problem, heads_last, reads_whole
from polyzoo.attention.kernels.schedules import query_programs, schedule

Loader = Callable[[Variant, torch.device], Program]


class _Strided(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("batch", ctypes.c_int64),
        ("head", ctypes.c_int64),
        ("row", ctypes.c_int64),
    ]


_TENSORS = ("q", "k", "v", "out", "low", "dout", "dq", "dk", "dv")
_POINTERS = ("lse", "delta", "lengths", "q_ends", "k_ends", "schedule")
_NUMBERS = ("heads", "group", "n", "m", "slots", "left", "right")


class _Call(ctypes.Structure):
    """`Call` of blocks.cu."""

    _fields_ = [
        *((name, _Strided) for name in _TENSORS),
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_int) for name in _NUMBERS),
        ("scale", ctypes.c_float),
        ("scale_log2", ctypes.c_float),
    ]


def forward(
    problem: Problem,
    *,
    low: Tensor | None = None,
    volta: bool | None = None,
    programs: Loader = load,
) -> tuple[Tensor, Tensor]:
    """Attention and the log-sum-exp of its scores, in fp16.

    Args:
        problem: The call: no mask, bias or dropout, as many value as key channels.
        low: Receives what rounding the output took away, laid out as the output; the backward pass
            wants it.
        volta: Use the kernels of sm_70; by the GPU if left out.
        programs: Gives what runs a variant.

    Returns:
        `(b, h, n, d)` laid out with the heads last, and fp32 `(b, h, n)`.
    """
    problem = problem.aligned
    out = heads_last(problem.q, problem.q.shape[3])
    lse = torch.empty(problem.q.shape[:3], dtype=torch.float32, device=problem.q.device)
    if lse.numel() == 0:
        return out, lse
    if problem.keys == 0:
        if low is not None:
            low.zero_()
        return out.zero_(), lse.fill_(-torch.inf)
    variant = _variant(problem, "forward", volta)
    slots, blocks = query_programs(problem, variant.block_rows)
    kept, call = _call(problem, slots, problem.cu_q, problem.queries, variant.block_rows)
    _fill(call, out=out, lse=lse, low=low)
    with _device(problem.q):
        _start(programs(variant, problem.q.device), variant, "forward_kernel", blocks, call)
    del kept  # freed only now: the stream may reuse the memory after the start
    return out, lse


def backward(
    problem: Problem,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    *,
    low: Tensor | None = None,
    need_q: bool = True,
    need_kv: bool = True,
    volta: bool | None = None,
    programs: Loader = load,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of q, k and v; the same bits in every run.

    Args:
        problem: The call.
        out: Its result.
        lse: Its log-sum-exp.
        dout: Gradient of the result.
        low: What rounding took away from `out`, if `forward` was asked to keep it.
        need_q: Whether q wants one.
        need_kv: Whether k or v want one.
        volta: As for `forward`.
        programs: As for `forward`.
    """
    problem = problem.aligned
    if not reads_whole(dout):
        dout = heads_last(dout, dout.shape[-1]).copy_(dout)
    grads = [
        heads_last(t, t.shape[3]) if need else None
        for t, need in ((problem.q, need_q), (problem.k, need_kv), (problem.v, need_kv))
    ]
    dq, dk, dv = grads
    if problem.queries * problem.keys * problem.batch * problem.heads == 0:
        return tuple(None if t is None else t.zero_() for t in grads)  # pyright: ignore[reportReturnType]
    variant = _variant(problem, "backward", volta)
    b, h, n, _ = out.shape
    delta = torch.empty((b, h, n), dtype=torch.float32, device=out.device)
    rows = variant.block_rows
    device = problem.q.device
    with _device(problem.q):
        program = programs(variant, device)
        _, call = _call(problem, b, None, n, rows)  # `slots` is the batch in this kernel
        _fill(call, out=out, low=low, dout=dout, delta=delta)
        _start(program, variant, "delta_kernel", -(-b * h * n // (variant.threads // 32)), call)
        if dk is not None and dv is not None:
            hk, m = problem.k.shape[1], problem.k.shape[2]
            slots = 0 if problem.cu_k is None else m // rows + problem.cu_k.shape[0] - 1
            blocks = slots * hk if slots else -(-m // rows) * hk * b
            kept, call = _call(problem, slots, problem.cu_k, m, rows)
            _fill(call, dout=dout, lse=lse, delta=delta, dk=dk, dv=dv)
            parts = [variant]
            if variant.splits_keys:
                parts = [replace(variant, want_dk=False), replace(variant, want_dv=False)]
            for part in parts:
                _start(programs(part, device), part, "keys_kernel", blocks, call)
            del kept
        if dq is not None:
            slots, blocks = query_programs(problem, rows)
            kept, call = _call(problem, slots, problem.cu_q, problem.queries, rows)
            _fill(call, dout=dout, lse=lse, delta=delta, dq=dq)
            _start(program, variant, "queries_kernel", blocks, call)
            del kept
    return dq, dk, dv


def _variant(problem: Problem, direction: str, volta: bool | None) -> Variant:
    if volta is None:
        volta = is_volta(torch.cuda.get_device_capability(problem.q.device))
    return Variant(
        direction,  # pyright: ignore[reportArgumentType]
        problem.q.shape[3],
        volta,
        has_left=problem.left >= 0,
        has_right=problem.right >= 0,
        kv_lens=problem.kv_lens is not None,
        packed=problem.packed,
    )


def _call(
    problem: Problem, slots: int, cu: Tensor | None, total: int, rows: int
) -> tuple[list[Tensor], _Call]:
    """The argument, and the tensors made for it."""
    made = {
        "lengths": problem.kv_lens,
        "q_ends": problem.cu_q,
        "k_ends": problem.cu_k,
        "schedule": schedule(cu, total, rows),
    }
    tensors = {
        name: tensor.to(torch.int32).contiguous()
        for name, tensor in made.items()
        if tensor is not None
    }
    left, right = problem.window
    call = _Call(
        heads=problem.heads,
        group=problem.group,
        n=problem.queries,
        m=problem.keys,
        slots=slots,
        left=left,
        right=right,
        scale=problem.scale,
        scale_log2=problem.kernel_scale,
    )
    _fill(call, q=problem.q, k=problem.k, v=problem.v, **tensors)
    return list(tensors.values()), call


def _fill(call: _Call, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if name in _TENSORS:
            setattr(call, name, _Strided(tensor.data_ptr(), *tensor.stride()[:3]))
        else:
            setattr(call, name, tensor.data_ptr())


def _start(program: Program, variant: Variant, kernel: str, blocks: int, call: _Call) -> None:
    program.start(
        kernel,
        blocks=blocks,
        threads=variant.threads,
        shared_bytes=variant.shared_bytes(kernel),
        call=call,
    )


def _device(tensor: Tensor) -> torch.cuda.device_of | nullcontext[None]:
    return torch.cuda.device_of(tensor) if tensor.is_cuda else nullcontext()
