"""The part of each hit worth showing: its best block, and the lines around the block's start."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from polyzoo.sea.catalog import UnitRow
from polyzoo.sea.embedder import Embedder
from polyzoo.sea.embedding import numbers_of_blocks
from polyzoo.sea.index import CodeIndex
from polyzoo.sea.lexical import STOP_WORDS, words
from polyzoo.sea.results import BestBlock, CodeLine
from polyzoo.sea.stores import Vectors


class Excerpts:
    """Finds best blocks by vectors where there is a query vector, else by the query's words."""

    def __init__(self, index: CodeIndex, embedder: Embedder | None) -> None:
        self.index, self.embedder = index, embedder

    def of(
        self, units: Sequence[UnitRow], query: str, vector: Vectors | None, context: int
    ) -> list[BestBlock | None]:
        """Return one excerpt per unit, of at most `context` lines."""
        scores = self._scores(units, vector) if vector is not None else [None] * len(units)
        return [
            _excerpt(unit, query, own, context) for unit, own in zip(units, scores, strict=True)
        ]

    def _scores(self, units: Sequence[UnitRow], query: Vectors) -> list[Vectors | None]:
        """Inner products of each unit's blocks, None where there is only one block to choose."""
        scores: list[Vectors | None] = [None] * len(units)
        several = [place for place, unit in enumerate(units) if len(unit.blocks) > 1]
        if self.index.settings.keep_blocks:
            store = self.index.store(blocks=True)
            for place in several:
                numbers = numbers_of_blocks(units[place].id, len(units[place].blocks))
                found, vectors = store.get(numbers)
                if len(found) == len(numbers):
                    scores[place] = vectors @ query
        elif several and self.embedder is not None:
            # Few enough to encode again: only the hits shown, and of those the long ones.
            result = self.embedder.embed_code(
                [units[place].text for place in several],
                language=[units[place].language for place in several],
            )
            for place, vectors in zip(several, result.block_vectors, strict=True):
                if len(vectors) == len(units[place].blocks):
                    scores[place] = np.asarray(vectors, np.float32) @ query
        return scores


def _excerpt(unit: UnitRow, query: str, scores: Vectors | None, context: int) -> BestBlock | None:
    text = unit.text.split("\n")
    blocks = unit.blocks or ((0, len(text) - 1),)
    best = int(np.argmax(scores)) if scores is not None else _by_words(text, blocks, query)
    first, last = blocks[best]
    last = min(last, len(text) - 1)
    # The head says what the lines belong to, unless the block begins with it.
    start = _first_code_line(text)
    places = [start] if first > start and context > 1 else []
    for place in range(first, last + 1):
        if len(places) == context:
            break
        if text[place].strip():
            places.append(place)
    return BestBlock(
        first_line=unit.file_line(first),
        last_line=unit.file_line(last),
        score=None if scores is None else float(scores[best]),
        lines=tuple(
            CodeLine(number=unit.file_line(place), text=line)
            for place, line in zip(
                places, _dedented([text[place] for place in places]), strict=True
            )
        ),
    )


def _dedented(lines: Sequence[str]) -> list[str]:
    """Lines as shown: without the indentation they share. A unit begins at its first character, so
    its first line has lost its own."""
    plain = [line.rstrip().expandtabs(4)[:400] for line in lines]
    indents = [len(line) - len(line.lstrip()) for line in plain[1:]]
    shared = min(indents, default=0)
    if plain and not plain[0].startswith(" "):
        # The body of a unit is one step deeper than its head.
        shared = max(0, shared - 4) if shared else 0
        return [plain[0], *(line[shared:] for line in plain[1:])]
    return [line[min(shared, len(line) - len(line.lstrip())) :] for line in plain]


def _first_code_line(text: Sequence[str]) -> int:
    return next((place for place, line in enumerate(text) if line.strip()), 0)


def _by_words(text: Sequence[str], blocks: Sequence[tuple[int, int]], query: str) -> int:
    if len(blocks) == 1:
        return 0
    wanted = set(words(query).split()) - STOP_WORDS
    counts = [
        len(wanted & set(words("\n".join(text[first : last + 1])).split()))
        for first, last in blocks
    ]
    return int(np.argmax(counts))
