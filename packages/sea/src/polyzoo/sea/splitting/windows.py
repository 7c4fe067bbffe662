"""Fair windows over lines, words or lexer tokens, as slices of the encoder's pieces. Torch-free."""

from __future__ import annotations

import re
from bisect import bisect_left
from itertools import pairwise

from polyzoo.core.errors import ConfigError
from polyzoo.sea.config import Splitter
from polyzoo.sea.splitting.parsing import ParsedSource

_LINE = re.compile(r"^[^\S\n]*(\S)", re.MULTILINE)
_WORD = re.compile(r"\S+")


def window_ranges(count: int, *, window: int, step: int) -> list[tuple[int, int]]:
    """[start, end) of windows over `count` items; nothing is lost and the last adds something.

    Up to `window` items are one window. The last window may be shorter.

    Raises:
        ConfigError: step or window below 1, or a step that leaves a gap.

    Example:
        >>> window_ranges(9, window=4, step=2)
        [(0, 4), (2, 6), (4, 8), (6, 9)]
    """
    if window < 1 or step < 1:
        raise ConfigError(f"window={window} and step={step} must be at least 1")
    if step > window:
        raise ConfigError(
            f"step={step} is larger than window={window}: the text between two windows "
            "would be lost; choose step from 1 to window"
        )
    ranges = []
    start = 0
    while count > 0:
        end = min(start + window, count)
        ranges.append((start, end))
        if end == count:
            break
        start += step
    return ranges


def item_positions(kind: Splitter, tree: ParsedSource, text: str, starts: list[int]) -> list[int]:
    """Where the items of a window splitter begin in the pieces; the first is 0, all differ.

    Args:
        kind: line, space, or token (lexer tokens of the grammar).
        tree: The parsed text.
        text: The same text with what is left out blanked.
        starts: Character offset of every piece, ascending.
    """
    if kind == "line":
        offsets = [match.start(1) for match in _LINE.finditer(text)]
    elif kind == "space":
        offsets = [match.start() for match in _WORD.finditer(text)]
    else:
        offsets = [tree.offset(node.start_byte) for node in tree.lexer_nodes()]
    # An item that no piece begins in (it shares one with its neighbour) is no item of its own.
    positions = {bisect_left(starts, offset) for offset in offsets}
    positions.discard(len(starts))
    return sorted({0, *positions})


def chop(start: int, end: int, *, budget: int) -> list[tuple[int, int]]:
    """A slice in as few even parts as the budget allows."""
    count = max(-(-(end - start) // budget), 1)
    edges = [start + (end - start) * index // count for index in range(count + 1)]
    return list(pairwise(edges))
