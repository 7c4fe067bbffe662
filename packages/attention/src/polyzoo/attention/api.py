"""`attention`: the one function every model calls; `explain`: who would serve it."""

from __future__ import annotations

from collections.abc import Sequence
from operator import index
from typing import Literal, overload

import torch
from torch import Tensor

from polyzoo.attention import checks
from polyzoo.attention.registry import BIT, Choice, Request, choose, decide, forwards, requested
from polyzoo.attention.limits import MATRIX_LIMIT
from polyzoo.attention.philox import draw_rng
from polyzoo.attention.types import Call, CuSeqlens, DecomposedBias

Precision = Literal["exact", "int8", "fp8"]
_LARGEST_ITEM = 8  # bytes of a score, at most


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
        causal: See key j only if `j <= i + delta`. torch aligns `is_causal` at the top left instead:
            the same for n == m only.
        window: `(left, right)`: see `i + delta - left <= j <= i + delta + right`; -1 is unbounded.
        kv_lens: int32/int64 `(b,)`, valid keys of each batch item, 0 allowed.
        cu_seqlens: Packed batch: b is 1 and the sequences follow one another along the length.
        mask: bool, True attends, broadcastable to `(b, h, n, m)`.
        bias: Floating, broadcastable to `(b, h, n, m)`, differentiable; or a `DecomposedBias`.
        scale: Multiplies the scores; `d ** -0.5` if left out.
        dropout: Probability in [0, 1) of dropping an attention probability; the others are divided
            by `1 - dropout`. Which are dropped depends on seed and position only, so all backends
            agree.
        generator: Draws the seed of dropout; torch's own if left out. An int64 tensor (seed, offset)
            on q's device gives the state itself.
        return_lse: Also return the natural log-sum-exp of the scores, `(b, h, n)` fp32 (fp64 for
            fp64 inputs), not differentiable.
        precision: "exact"; "int8" and "fp8" need a backend that has them.
        deterministic: Ask for a bit-reproducible backward. torch's CUDA kernels promise it only
            under `torch.use_deterministic_algorithms(True)`.
        backend: "auto", or a name from `backends()`, which then never falls back.

    Returns:
        `(b, h, n, dv)` in q's dtype, laid out in memory as `(b, n, h, dv)` so that merging the heads
        costs no copy; with `return_lse` also the log-sum-exp.

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
    features = _shape_features(q, k, v)
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
        features |= _bias_features(bias)
    if dropout:
        features |= BIT["dropout"]
    if return_lse:
        features |= BIT["lse"]
    if precision != "exact":
        features |= _precision_feature(precision)
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        features |= BIT["backward"]
    scores = b * h * n * m
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
    scores = scores if scores * _LARGEST_ITEM > MATRIX_LIMIT else 0
    if torch.compiler.is_compiling():
        # operator.index fixes a symbolic size: head sizes always, the matrix only where it is huge.
        d, dv, scores = index(d), index(v.shape[3]), index(scores)
        name = _chosen_name(device, dtype, d, dv, features, scores, backend)
        out, lse = forwards()[name](call)
    else:
        request = Request(device, dtype, d, v.shape[3], features, scores)
        chosen = choose(request, requested(backend)).backend
        out, lse = chosen.forward(call)  # pyright: ignore[reportOptionalMemberAccess]
    if not return_lse:
        return out
    assert lse is not None  # noqa: S101 - every backend returns what was asked for
    return out, lse


def explain(
    q: Tensor | Sequence[int],
    k: Tensor | Sequence[int],
    v: Tensor | Sequence[int],
    *,
    causal: bool = False,
    window: tuple[int, int] | None = None,
    kv_lens: Tensor | Sequence[int] | None = None,
    cu_seqlens: CuSeqlens | None = None,
    mask: Tensor | Sequence[int] | None = None,
    bias: Tensor | DecomposedBias | Sequence[int] | None = None,
    dropout: float = 0.0,
    return_lse: bool = False,
    precision: Precision = "exact",
    backward: bool = False,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Choice:
    """Say which backend serves a call and why the others do not; computes nothing.

    Args:
        q: Queries: a tensor (a meta tensor will do) or its shape.
        k: Keys, likewise.
        v: Values, likewise.
        causal: As for `attention`.
        window: As for `attention`.
        kv_lens: As for `attention`, or its shape.
        cu_seqlens: As for `attention`.
        mask: As for `attention`, or its shape.
        bias: As for `attention`, or the shape of a dense one.
        dropout: As for `attention`.
        return_lse: As for `attention`.
        precision: As for `attention`.
        backward: Gradients are wanted, where q, k and v do not say so themselves.
        device: Where the call would run; the device of q if left out.
        dtype: In which dtype; that of q, or fp32 for shapes.
        backend: As for `attention`.

    Returns:
        The choice; print it for one line per refused backend. Its `backend` is None if nobody serves.

    Raises:
        ValueError: The shapes do not fit, or the backend does not exist.

    Example:
        >>> explain((2, 8, 16, 64), (2, 8, 16, 64), (2, 8, 16, 64), device="cpu").backend.name
        'sdpa'
    """
    given = q.device if isinstance(q, Tensor) else "cpu"
    q, k, v = (
        t if isinstance(t, Tensor) else torch.empty(tuple(t), device="meta", dtype=dtype)
        for t in (q, k, v)
    )
    features = _shape_features(q, k, v)
    if causal or window is not None:
        left, right = checks.band(causal, window)
        features |= BIT["causal"] if left < 0 and right == 0 else BIT["window"]
    asked = {
        "varlen": cu_seqlens is not None,
        "kv_lens": kv_lens is not None,
        "mask": mask is not None,
        "dropout": dropout > 0,
        "lse": return_lse,
        "backward": backward or q.requires_grad or k.requires_grad or v.requires_grad,
    }
    for name, wanted in asked.items():
        features |= BIT[name] if wanted else 0
    if isinstance(bias, (Tensor, DecomposedBias)):
        features |= _bias_features(bias)
    elif bias is not None:
        features |= BIT["bias"]
    if precision != "exact":
        features |= _precision_feature(precision)
    n, m = (
        (q.shape[2], k.shape[2]) if cu_seqlens is None else (cu_seqlens.max_q, cu_seqlens.max_k)
    )
    scores = q.shape[0] * q.shape[1] * n * m
    request = Request(
        torch.device(device if device is not None else given),
        dtype or q.dtype,
        q.shape[3],
        v.shape[3],
        features,
        scores if scores * _LARGEST_ITEM > MATRIX_LIMIT else 0,
    )
    return decide(request, requested(backend))


def _shape_features(q: Tensor, k: Tensor, v: Tensor) -> int:
    """Check that the three shapes agree, and return what they ask for."""
    try:
        b, h, _, d = q.shape
        bk, hk, m, dk = k.shape
        bv, hv, mv, dv = v.shape
    except (ValueError, AttributeError, TypeError):
        raise checks.bad_shapes(q, k, v) from None
    if bk != b or bv != b or mv != m or dk != d or d == 0 or hv != hk:
        raise checks.bad_shapes(q, k, v)
    features = 0
    if h != hk:
        if hk == 0 or h % hk:
            raise checks.bad_shapes(q, k, v)
        features = BIT["gqa"]
    return features if dv == d else features | BIT["dv_ne_d"]


def _bias_features(bias: Tensor | DecomposedBias) -> int:
    if isinstance(bias, DecomposedBias):
        wants_grad = bias.rel_h.requires_grad or bias.rel_w.requires_grad
        features = BIT["relpos"]
    else:
        wants_grad = bias.requires_grad
        features = BIT["bias"]
    return features | BIT["bias_grad"] if wants_grad and torch.is_grad_enabled() else features


def _precision_feature(precision: str) -> int:
    if precision not in ("int8", "fp8"):
        raise ValueError(f'precision is {precision!r}; use "exact", "int8" or "fp8"')
    return BIT[precision]


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
