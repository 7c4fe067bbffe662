"""Which key a query sees, from positions alone."""

from __future__ import annotations

import torch
from torch import Tensor


def band_mask(
    queries: Tensor, keys: Tensor, *, delta: int | Tensor, left: int, right: int
) -> Tensor:
    """Tell which keys lie in each query's band: `i + delta - left <= j <= i + delta + right`.

    Args:
        queries: Query positions, `(n,)`.
        keys: Key positions, `(m,)`.
        delta: Keys minus queries of the sequence; a tensor `(b, 1, 1, 1)` where it differs.
        left: Reach before the own position; -1 is unbounded.
        right: Reach after it; -1 is unbounded, 0 is causal.

    Returns:
        bool `(n, m)`, or `(b, 1, n, m)`.
    """
    at = queries.unsqueeze(-1) + delta  # compared as they are: a difference would be n x m int64
    if left < 0:
        return keys <= at + right
    if right < 0:
        return keys >= at - left
    return (keys <= at + right) & (keys >= at - left)


def effective_band(n: int, m: int, left: int, right: int) -> tuple[int, int]:
    """Drop the bounds that no query of `n` over `m` keys can reach: they become -1."""
    if right >= n - 1:  # the first query already sees the last key
        right = -1
    if left >= m - 1:  # the last query still sees the first key
        left = -1
    return left, right


def length_mask(lengths: Tensor, m: int) -> Tensor:
    """Tell which of `m` keys are valid: bool `(b, 1, 1, m)`."""
    return torch.arange(m, device=lengths.device) < lengths[:, None, None, None]


def visible_keys(
    n: int,
    m: int,
    *,
    left: int,
    right: int,
    kv_lens: Tensor | None,
    mask: Tensor | None,
    device: torch.device,
) -> Tensor | None:
    """Combine every rule into one bool mask broadcastable to `(b, h, n, m)`, or None."""
    visible = None if kv_lens is None else length_mask(kv_lens, m)
    if left >= 0 or right >= 0:
        lengths = m if kv_lens is None else kv_lens.clamp(0, m)[:, None, None, None]
        band = band_mask(
            torch.arange(n, device=device),
            torch.arange(m, device=device),
            delta=lengths - n,
            left=left,
            right=right,
        )
        visible = band if visible is None else visible & band
    if mask is not None:
        visible = mask if visible is None else visible & mask
    return visible
