"""`attention`: the one function every model calls."""

from __future__ import annotations

from operator import index
from typing import Literal, overload

import torch
from torch import Tensor

from polyzoo.attention import checks
from polyzoo.attention.features import (
    BIT,
    Precision,
    bias_features,
    long_square,
    precision_feature,
    shape_features,
)
from polyzoo.attention.limits import matrix_scores
from polyzoo.attention.philox import draw_rng
from polyzoo.attention.registry import Request, choose, forwards, requested
from polyzoo.attention.types import Call, CuSeqlens, DecomposedBias


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = ...,
    window: tuple[int, int] | None = ...,
    kv_lens: Tensor | None = ...,
    cu_seqlens: CuSeqlens | None = ...,
    mask: Tensor | None = ...,
    bias: Tensor | DecomposedBias | None = ...,
    scale: float | None = ...,
    dropout: float = ...,
    generator: torch.Generator | Tensor | None = ...,
    return_lse: Literal[False] = ...,
    precision: Precision = ...,
    deterministic: bool = ...,
    backend: str = ...,
) -> Tensor: ...


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = ...,
    window: tuple[int, int] | None = ...,
    kv_lens: Tensor | None = ...,
    cu_seqlens: CuSeqlens | None = ...,
    mask: Tensor | None = ...,
    bias: Tensor | DecomposedBias | None = ...,
    scale: float | None = ...,
    dropout: float = ...,
    generator: torch.Generator | Tensor | None = ...,
    return_lse: Literal[True],
    precision: Precision = ...,
    deterministic: bool = ...,
    backend: str = ...,
) -> tuple[Tensor, Tensor]: ...


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window: tuple[int, int] | None = None,
    kv_lens: Tensor | None = None,
    cu_seqlens: CuSeqlens | None = None,
    mask: Tensor | None = None,
    bias: Tensor | DecomposedBias | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    generator: torch.Generator | Tensor | None = None,
    return_lse: bool = False,
    precision: Precision = "exact",
    deterministic: bool = True,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute `softmax(scale * q k^T + bias) v` over the keys each query may see.

    The rules on what a query sees combine: a key must pass all of them. A query that sees nothing
    gets 0, log-sum-exp -inf and no gradient. With L keys in a sequence (m, or its `kv_lens`, or its
    packed length) and `delta = L - n`, query i stands at key position `i + delta`.

    Args:
        q: Queries `(b, h, n, d)`, any strides with neighbouring channels.
        k: Keys `(b, hk, m, d)`; query head i uses key head `i // (h // hk)`.
        v: Values `(b, hk, m, dv)`.
        causal: See key j only if `j <= i + delta`. torch aligns `is_causal` at the top left
            instead: the same for n == m only.
        window: `(left, right)`: see `i + delta - left <= j <= i + delta + right`; -1 is unbounded.
        kv_lens: int32/int64 `(b,)`, valid keys of each batch item, 0 allowed.
        cu_seqlens: Packed batch: b is 1 and the sequences follow one another along the length.
        mask: bool, True attends, broadcastable to `(b, h, n, m)`.
        bias: Floating, broadcastable to `(b, h, n, m)`, differentiable; or a `DecomposedBias`.
        scale: Multiplies the scores; `d ** -0.5` if left out.
        dropout: Probability in [0, 1) of dropping an attention probability; the others are divided
            by `1 - dropout`. Which are dropped depends on seed and position only, so all backends
            agree.
        generator: Draws the seed of dropout; torch's own if left out. An int64 tensor (seed,
            offset) on q's device gives the state itself.
        return_lse: Also return the natural log-sum-exp of the scores, `(b, h, n)` fp32 (fp64 for
            fp64 inputs), not differentiable.
        precision: "exact"; "int8" and "fp8" need a backend that has them.
        deterministic: Ask for a bit-reproducible backward. torch's CUDA kernels promise it only
            under `torch.use_deterministic_algorithms(True)`.
        backend: "auto", or a name from `backends()`, which then never falls back.

    Returns:
        `(b, h, n, dv)` in q's dtype, laid out in memory as `(b, n, h, dv)` so that merging the
        heads costs no copy; with `return_lse` also the log-sum-exp.

    Raises:
        ValueError: Shapes, lengths, values or devices break a rule, or no backend serves the call.
        TypeError: A dtype does.

    Example:
        >>> q = k = v = torch.randn(2, 8, 16, 64)
        >>> attention(q, k, v, causal=True).shape
        torch.Size([2, 8, 16, 64])
    """
    if torch.is_autocast_enabled(q.device.type):
        q, k, v = _autocast(q, k, v)
        with torch.autocast(q.device.type, enabled=False):  # what runs in fp32 must stay so
            return attention(  # pyright: ignore[reportCallIssue]
                q,
                k,
                v,
                causal=causal,
                window=window,
                kv_lens=kv_lens,
                cu_seqlens=cu_seqlens,
                mask=mask,
                bias=bias,
                scale=scale,
                dropout=dropout,
                generator=generator,
                return_lse=return_lse,  # pyright: ignore[reportArgumentType]
                precision=precision,
                deterministic=deterministic,
                backend=backend,
            )
    features = shape_features(q, k, v)
    dtype, device = q.dtype, q.device
    if k.dtype != dtype or v.dtype != dtype or dtype not in checks.FLOATS:
        raise checks.bad_dtypes(q, k, v)
    if k.device != device or v.device != device:
        raise checks.bad_devices(q, *((k, "k") if k.device != device else (v, "v")))
    if q.stride(3) != 1 or k.stride(3) != 1 or v.stride(3) != 1:
        q, k, v = (
            t if t.stride(3) == 1 or t.shape[3] < 2 else checks.dense_channels(t, name)
            for t, name in ((q, "q"), (k, "k"), (v, "v"))
        )
    b, h, n, d = q.shape
    m = k.shape[2]
    left, right = -1, -1
    if causal or window is not None:
        left, right = checks.band(causal, window)
        features |= BIT["causal"] if left < 0 and right == 0 else BIT["window"]
    if cu_seqlens is not None:
        others = {"kv_lens": kv_lens, "mask": mask, "bias": bias}
        checks.check_cu_seqlens(cu_seqlens, q, k, others)
        features |= BIT["varlen"]
        n, m = cu_seqlens.max_q, cu_seqlens.max_k
    if kv_lens is not None:
        checks.check_kv_lens(kv_lens, q, m)
        features |= BIT["kv_lens"]
    if mask is not None:
        mask = checks.check_mask(mask, q, (b, h, n, m))
        features |= BIT["mask"]
    if bias is not None:
        bias = checks.check_bias(bias, q, (b, h, n, m))
        features |= bias_features(bias)
    if dropout:
        features |= BIT["dropout"]
    if return_lse:
        features |= BIT["lse"]
    if precision != "exact":
        features |= precision_feature(precision)
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        features |= BIT["backward"]
    call = Call(
        q,
        k,
        v,
        left,
        right,
        kv_lens,
        cu_seqlens,
        mask,
        bias,
        d**-0.5 if scale is None else float(scale),
        dropout,
        _rng(dropout, generator, device),
        return_lse,
        deterministic,
    )
    scores = matrix_scores(b, h, n, m)
    if torch.compiler.is_compiling():
        # operator.index fixes a symbolic size: head sizes always, the matrix only where it is huge.
        # Lengths stay symbolic, so what depends on them (`long_square`) is left out here.
        d, dv, scores = index(d), index(v.shape[3]), index(scores)
        name = _chosen_name(device, dtype, d, dv, features, scores, backend)
        out, lse = forwards()[name](call)
    else:
        square = device.type == "cuda" and long_square(n, m, right == 0)
        request = Request(device, dtype, d, v.shape[3], features, scores, square)
        chosen = choose(request, requested(backend)).backend
        out, lse = chosen.forward(call)  # pyright: ignore[reportOptionalMemberAccess]
    if not return_lse:
        return out
    assert lse is not None  # noqa: S101 - every backend returns what was asked for
    return out, lse


def _rng(
    dropout: float, generator: torch.Generator | Tensor | None, device: torch.device
) -> Tensor | None:
    if dropout == 0:
        return None
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout is {dropout}; it is a probability in [0, 1)")
    if isinstance(generator, Tensor) and (
        generator.shape != (2,) or generator.dtype != torch.int64 or generator.device != device
    ):
        raise ValueError(
            f"generator is a {generator.dtype} tensor of shape {tuple(generator.shape)} on "
            f"{generator.device}; as a state it must be int64 (seed, offset) on {device}"
        )
    return draw_rng(generator, device)


def _autocast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    kind = q.device.type
    dtype = torch.get_autocast_dtype(kind)
    return tuple(  # pyright: ignore[reportReturnType]
        t.to(dtype) if t.is_floating_point() and t.device.type == kind else t for t in (q, k, v)
    )


@torch._dynamo.assume_constant_result
def _chosen_name(
    device: torch.device,
    dtype: torch.dtype,
    d: int,
    dv: int,
    features: int,
    scores: int,
    backend: str,
) -> str:
    """Choose while torch.compile traces: the name becomes part of the graph."""
    chosen = choose(Request(device, dtype, d, dv, features, scores), requested(backend)).backend
    return chosen.name  # pyright: ignore[reportOptionalMemberAccess]
