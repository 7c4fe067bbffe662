"""The part of each hit worth showing: its best block, and the lines around the block's start."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from polyzoo.sea.search import sketch
from polyzoo.sea.search.lexical import STOP_WORDS, words
from polyzoo.sea.search.results import BestBlock, CodeLine
from polyzoo.sea.search.schema import UnitRow
from polyzoo.sea.search.stores import Vectors


def excerpt(unit: UnitRow, query: str, vector: Vectors | None, context: int) -> BestBlock:
    """Return the best block of a unit, with at most `context` of its lines.

    Args:
        unit: A hit.
        query: Its words decide where there are no vectors to compare.
        vector: The query's vector, if it has one.
        context: Lines to show.
    """
    scores = None
    if vector is not None and unit.sketch and unit.blocks:
        scores = sketch.products(unit.sketch, vector)
    text = unit.text.split("\n")
    blocks = unit.blocks or ((0, len(text) - 1),)
    best = int(np.argmax(scores)) if scores is not None else _by_words(text, blocks, query)
    first, last = blocks[best]
    last = min(last, len(text) - 1)
    # The head says what the lines belong to, unless the block begins with it.
    start = _first_code_line(text)
    places = [start] if first > start and context > 1 else []
    # Lines after the block (a docstring, which is in no block) fill what room is left.
    for place in range(first, len(text)):
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
    """Lines as shown: without the indentation they share.

    A unit begins at its first character, so its first line has lost its own.
    """
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
