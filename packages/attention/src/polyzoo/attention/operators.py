"""Our kernels as torch operators, `polyzoo::attention_forward` and `..._backward`.

Eager code calls the autograd Function, which costs a tenth of an operator's dispatch; torch.compile
sees the operators, with shapes, strides and gradients known to it. Tensors that are absent come
back empty, since operators cannot return None.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_INPUTS = 11  # tensors of the forward operator, before its numbers


def run_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    rel_h: Tensor | None,
    rel_w: Tensor | None,
    mask: Tensor | None,
    kv_lens: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    rng: Tensor | None,
    max_q: int,
    max_k: int,
    scale: float,
    left: int,
    right: int,
    dropout: float,
    kernels: str,
    keep_low: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, log-sum-exp, and what rounding took from the output (empty unless `keep_low`).

    `kernels` is "triton" or "cuda".
    """
    from polyzoo.attention.kernels.problem import Problem, heads_last

    problem = Problem(
        q=q,
        k=k,
        v=v,
        bias=bias,
        rel_h=rel_h,
        rel_w=rel_w,
        mask=mask,
        kv_lens=kv_lens,
        cu_q=cu_q,
        cu_k=cu_k,
        rng=rng,
        max_q=max_q,
        max_k=max_k,
        scale=scale,
        left=left,
        right=right,
        dropout=dropout,
    )
    low = heads_last(q, v.shape[3]) if keep_low else None
    if kernels == "cuda":
        from polyzoo.attention.kernels import launch_cuda

        out, lse = launch_cuda.forward(problem, low=low)
        return out, lse, q.new_empty(0) if low is None else low
    from polyzoo.attention.kernels import launch, launch_decode, launch_short

    few_keys = launch_short.suits(problem)
    if low is not None:
        run = launch_short.forward if few_keys else launch.forward
        return (*run(problem, low=low), low)
    if launch_decode.suits(problem):
        return (*launch_decode.decode(problem), q.new_empty(0))
    run = launch_short.forward if few_keys else launch.forward
    return (*run(problem), q.new_empty(0))


def _fake_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    rel_h: Tensor | None,
    rel_w: Tensor | None,
    mask: Tensor | None,
    kv_lens: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    rng: Tensor | None,
    max_q: int,
    max_k: int,
    scale: float,
    left: int,
    right: int,
    dropout: float,
    kernels: str,
    keep_low: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    b, h, n, _ = q.shape
    dv = v.shape[3]
    out = q.new_empty((b, n, h, dv)).transpose(1, 2)
    low = q.new_empty((b, n, h, dv)).transpose(1, 2) if keep_low else q.new_empty(0)
    return out, q.new_empty((b, h, n), dtype=torch.float32), low


def run_backward(
    dout: Tensor,
    out: Tensor,
    lse: Tensor,
    low: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    rel_h: Tensor | None,
    rel_w: Tensor | None,
    mask: Tensor | None,
    kv_lens: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    rng: Tensor | None,
    max_q: int,
    max_k: int,
    scale: float,
    left: int,
    right: int,
    dropout: float,
    kernels: str,
    need_q: bool,
    need_kv: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, bias, rel_h and rel_w; empty where not needed."""
    from polyzoo.attention.kernels.problem import Problem

    problem = Problem(
        q=q,
        k=k,
        v=v,
        bias=bias,
        rel_h=rel_h,
        rel_w=rel_w,
        mask=mask,
        kv_lens=kv_lens,
        cu_q=cu_q,
        cu_k=cu_k,
        rng=rng,
        max_q=max_q,
        max_k=max_k,
        scale=scale,
        left=left,
        right=right,
        dropout=dropout,
    )
    rest = low if low.numel() else None
    if kernels == "cuda":
        from polyzoo.attention.kernels import launch_cuda

        made = launch_cuda.backward(
            problem, out, lse, dout, low=rest, need_q=need_q, need_kv=need_kv
        )
        return tuple(q.new_empty(0) if t is None else t for t in (*made, None, None, None))  # pyright: ignore[reportReturnType]
    from polyzoo.attention.kernels.launch_backward import Wanted, backward

    grads = backward(
        problem,
        out,
        lse,
        dout,
        low=rest,
        wanted=Wanted(q=need_q, kv=need_kv, bias=need_bias),
    )
    made = (grads.q, grads.k, grads.v, grads.bias, grads.rel_h, grads.rel_w)
    return tuple(q.new_empty(0) if t is None else t for t in made)  # pyright: ignore[reportReturnType]


def _fake_backward(
    dout: Tensor,
    out: Tensor,
    lse: Tensor,
    low: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    rel_h: Tensor | None,
    rel_w: Tensor | None,
    mask: Tensor | None,
    kv_lens: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    rng: Tensor | None,
    max_q: int,
    max_k: int,
    scale: float,
    left: int,
    right: int,
    dropout: float,
    kernels: str,
    need_q: bool,
    need_kv: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    def heads_last(like: Tensor, needed: bool) -> Tensor:
        if not needed:
            return like.new_empty(0)
        b, h, n, d = like.shape
        return like.new_empty((b, n, h, d)).transpose(1, 2)

    def dense(like: Tensor | None, needed: bool) -> Tensor:
        return q.new_empty(0) if like is None or not needed else like.new_empty(like.shape)

    return (
        heads_last(q, need_q),
        heads_last(k, need_kv),
        heads_last(v, need_kv),
        dense(bias, need_bias),
        dense(rel_h, need_q),
        dense(rel_w, need_q),
    )


attention_forward: Any = torch.library.custom_op(
    "polyzoo::attention_forward", run_forward, mutates_args=()
)
attention_backward: Any = torch.library.custom_op(
    "polyzoo::attention_backward", run_backward, mutates_args=()
)
attention_forward.register_fake(_fake_forward)
attention_backward.register_fake(_fake_backward)


def _needs(flags: tuple[bool, ...]) -> tuple[bool, bool, bool]:
    """Which kernels to run, from what q, k, v, bias, rel_h and rel_w need."""
    q, k, v, bias, rel_h, rel_w = flags
    return q or rel_h or rel_w, k or v, bias


def _only(grads: tuple[Tensor, ...], flags: tuple[bool, ...]) -> list[Tensor | None]:
    return [grad if flag else None for grad, flag in zip(grads, flags, strict=True)]


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    out, lse, low = output
    ctx.save_for_backward(out, lse, low, *inputs[:_INPUTS])
    ctx.numbers = inputs[_INPUTS:-1]


def _differentiate(ctx: Any, dout: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    out, lse, low, *inputs = ctx.saved_tensors
    flags = ctx.needs_input_grad[:6]
    grads = attention_backward(dout, out, lse, low, *inputs, *ctx.numbers, *_needs(flags))
    return (*_only(grads, flags), *(None,) * (_INPUTS - 6 + len(ctx.numbers) + 1))


attention_forward.register_autograd(_differentiate, setup_context=_remember)


class Attend(torch.autograd.Function):
    """The same for eager code, straight to the kernels."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        """As the operator, without the rounding."""
        out, lse, low = run_forward(*arguments)
        _remember(ctx, arguments, (out, lse, low))
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Gradients of what asks for them."""
        if dout is None:
            return (None,) * (_INPUTS + len(ctx.numbers) + 1)
        out, lse, low, *inputs = ctx.saved_tensors
        flags = ctx.needs_input_grad[:6]
        numbers: tuple[Any, ...] = (*ctx.numbers, *_needs(flags))
        grads = run_backward(dout, out, lse, low, *inputs, *numbers)  # pyright: ignore[reportCallIssue]
        return (*_only(grads, flags), *(None,) * (_INPUTS - 6 + len(ctx.numbers) + 1))
