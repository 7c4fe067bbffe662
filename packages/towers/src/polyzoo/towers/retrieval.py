"""How often the right answer is among the first k."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def ranks_of(scores: Tensor, truth: Tensor) -> Tensor:
    """Return the rank of each row's right candidate; 1 is first.

    Candidates that score as high as the right one count as before it: a map that gives all the
    same score must not look perfect.

    Args:
        scores: `(n, candidates)`, higher is better, no NaN.
        truth: int64 `(n,)`, the right candidate of each row.

    Raises:
        ValueError: Shapes or values break a rule.
    """
    if scores.dim() != 2 or truth.shape != scores.shape[:1] or not scores.numel():
        raise ValueError(
            f"scores are {tuple(scores.shape)}, truth {tuple(truth.shape)}; they must be "
            "(n, candidates) and (n,)"
        )
    if scores.isnan().any():
        raise ValueError("scores hold NaN")
    if int(truth.min()) < 0 or int(truth.max()) >= scores.shape[1]:
        raise ValueError(
            f"truth is {int(truth.min())} to {int(truth.max())}; there are {scores.shape[1]} "
            "candidates"
        )
    right = scores.gather(1, truth[:, None])
    return (scores >= right).sum(1)


def recall_at(scores: Tensor, truth: Tensor, *, ks: Sequence[int] = (1, 5, 10)) -> dict[int, float]:
    """Return k to the share of rows whose right candidate is among the k best.

    Args:
        scores: `(n, candidates)`, higher is better.
        truth: int64 `(n,)`, the right candidate of each row.
        ks: At least 1 each.

    Example:
        >>> recall_at(torch.tensor([[0.9, 0.1], [0.8, 0.2]]), torch.tensor([0, 1]), ks=(1, 2))
        {1: 0.5, 2: 1.0}
    """
    if not ks or min(ks) < 1:
        raise ValueError(f"ks={tuple(ks)}: each must be at least 1")
    ranks = ranks_of(scores, truth)
    return {k: float((ranks <= k).to(torch.float32).mean()) for k in ks}
