"""Shares and ranks as pure functions of score tables. Torch-free."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from polyzoo.core.errors import DataError

CUTS = (1, 5, 10)


@dataclass(frozen=True)
class Recall:
    """Shares of queries with a right answer among the first 1, 5 and 10."""

    queries: int
    pool: int
    """Candidates."""
    r1: float
    r5: float
    r10: float

    @property
    def mean(self) -> float:
        """Mean of the three."""
        return (self.r1 + self.r5 + self.r10) / 3


def recall(scores: NDArray[np.floating], right: NDArray[np.bool_]) -> Recall:
    """Rank candidates for each query; among equal scores the wrong ones come first.

    Args:
        scores: (q, c), larger is better.
        right: (q, c), which candidates answer the query; at least one each.

    Raises:
        DataError: Shapes differ, a query has no answer, or a score is no number.
    """
    if scores.shape != right.shape or scores.ndim != 2:
        raise DataError(f"scores {scores.shape} and answers {right.shape} must both be (q, c)")
    if not right.any(1).all():
        raise DataError(f"query {int(np.argmin(right.any(1)))} has no right candidate")
    if not np.isfinite(scores).all():
        raise DataError("a score is not a finite number")
    best = np.where(right, scores, -np.inf).max(1, keepdims=True)
    ranks = ((scores >= best) & ~right).sum(1)
    shares = [float((ranks < k).mean()) for k in CUTS]
    return Recall(len(scores), scores.shape[1], *shares)


def chance(right: NDArray[np.bool_]) -> Recall:
    """Expected recall of a random order."""
    pool = right.shape[1]
    answers = right.sum(1)
    shares = []
    for k in CUTS:
        missed = np.ones(len(right))
        for i in range(min(k, pool)):
            missed *= np.clip(pool - answers - i, 0, None) / (pool - i)
        shares.append(float((1 - missed).mean()))
    return Recall(len(right), pool, *shares)


def named(caption: str) -> str:
    """Return what a caption says the picture shows: the words before the first comma."""
    return " ".join(re.findall(r"\w+", caption.partition(",")[0].lower()))


def share_named(captions: Sequence[str], names: Sequence[str]) -> float:
    """Share of captions that name the right concept."""
    if not captions:
        return 0.0
    right = sum(named(c) == named(n) for c, n in zip(captions, names, strict=True))
    return right / len(captions)


def share_grouped(
    captions: Sequence[str], groups: Sequence[int], known: dict[str, int]
) -> tuple[float, int]:
    """Share of captions that name a concept of the right group, and how many were judged.

    Args:
        captions: What was said.
        groups: Right ones; pictures with -1 are left out.
        known: Group of every concept the model can know, by `named` name.
    """
    judged = [(c, g) for c, g in zip(captions, groups, strict=True) if g >= 0]
    if not judged:
        return 0.0, 0
    right = sum(known.get(named(caption), -2) == group for caption, group in judged)
    return right / len(judged), len(judged)
