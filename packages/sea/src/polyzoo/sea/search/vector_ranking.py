"""Units ranked by their vectors: by one each, by the best block, or softly by all entries."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from polyzoo.core.errors import ConfigError
from polyzoo.sea.config import SeaConfig
from polyzoo.sea.entries import entry_score
from polyzoo.sea.search.config import SearchRequest
from polyzoo.sea.search.embedding import EXTRA_ENTRIES, numbers_of_blocks, unit_of_block
from polyzoo.sea.search.fusion import Ranking
from polyzoo.sea.search.index import CodeIndex
from polyzoo.sea.search.stores import Filter, Vectors, VectorStore

DEPTH = 200
"""Units ranked at least, for the fusion with the other ranking."""
_EXACT = 50
"""Places of a soft ranking that are exact at least; further down a unit may be missing."""


def rank_vectors(
    index: CodeIndex, query: Vectors, request: SearchRequest, where: Filter
) -> Ranking:
    """Rank visible units, whatever the store holds that is not visible (yet, or any more).

    Args:
        index: Which units, and which store.
        query: (dim,).
        request: How many are asked for, and by which rule.
        where: Which units may be returned.

    Raises:
        ConfigError: the rule compares blocks, and the index holds none.
    """
    settings = index.settings
    by_blocks = request.maxsim or settings.sea.keeps_entries
    if by_blocks and not settings.keep_blocks:
        raise ConfigError(
            f"{index.folder} holds no block vectors, which maxsim compares; build it again "
            f"with: polyzoo sea index {settings.repo} --out {index.folder} --rebuild "
            "--keep-blocks"
        )
    soft = by_blocks and not request.maxsim and settings.sea.aggregator == "soft_maxsim"
    store = index.store(blocks=by_blocks)
    wanted = max(DEPTH, 4 * request.top_k)
    limit = wanted * (4 if by_blocks else 1)
    while True:
        numbers, scores = store.search(query, limit=limit, where=where)
        units = unit_of_block(numbers) if by_blocks else numbers
        best: dict[int, float] = {}
        for unit, score in zip(units.tolist(), scores.tolist(), strict=True):
            best.setdefault(unit, score)
        visible = index.catalog.embedded(list(best))
        ranking = [(unit, score) for unit, score in best.items() if unit in visible]
        complete = len(numbers) < limit
        if soft:
            ranking = _softly([unit for unit, _ in ranking], query, store, settings.sea)
            # A unit that was not found has no entry above the last one that was.
            rest = float(scores[-1]) + _slack(settings.sea) if len(scores) else 0.0
            place = min(wanted, max(_EXACT, request.top_k)) - 1
            complete = complete or (len(ranking) > place and ranking[place][1] >= rest)
        if complete or (not soft and len(ranking) >= wanted):
            return ranking[:wanted]
        limit *= 4


def _softly(units: Sequence[int], query: Vectors, store: VectorStore, sea: SeaConfig) -> Ranking:
    """Score units by all their entries; best first, equal scores by number."""
    if not units:
        return []
    # Numbers that a unit has no entry for are not in the store, and are left out of the answer.
    most = sea.split.max_blocks + EXTRA_ENTRIES
    numbers, vectors = store.get(np.concatenate([numbers_of_blocks(unit, most) for unit in units]))
    owners = unit_of_block(numbers)
    similarities = vectors @ query
    borders = np.flatnonzero(np.diff(owners)) + 1
    parts = zip(np.split(owners, borders), np.split(similarities, borders), strict=True)
    scored = [
        (int(owner[0]), float(entry_score(part[:, None], sea)[0]))
        for owner, part in parts
        if len(owner)
    ]
    return sorted(scored, key=lambda item: (-item[1], item[0]))


def _slack(sea: SeaConfig) -> float:
    """How far a soft score may lie above the best entry's."""
    most = sea.split.max_blocks + EXTRA_ENTRIES
    return max(0.0, 1 - sea.count_discount) * sea.soft_temperature * float(np.log(most))
