"""A second, real implementation of the `Embedder` protocol: hashed identifiers, randomly projected.

Texts that share words get similar vectors, which is all that the index's tests need. Its splitter
cuts at every tenth line.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from polyzoo.sea.config import SeaConfig
from polyzoo.sea.search.lexical import words

LINES_PER_BLOCK = 10


@dataclass(frozen=True)
class LineBlock:
    first_line: int
    last_line: int


@dataclass(frozen=True)
class LineSplit:
    blocks: tuple[LineBlock, ...]


@dataclass(frozen=True)
class Embedded:
    vectors: np.ndarray
    block_vectors: list[np.ndarray]
    entry_vectors: list[np.ndarray]
    splits: list[LineSplit]


class IdentifierEncoder:
    def __init__(self, *, dim: int = 64, seed: int = 0, aggregator: str = "mean") -> None:
        self.dim = dim
        self.seed = seed
        self.config = SeaConfig(aggregator=aggregator)
        self.model_id = f"identifiers-{dim}-{seed}"
        self.encoded = 0
        self._rows: dict[str, np.ndarray] = {}

    def embed_code(self, codes, *, language):
        assert isinstance(language, str) or len(language) == len(codes)
        self.encoded += len(codes)
        splits, block_vectors = [], []
        for code in codes:
            lines = code.split("\n")
            starts = range(0, len(lines), LINES_PER_BLOCK)
            blocks = [LineBlock(s, min(s + LINES_PER_BLOCK, len(lines)) - 1) for s in starts]
            texts = ["\n".join(lines[b.first_line : b.last_line + 1]) for b in blocks]
            splits.append(LineSplit(tuple(blocks)))
            block_vectors.append(np.stack([self._embed(text) for text in texts]))
        vectors = np.stack([_unit(rows.mean(0)) for rows in block_vectors])
        entries = block_vectors
        if self.config.aggregator == "soft_maxsim":  # beside its blocks, a function of several
            entries = [
                np.vstack([rows, vector]) if len(rows) > 1 else rows
                for rows, vector in zip(block_vectors, vectors, strict=True)
            ]
        return Embedded(vectors, block_vectors, entries, splits)

    def embed_queries(self, queries):
        return np.stack([self._embed(query) for query in queries])

    def _embed(self, text: str) -> np.ndarray:
        rows = [self._row(word) for word in words(text).split()]
        return _unit(np.sum(rows, axis=0)) if rows else _unit(np.ones(self.dim, np.float32))

    def _row(self, word: str) -> np.ndarray:
        if word not in self._rows:
            digest = hashlib.blake2b(f"{self.seed}:{word}".encode(), digest_size=8).digest()
            generator = np.random.default_rng(int.from_bytes(digest, "little"))
            self._rows[word] = generator.standard_normal(self.dim).astype(np.float32)
        return self._rows[word]


def _unit(vector: np.ndarray) -> np.ndarray:
    return (vector / (np.linalg.norm(vector) or 1.0)).astype(np.float32)
