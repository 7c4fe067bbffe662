"""Tensor-parallel attention whose all-reduce runs while the next queries are computed.

FastAttention's tiling-AllReduce (arXiv 2410.16663): every rank holds some heads, and the output
projection sums over heads, so its result must be added over the ranks. The queries are cut into
chunks; while a chunk's projection is being added, the next chunk's attention is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from polyzoo.attention import checks
from polyzoo.attention.api import attention
from polyzoo.attention.chunking import RATES, Chunk, Work, cut, plan


@torch.compiler.disable
def attention_linear_allreduce(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    group: dist.ProcessGroup | None = None,
    chunks: Literal["auto"] | int | Sequence[int] = "auto",
    causal: bool = False,
    window: tuple[int, int] | None = None,
    kv_lens: Tensor | None = None,
    mask: Tensor | None = None,
    scores_bias: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attend with this rank's heads, project, and add up over the ranks, overlapped.

    Equals `all_reduce(linear(attention(...)))` up to the order of summation. Gradients flow to q,
    k, v, weight and bias: each rank must get the same gradient of the (same) result, as usual for
    a row-parallel layer; adding up the gradients of the layer's input is the task of the
    column-parallel projection before it. All ranks must call it with the same shapes and chunks.

    Args:
        q: `(b, h, n, d)`, this rank's heads.
        k: `(b, hk, m, d)`.
        v: `(b, hk, m, dv)`.
        weight: `(hidden, h * dv)`: the columns of the output projection for this rank's heads.
        bias: `(hidden,)`, the same on every rank; added once.
        group: The ranks; all of them if left out. `overlap_group` makes one that leaves the
            GPU's multiprocessors to the attention.
        chunks: "auto" by a model of the pipeline; a number of chunks; or the rows of each, through
            item after item (a chunk is whole items, or rows of one item).
        causal: As for `attention`.
        window: As for `attention`.
        kv_lens: As for `attention`.
        mask: As for `attention`.
        scores_bias: The `bias` of `attention`, a tensor.
        scale: As for `attention`.
        backend: As for `attention`.

    Returns:
        `(b, n, hidden)`, the same on every rank.

    Raises:
        ValueError: Shapes, chunks or devices do not fit, or torch.distributed is not started.

    Example:
        >>> y = attention_linear_allreduce(q, k, v, out_proj_shard, group=tp_group, causal=True)
    """
    if not dist.is_initialized():
        raise ValueError(
            "torch.distributed is not started: call torch.distributed.init_process_group(...) "
            "first, or start the program with torchrun"
        )
    if any(t.dim() != 4 for t in (q, k, v)):
        raise checks.bad_shapes(q, k, v)
    _check_projection(q, v, weight, bias)
    left, right = checks.band(causal, window)
    b, h, n, d = q.shape
    work = Work(
        items=b,
        queries=n,
        keys=k.shape[2],
        heads=h,
        head_dim=(d + v.shape[3]) // 2,
        hidden=weight.shape[0],
        element_size=q.element_size(),
        left=left,
        right=right,
        ranks=dist.get_world_size(group),
    )
    shape = (b, h, n, k.shape[2])
    if mask is not None:
        mask = checks.check_mask(mask, q, shape)
    if scores_bias is not None:
        scores_bias = checks.broadcastable(scores_bias, "scores_bias", q, shape)
    dtype = torch.get_autocast_dtype(q.device.type) if _autocast(q) else q.dtype
    result = q.new_empty((b, n, work.hidden), dtype=dtype)
    # One rank adds the bias, inside its product.
    first = dist.get_rank(group) == 0
    added = None if bias is None or not first else bias.detach().to(dtype)
    projection = weight.detach().to(dtype).t()
    states: list[Tensor] = []
    pending: list[Any] = []
    for chunk in _chunks(chunks, work, q.device.type):
        items, rows = slice(chunk.item, chunk.last_item), slice(chunk.first, chunk.last)
        rules = _rules(chunk, work, kv_lens=kv_lens, mask=mask, scores_bias=scores_bias)
        seen = rules.pop("keys")
        out = attention(
            q[items, :, rows],
            k[items, :, :seen],
            v[items, :, :seen],
            **rules,
            scale=scale,
            backend=backend,
        )
        state = out.transpose(1, 2).flatten(2)
        states.append(state)
        target = result[items, rows].flatten(0, 1)
        flat = state.detach().flatten(0, 1)
        with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
            if added is None:
                torch.mm(flat, projection, out=target)
            else:
                torch.addmm(added, flat, projection, out=target)
        if work.ranks > 1:
            pending.append(dist.all_reduce(target, group=group, async_op=True))
    for transfer in pending:
        transfer.wait()
    if torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (weight, bias, *states)
    ):
        return _Projected.apply([result], weight, bias, *states)  # pyright: ignore[reportReturnType]
    return result


def overlap_group(ranks: Sequence[int] | None = None, *, max_ctas: int = 16) -> dist.ProcessGroup:
    """Make a group of ranks for `attention_linear_allreduce`.

    With NCCL its transfers run on a stream of high priority, so that they need not wait for a
    whole kernel, and on at most `max_ctas` multiprocessors, which leaves the others to the
    attention. With other libraries it is an ordinary group. Every rank of the program must call
    it.

    Args:
        ranks: All of them if left out.
        max_ctas: Thread blocks that a transfer may use.
    """
    options = None
    if dist.get_backend() == "nccl":
        options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
        options.config.max_ctas = max_ctas
    members = None if ranks is None else list(ranks)
    return dist.new_group(members, pg_options=options)  # pyright: ignore[reportReturnType]


class _Projected(torch.autograd.Function):
    """The finished result as a function of what it was projected from."""

    @staticmethod
    def forward(
        ctx: Any, result: list[Tensor], weight: Tensor, bias: Tensor | None, *states: Tensor
    ) -> Tensor:
        ctx.save_for_backward(weight, *states)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return result[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        weight, *states = ctx.saved_tensors
        _, needs_weight, needs_bias, *needs = ctx.needs_input_grad
        rows = grad.reshape(-1, grad.shape[-1])
        grads: list[Tensor | None] = []
        of_weight = None
        start = 0
        for state, needed in zip(states, needs, strict=True):
            flat = state.flatten(0, 1)
            part = rows[start : start + flat.shape[0]]
            start += flat.shape[0]
            grads.append((part @ weight.to(part.dtype)).view_as(state) if needed else None)
            if needs_weight:
                product = part.t() @ flat
                of_weight = product if of_weight is None else of_weight.add_(product)
        of_weight = None if of_weight is None else of_weight.to(weight.dtype)
        wide = torch.promote_types(rows.dtype, torch.float32)
        of_bias = rows.sum(0, dtype=wide).to(ctx.bias_dtype) if needs_bias else None
        return None, of_weight, of_bias, *grads


def _chunks(
    asked: Literal["auto"] | int | Sequence[int], work: Work, device: str
) -> tuple[Chunk, ...]:
    if asked == "auto":
        return plan(work, RATES.get(device, RATES["cuda"]))
    total = work.items * work.queries
    if not isinstance(asked, int):
        return cut(work, asked) if total else plan(work, RATES["cpu"])
    if not 1 <= asked <= max(1, total):
        raise ValueError(
            f"chunks is {asked}; give 1 to {total} (batch items x queries), the rows of each "
            'chunk, or "auto"'
        )
    if not total:
        return (Chunk(0, work.items, 0, work.queries),)
    units, size = (work.items, work.queries) if work.items >= asked else (work.queries, 1)
    count = asked if work.items >= asked else -(-asked // work.items)
    ends = [part * units // count * size for part in range(count + 1)]
    rows = [ends[part + 1] - ends[part] for part in range(count)]
    return cut(work, rows if work.items >= asked else rows * work.items)


def _rules(
    chunk: Chunk,
    work: Work,
    *,
    kv_lens: Tensor | None,
    mask: Tensor | None,
    scores_bias: Tensor | None,
) -> dict[str, Any]:
    """Say what a chunk's queries see as a call of their own, aligned at the end of their keys.

    Query i of the whole stands at key `i + length - n`. Called alone, the chunk's last query would
    stand at the end, `after` keys too far. As many of these as nobody in the chunk can see are cut
    off; by the others the window is moved.
    """
    after = work.queries - chunk.last
    hidden = max(0, after - work.right) if work.right >= 0 else 0
    moved = after - hidden
    seen = max(0, work.keys - hidden)
    rules: dict[str, Any] = {"keys": seen}
    if work.left >= 0 or work.right >= 0:
        rules["window"] = tuple(
            -1 if side < 0 else side + by for side, by in ((work.left, moved), (work.right, -moved))
        )
    if kv_lens is not None:
        rules["kv_lens"] = (kv_lens[chunk.item : chunk.last_item] - hidden).clamp(min=0)
    for name, matrix in (("mask", mask), ("bias", scores_bias)):
        if matrix is not None:
            rules[name] = _tile(matrix, chunk, seen)
    return rules


def _tile(matrix: Tensor, chunk: Chunk, seen: int) -> Tensor:
    if matrix.shape[0] != 1:
        matrix = matrix[chunk.item : chunk.last_item]
    if matrix.shape[2] != 1:
        matrix = matrix[:, :, chunk.first : chunk.last]
    return matrix if matrix.shape[3] == 1 else matrix[..., :seen]


def _autocast(q: Tensor) -> bool:
    return torch.is_autocast_enabled(q.device.type)


def _check_projection(q: Tensor, v: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    inner = q.shape[1] * v.shape[3]
    if weight.dim() != 2 or weight.shape[1] != inner:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}; it must be (hidden, {inner}): this rank's "
            f"{q.shape[1]} heads x {v.shape[3]} channels of the projection's input"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"bias has shape {tuple(bias.shape)}; it must be ({weight.shape[0]},), the same on "
            "every rank"
        )
    for name, part in (("weight", weight), ("bias", bias)):
        if part is None:
            continue
        if part.device != q.device:
            raise checks.bad_devices(q, part, name)
        if part.dtype != q.dtype and not _autocast(q):
            raise TypeError(
                f"{name} is {part.dtype} and q {q.dtype}; cast them to one dtype, or run under "
                "torch.autocast"
            )
