"""A function as the encoder's pieces, every one with the characters it stands for. Torch-free."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from polyzoo.core.errors import DataError
from polyzoo.sea.config import SplitConfig
from polyzoo.sea.splitting.documentation import docstring_spans
from polyzoo.sea.splitting.parsing import ParsedSource, blank

_WORD = re.compile(r"\S+")


@dataclass(frozen=True, slots=True)
class Pieces:
    """Encoder pieces of a text: ids, and the [start, end) characters of each."""

    ids: list[int]
    spans: list[tuple[int, int]]


Tokenize = Callable[[str], Pieces]
"""Text to pieces, without special tokens and without truncation."""


@dataclass(frozen=True, slots=True)
class PreparedSource:
    """A function ready to be cut."""

    tree: ParsedSource
    text: str
    """As given, with what is left out blanked: offsets are the same."""
    pieces: Pieces
    """Spans refer to `text`."""
    starts: list[int]
    """Of the pieces' spans."""


def prepare_source(
    text: str, language: str, config: SplitConfig, tokenize: Tokenize
) -> PreparedSource:
    """Parse, blank what the encoder must not see, and tokenise.

    Raises:
        DataError: nothing but comments and documentation.
    """
    tree = ParsedSource(text, language=language)
    blanked = blank(tree.text, 0, len(tree.text), sorted(_hidden(tree, config)))
    pieces = _tokenize_collapsed(blanked, tokenize)
    if not pieces.ids:
        raise DataError(
            f"{text[:60]!r}: no code is left without comments and documentation; "
            "leave such functions out, or set keep_comments"
        )
    return PreparedSource(tree, blanked, pieces, [start for start, _ in pieces.spans])


def _hidden(tree: ParsedSource, config: SplitConfig) -> list[tuple[int, int]]:
    """The characters that do not reach the encoder."""
    comments = [] if config.keep_comments else tree.comment_spans
    if config.keep_docstrings:
        kept = docstring_spans(tree) if comments else []
        return [span for span in comments if not any(a <= span[0] < b for a, b in kept)]
    if tree.language != "python" and comments:
        return comments  # elsewhere documentation is made of comments
    return [*comments, *docstring_spans(tree)]


def _tokenize_collapsed(text: str, tokenize: Tokenize) -> Pieces:
    """Tokenise with one space for every run of white space, and give offsets in the text itself.

    Byte-level tokenizers spend a piece on every few blanks, and Python is a quarter blanks.
    """
    words = [match.span() for match in _WORD.finditer(text)]
    if not words:
        return Pieces([], [])
    pieces = tokenize(" ".join([text[start:end] for start, end in words]))
    if not pieces.ids:
        return Pieces([], [])
    edges = np.array(words)
    lengths = edges[:, 1] - edges[:, 0] + 1  # with the space behind the word
    after = np.cumsum(lengths)
    total = int(after[-1])
    origin = np.arange(total) + np.repeat(edges[:, 0] - (after - lengths), lengths)
    is_space = np.zeros(total, dtype=np.int64)
    is_space[after - 1] = 1
    begin, end = np.array(pieces.spans).T
    # A piece may carry the space before or behind its word: not part of where it stands.
    begin = np.minimum(begin, total - 2)
    begin = np.minimum(begin + is_space[begin], total - 2)
    last = np.clip(end - 1, 0, total - 2)
    last = np.maximum(last - is_space[last], begin)
    starts = np.maximum.accumulate(origin[begin])
    stops = np.maximum(origin[last] + 1, starts)
    return Pieces(pieces.ids, list(zip(starts.tolist(), stops.tolist(), strict=True)))
