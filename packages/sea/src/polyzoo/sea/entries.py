"""From a function's blocks to the sequences an encoder reads, and from vectors back. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from polyzoo.core.errors import DataError
from polyzoo.sea.config import Language, SeaConfig
from polyzoo.sea.encoding.tokenizer import SeaTokenizer
from polyzoo.sea.prepared import has_head
from polyzoo.sea.splitting import Split, split


@dataclass(frozen=True)
class CodeEmbeddings:
    """Vectors of k functions, with what explains them."""

    vectors: np.ndarray
    """(k, d) float32."""
    block_vectors: list[np.ndarray]
    """For each function (b_i, d), one row per block of its split."""
    entry_vectors: list[np.ndarray]
    """For each function (e_i, d), all its entries: the blocks, then the truncated whole and the
    head, where they are entries."""
    splits: list[Split]
    """Where the blocks are in the text."""
    weights: list[np.ndarray]
    """For each function (b_i,), share of each block in the vector; the share of the truncated
    whole function, where it is an entry, is the rest to 1."""


@dataclass(frozen=True)
class Entries:
    """What is encoded for some functions."""

    sequences: list[list[int]]
    """Ids with special tokens, function after function: the truncated whole, blocks, the head."""
    starts: list[int]
    """Where each function's sequences start, then their number."""
    whole: list[bool]
    """Whether a function's first sequence is its truncated whole, and not a block."""
    head: list[bool]
    """Whether a function's last sequence is its head, and not a block."""
    splits: list[Split]

    @classmethod
    def of(cls, splits: Sequence[Split], *, config: SeaConfig, tokenizer: SeaTokenizer) -> Entries:
        """List the sequences, in the order of `Prepared.entries`."""
        sequences: list[list[int]] = []
        counts: list[int] = []
        wholes: list[bool] = []
        heads: list[bool] = []
        for parts in splits:
            rows = [tokenizer.wrap(block.ids) for block in parts.blocks]
            whole = config.whole_entry and len(rows) > 1
            several = len(rows) > 1
            start = parts.whole[: config.split.whole_pieces] if several else parts.blocks[0].ids
            if whole:
                rows.insert(0, tokenizer.wrap(start))
            head = config.aggregator != "first" and has_head(len(start), config.head_pieces)
            if head:
                rows.append(tokenizer.wrap(start[: config.head_pieces]))
            counts.append(len(rows))
            wholes.append(whole)
            heads.append(head)
            sequences += rows
        return cls(sequences, [0, *accumulate(counts)], wholes, heads, list(splits))

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
        blocks, every, weights = [], [], []
        for row, (whole, head) in enumerate(zip(self.whole, self.head, strict=True)):
            start, end = self.starts[row], self.starts[row + 1]
            first, last = start + whole, end - head
            blocks.append(entries[first:last])
            parts = entries[first:last], entries[start:first], entries[last:end]
            every.append(np.concatenate(parts))
            share = shares[first:last]
            # The truncated function is its first block, as far as it goes.
            first_only = config.aggregator == "first" and whole
            weights.append(np.eye(1, len(share), dtype=np.float32)[0] if first_only else share)
        return CodeEmbeddings(vectors, blocks, every, self.splits, weights)


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


def entry_score(scores: np.ndarray, config: SeaConfig) -> np.ndarray:
    """(n,) score of one function for n queries, by the rule of a model that keeps entries.

    Args:
        scores: (e, n) similarities of its entries.
        config: The model's.
    """
    top = scores.max(axis=0)
    if config.aggregator == "maxsim":
        return top
    t = config.soft_temperature
    total = np.exp((scores - top) / t).sum(axis=0)
    return top + t * (np.log(total) - config.count_discount * np.log(len(scores)))


def check_finite(vectors: np.ndarray, names: Sequence[str]) -> None:
    """Name the first text whose vector is not finite."""
    bad = ~np.isfinite(vectors).all(axis=1)
    if bad.any():
        raise DataError(
            f"{names[int(np.argmax(bad))]}: its vector holds NaN or inf ({int(bad.sum())} in all); "
            "the weights are broken, or half precision overflowed: try dtype float32"
        )
