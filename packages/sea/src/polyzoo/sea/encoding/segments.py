"""Sums, means, maxima and softmax over consecutive segments of a tensor, without a Python loop.

Segments are given by `starts`: (s + 1,) integers, the first 0, the last the number of rows.
"""

from __future__ import annotations

import torch
from torch import Tensor


def segment_ids(starts: Tensor, total: int) -> Tensor:
    """(total,) index of the segment each row lies in. `total` is given so that nothing syncs."""
    marks = torch.zeros(total + 1, dtype=torch.int64, device=starts.device)
    # Adding, not setting: an empty segment starts where the next one does.
    marks = marks.index_add(0, starts[1:].long(), torch.ones_like(starts[1:], dtype=torch.int64))
    return marks[:total].cumsum(0)


def segment_sum(x: Tensor, owner: Tensor, count: int) -> Tensor:
    """(count, ...) sums of the rows of each segment."""
    return x.new_zeros((count, *x.shape[1:])).index_add(0, owner, x)


def segment_mean(x: Tensor, starts: Tensor, owner: Tensor) -> Tensor:
    """(s, d) means; an empty segment gives zeros."""
    count = starts.shape[0] - 1
    lengths = (starts[1:] - starts[:-1]).to(x.dtype).clamp(min=1)
    return segment_sum(x, owner, count) / lengths[:, None]


def segment_max(x: Tensor, owner: Tensor, count: int) -> Tensor:
    """(count, ...) element-wise maxima; an empty segment gives -inf."""
    index = owner.reshape(-1, *[1] * (x.dim() - 1)).expand_as(x)
    empty = x.new_full((count, *x.shape[1:]), float("-inf"))
    return empty.scatter_reduce(0, index, x, reduce="amax", include_self=True)


def segment_softmax(scores: Tensor, owner: Tensor, count: int) -> Tensor:
    """(k,) weights that sum to 1 within each segment."""
    top = segment_max(scores.detach(), owner, count)
    weights = (scores - top[owner]).exp()
    return weights / segment_sum(weights, owner, count)[owner]


def inner_products(a: Tensor, b: Tensor) -> Tensor:
    """(n, m) inner products in float32, whatever precision the surroundings run in.

    Cosines rounded to bfloat16 are steps of 0.004 apart: candidates tie that do not.
    """
    with torch.autocast(a.device.type, enabled=False):
        return a.float() @ b.float().T
