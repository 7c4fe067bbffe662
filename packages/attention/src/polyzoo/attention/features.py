"""What a call can ask for, as names and as bits."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from polyzoo.attention import checks
from polyzoo.attention.types import DecomposedBias

Precision = Literal["exact", "int8", "fp8"]

FEATURES = (
    "causal",
    "window",
    "kv_lens",
    "varlen",
    "mask",
    "bias",
    "bias_grad",
    "relpos",
    "gqa",
    "dropout",
    "dv_ne_d",
    "backward",
    "lse",
    "int8",
    "fp8",
)
"""What a call can ask for and a backend can offer."""

_LONG = 256
_COMMON = 128
BIT = {name: 1 << index for index, name in enumerate(FEATURES)}


def shape_features(q: Tensor, k: Tensor, v: Tensor) -> int:
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


def bias_features(bias: Tensor | DecomposedBias) -> int:
    """Return what a bias asks for."""
    if isinstance(bias, DecomposedBias):
        wants_grad = bias.rel_h.requires_grad or bias.rel_w.requires_grad
        features = BIT["relpos"]
    else:
        wants_grad = bias.requires_grad
        features = BIT["bias"]
    return features | BIT["bias_grad"] if wants_grad and torch.is_grad_enabled() else features


def long_square(n: int, m: int, causal: bool) -> bool:
    """Tell whether a call has as many keys as queries, and so many that cuDNN's kernel pays.

    cuDNN plans every new shape anew, for a tenth of a second and more. Prompts have all lengths, so
    a causal call counts only with a length that others are likely to have too.
    """
    return n == m and n >= _LONG and (not causal or n % _COMMON == 0)


def precision_feature(precision: str) -> int:
    """Return what a reduced precision asks for.

    Raises:
        ValueError: There is no such precision.
    """
    if precision not in ("int8", "fp8"):
        raise ValueError(f'precision is {precision!r}; use "exact", "int8" or "fp8"')
    return BIT[precision]
