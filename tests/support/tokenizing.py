"""Tokenizers for tests: no network, no model."""

from __future__ import annotations

import gzip
import re
from collections.abc import Callable
from functools import cache
from zlib import crc32

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from polyzoo.sea.splitting import Pieces
from support.workspace import ROOT

Tokenize = Callable[[str], Pieces]

_RUN = re.compile(r"[A-Za-z0-9_]+|[^\s]")


def word_pieces(text: str) -> Pieces:
    """Words in parts of at most four characters, other characters alone; white space gives none."""
    spans = [
        (start, min(start + 4, match.end()))
        for match in _RUN.finditer(text)
        for start in range(match.start(), match.end(), 4)
    ]
    return Pieces([crc32(text[a:b].encode()) % 30_000 for a, b in spans], spans)


class Recorder:
    """A tokenizer that remembers the last text it was given, and what became of it."""

    def __init__(self, tokenize: Tokenize = word_pieces) -> None:
        self._tokenize = tokenize
        self.text = ""
        self.pieces = Pieces([], [])

    def __call__(self, text: str) -> Pieces:
        self.text = text
        self.pieces = self._tokenize(text)
        return self.pieces

    def seen(self, first: int = 0, last: int | None = None) -> str:
        """The characters of some pieces, without white space."""
        return "".join("".join(self.text[a:b].split()) for a, b in self.pieces.spans[first:last])


def numbered_pieces(text: str) -> Pieces:
    """As `word_pieces`, with 0, 1, 2, ... as ids: they tell which piece of the text it is."""
    pieces = word_pieces(text)
    return Pieces(list(range(len(pieces.ids))), pieces.spans)


@cache
def _gpt2() -> Tokenizer:
    path = ROOT / "tests" / "parity" / "sea" / "gpt2_merges.txt.gz"
    lines = gzip.decompress(path.read_bytes()).decode().splitlines()[1:]
    merges = [(left, right) for left, right in (line.split(" ") for line in lines if line)]
    # The vocabulary follows from the merges: 256 bytes, then every merge in order.
    names = sorted(pre_tokenizers.ByteLevel.alphabet()) + [left + right for left, right in merges]
    vocabulary = {name: index for index, name in enumerate(dict.fromkeys(names))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def byte_pieces(text: str) -> Pieces:
    """GPT-2's byte pairs: a piece has the space before it, a character may be several pieces."""
    encoding = _gpt2().encode(text, add_special_tokens=False)
    return Pieces(encoding.ids, encoding.offsets)
