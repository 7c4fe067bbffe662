"""Two rankings made one. Torch-free."""

from __future__ import annotations

import numpy as np

from polyzoo.sea.search.config import Mode, SearchRequest

FUSION_OFFSET = 60
"""Reciprocal rank fusion: a hit's share is weight / (this + rank), so no first place decides."""


Ranking = list[tuple[int, float]]
"""Numbers of units and their scores, best first."""


def fuse(vector: Ranking, words: Ranking, request: SearchRequest, mode: Mode) -> Ranking:
    """Return the best units of both rankings, or of the one that the mode names."""
    if mode == "vector":
        return vector[: request.top_k]
    if mode == "lexical":
        return words[: request.top_k]
    scores: dict[int, float] = {}
    for ranking, weight in ((vector, request.vector_weight), (words, request.lexical_weight)):
        for rank, (number, _) in enumerate(ranking, start=1):
            if weight:
                scores[number] = scores.get(number, 0.0) + weight / (FUSION_OFFSET + rank)
    order = np.lexsort((np.array(list(scores), np.int64), -np.array(list(scores.values()))))
    items = list(scores.items())
    return [items[place] for place in order[: request.top_k]]
