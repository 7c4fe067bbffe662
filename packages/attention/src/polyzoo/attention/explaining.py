"""`explain`: who would serve a call, and why the others would not."""

from __future__ import annotations

import re
from collections.abc import Sequence

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
from polyzoo.attention.registry import Choice, Request, decide, requested
from polyzoo.attention.types import CuSeqlens, DecomposedBias


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
        device: Where the call would run; the device of q if left out. "sm_75" supposes a GPU of
            that compute capability, whether or not there is one.
        dtype: In which dtype; that of q, or fp32 for shapes.
        backend: As for `attention`.

    Returns:
        The choice; print it for one line per refused backend. Its `backend` is None if nobody
        serves.

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
    features = shape_features(q, k, v)
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
        features |= bias_features(bias)
    elif bias is not None:
        features |= BIT["bias"]
    if precision != "exact":
        features |= precision_feature(precision)
    n, m = (q.shape[2], k.shape[2]) if cu_seqlens is None else (cu_seqlens.max_q, cu_seqlens.max_k)
    where: torch.device | str = given if device is None else device
    capability = _supposed(where)
    request = Request(
        torch.device("cuda" if capability else where),
        dtype or q.dtype,
        q.shape[3],
        v.shape[3],
        features,
        matrix_scores(q.shape[0], q.shape[1], n, m),
        long_square(n, m, bool(features & BIT["causal"])),
        capability,
    )
    return decide(request, requested(backend))


def _supposed(device: torch.device | str) -> tuple[int, int] | None:
    found = re.fullmatch(r"sm_(\d{1,2})(\d)[a-z]?", str(device))
    return None if found is None else (int(found[1]), int(found[2]))
