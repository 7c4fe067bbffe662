"""From a function's blocks to the sequences an encoder reads, and from vectors back. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from polyzoo.core.errors import DataError
from polyzoo.sea.config import Language, SeaConfig
from polyzoo.sea.encoding.tokenizer import SeaTokenizer
from polyzoo.sea.splitting import Split, split


@dataclass(frozen=True)
class CodeEmbeddings:
    """Vectors of k functions, with what explains them."""

    vectors: np.ndarray
    """(k, d) float32."""
    block_vectors: list[np.ndarray]
    """For each function (b_i, d), one row per block of its split."""
    splits: list[Split]
    """Where the blocks are in the text."""
    weights: list[np.ndarray]
    """For each function (b_i,), share of each block in the vector; the share of the truncated
    whole function, where it is an entry, is the rest to 1."""


@dataclass(frozen=True)
class Entries:
    """What is encoded for some functions."""

    sequences: list[list[int]]
    """Ids with special tokens, function after function; the truncated whole first."""
    starts: list[int]
    """Where each function's sequences start, then their number."""
    whole: list[bool]
    """Whether a function's first sequence is its truncated whole, and not a block."""
    splits: list[Split]

    @classmethod
    def of(cls, splits: Sequence[Split], *, config: SeaConfig, tokenizer: SeaTokenizer) -> Entries:
        """List the sequences; a function of one block has one, since block and whole agree."""
        sequences: list[list[int]] = []
        counts: list[int] = []
        extra: list[bool] = []
        for parts in splits:
            rows = [tokenizer.wrap(block.ids) for block in parts.blocks]
            whole = config.whole_entry and len(rows) > 1
            if whole:
                rows.insert(0, tokenizer.wrap(parts.whole[: config.split.budget]))
            counts.append(len(rows))
            extra.append(whole)
            sequences += rows
        return cls(sequences, [0, *accumulate(counts)], extra, list(splits))

    def embeddings(
        self, vectors: np.ndarray, entries: np.ndarray, shares: np.ndarray, *, config: SeaConfig
    ) -> CodeEmbeddings:
        """Put vectors beside the blocks they belong to.

        Args:
            vectors: (k, d), one per function.
            entries: (e, d), one per sequence.
            shares: (e,) share of each sequence in its function's vector.
            config: The model's.
        """
        check_finite(vectors, [f"function {index}" for index in range(len(self.splits))])
        blocks, weights = [], []
        for row, whole in enumerate(self.whole):
            first, last = self.starts[row] + whole, self.starts[row + 1]
            blocks.append(entries[first:last])
            share = shares[first:last]
            # The truncated function is its first block, as far as it goes.
            first_only = config.aggregator == "first" and whole
            weights.append(np.eye(1, len(share), dtype=np.float32)[0] if first_only else share)
        return CodeEmbeddings(vectors, blocks, self.splits, weights)


def split_code(
    codes: Sequence[str],
    *,
    language: str | Sequence[str],
    config: SeaConfig,
    tokenizer: SeaTokenizer,
) -> list[Split]:
    """Blocks of functions as a model sees them.

    Args:
        codes: Source text of each function.
        language: Of all, or one for each.
        config: The model's.
        tokenizer: The model's.
    """
    languages = [language] * len(codes) if isinstance(language, str) else list(language)
    if len(languages) != len(codes):
        raise DataError(f"{len(languages)} languages for {len(codes)} codes: give one for each")
    return [
        split_one(code, language=name, config=config, tokenizer=tokenizer)
        for code, name in zip(codes, languages, strict=True)
    ]


def split_one(
    code: str, *, language: Language | str, config: SeaConfig, tokenizer: SeaTokenizer
) -> Split:
    """Blocks of one function as a model sees them."""
    parts = split(code, language=language, config=config.split, tokenize=tokenizer)
    if not parts.blocks:
        raise DataError(f"nothing to embed in {code[:60]!r}: only blanks and comments")
    return parts


def check_finite(vectors: np.ndarray, names: Sequence[str]) -> None:
    """Name the first text whose vector is not finite."""
    bad = ~np.isfinite(vectors).all(axis=1)
    if bad.any():
        raise DataError(
            f"{names[int(np.argmax(bad))]}: its vector holds NaN or inf ({int(bad.sum())} in all); "
            "the weights are broken, or half precision overflowed: try dtype float32"
        )
