"""Ranks and the figures made of them, as pure functions of a score matrix. Torch-free.

Shares (R@k) are percentages, as in the published tables; the mean reciprocal rank lies in [0, 1].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from polyzoo.core.errors import DataError

Ties = Literal["pessimistic", "mean", "optimistic"]
CUTS = (1, 5, 10, 100, 1000)


@dataclass(frozen=True)
class Ranks:
    """Rank of every query's answer, from 1."""

    ranks: np.ndarray
    """(q,) float64; halves occur with ties="mean"."""
    tied: int
    """Queries whose answer shares its score with another candidate."""


def answer_ranks(
    scores: np.ndarray, answers: Sequence[int] | np.ndarray, *, ties: Ties = "pessimistic"
) -> Ranks:
    """Rank the answer of each query among all candidates.

    Args:
        scores: (q, c), larger is better. NaN and inf are refused.
        answers: (q,) column of each query's answer.
        ties: Where the answer stands among equal scores: behind all others (the default), in
            their middle, or before them.
    """
    answers = np.asarray(answers)
    if scores.ndim != 2 or answers.shape != (scores.shape[0],):
        raise DataError(
            f"scores {scores.shape} and answers {answers.shape} do not fit: (q, c) and (q,) wanted"
        )
    if answers.size and (answers.min() < 0 or answers.max() >= scores.shape[1]):
        raise DataError(f"an answer lies outside the {scores.shape[1]} candidates")
    bad = ~np.isfinite(scores).all(axis=1)
    if bad.any():
        raise DataError(f"query {int(np.argmax(bad))} has a score that is not a finite number")
    own = scores[np.arange(len(answers)), answers][:, None]
    greater = (scores > own).sum(axis=1)
    equal = (scores == own).sum(axis=1) - 1
    behind = {"pessimistic": equal, "mean": equal / 2, "optimistic": np.zeros_like(equal)}[ties]
    return Ranks(ranks=(1 + greater + behind).astype(np.float64), tied=int((equal > 0).sum()))


def mean_reciprocal_rank(ranks: np.ndarray, *, cutoff: int | None = None) -> float:
    """Mean of 1/rank; beyond `cutoff` a query counts 0. No queries give 0."""
    if not len(ranks):
        return 0.0
    reciprocal = 1 / ranks
    if cutoff is not None:
        reciprocal = np.where(ranks <= cutoff, reciprocal, 0.0)
    return float(reciprocal.mean())


def recall(ranks: np.ndarray, k: int) -> float:
    """Percentage of queries whose answer is among the first k."""
    return float((ranks <= k).mean() * 100) if len(ranks) else 0.0


def median_rank(ranks: np.ndarray) -> float:
    """Median, rounded down as published."""
    return float(np.floor(np.median(ranks))) if len(ranks) else 0.0


@dataclass(frozen=True)
class Figures:
    """What is reported about one set of ranks."""

    n: int
    mrr: float
    recall: dict[str, float] = field(default_factory=dict)
    median_rank: float = 0.0

    @classmethod
    def of(cls, ranks: np.ndarray, *, cutoff: int | None = None) -> Figures:
        """Figures of some queries; `cutoff` as in `mean_reciprocal_rank`."""
        return cls(
            n=len(ranks),
            mrr=mean_reciprocal_rank(ranks, cutoff=cutoff),
            recall={str(k): recall(ranks, k) for k in CUTS},
            median_rank=median_rank(ranks),
        )


def by_length(
    ranks: np.ndarray, lengths: np.ndarray, *, cutoff: int | None = None
) -> dict[str, Figures]:
    """Figures by length of the answer in encoder pieces, special tokens not counted."""
    masks = {
        "<=256": lengths <= 256,
        "257-512": (lengths > 256) & (lengths <= 512),
        ">512": lengths > 512,
        ">256": lengths > 256,
    }
    return {name: Figures.of(ranks[mask], cutoff=cutoff) for name, mask in masks.items()}


def released_ranks(
    scores: np.ndarray, answers: Sequence[int], *, candidates: int, masked: float = -50.0
) -> np.ndarray:
    """Ranks of the published evaluation, which stores block vectors behind the candidates.

    Columns from `candidates` on are set to `masked`, not removed: a candidate scoring below that
    still falls behind them. The order of equal scores is undefined there; here it is pessimistic.
    """
    scores = scores.copy()
    scores[:, candidates:] = masked
    return answer_ranks(scores, answers).ranks
