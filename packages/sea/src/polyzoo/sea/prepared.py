"""Queries and functions as encoder pieces in one file: what training and evaluation read.

Splitting needs parsers and takes minutes; it is done once per file, tokenizer and splitter setting,
here or on another machine. The file is a compressed `.npz` without pickles. Torch-free.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from polyzoo.core.errors import DataError
from polyzoo.core.io import atomic_write

FORMAT = 1
_HEAD_MARGIN = 16
"""A function hardly longer than its head has the same vector twice."""


@dataclass(frozen=True)
class Origin:
    """Where prepared pieces come from, and what was lost on the way."""

    tokenizer_sha256: str
    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    vocab_size: int
    split: dict[str, Any]
    max_query_tokens: int
    source: str = ""
    """Name of the file."""
    cut_queries: int = 0
    split_fallbacks: int = 0
    dropped_blocks: int = 0
    languages: dict[str, int] = field(default_factory=dict)


class Ragged:
    """Rows of different length in one flat array."""

    def __init__(self, flat: np.ndarray, starts: np.ndarray) -> None:
        """Take both as they are."""
        self.flat = flat
        self.starts = starts

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]]) -> Ragged:
        """Lay rows end to end."""
        starts = np.zeros(len(rows) + 1, dtype=np.int64)
        np.cumsum([len(row) for row in rows], out=starts[1:])
        flat = np.fromiter((item for row in rows for item in row), np.int32, count=starts[-1])
        return cls(flat, starts)

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.starts) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        """One row, as a view."""
        return self.flat[self.starts[row] : self.starts[row + 1]]

    @property
    def lengths(self) -> np.ndarray:
        """Length of every row."""
        return np.diff(self.starts)


@dataclass
class Prepared:
    """Pieces of n functions and of their queries, without special tokens."""

    origin: Origin
    urls: list[str]
    queries: Ragged
    """n rows; an empty row has no query."""
    blocks: Ragged
    """All blocks of all functions."""
    first_block: np.ndarray
    """(n + 1,) row in `blocks` where each function starts."""
    wholes: Ragged
    """n rows: the truncated function where it has more than one block, else empty."""
    lengths: np.ndarray
    """(n,) pieces of each function, uncut."""
    query_hash: np.ndarray
    """(n,) uint64; equal queries must not be each other's negatives."""
    code_hash: np.ndarray
    """(n,) uint64 of the function's pieces."""

    def __len__(self) -> int:
        """Number of functions."""
        return len(self.urls)

    def query(self, index: int) -> np.ndarray:
        """Ids of a query, special tokens included."""
        return self._wrap(self.queries[index])

    def entries(
        self,
        index: int,
        *,
        include_whole: bool = True,
        only_whole: bool = False,
        head_pieces: int = 0,
    ) -> list[np.ndarray]:
        """Ids of what is encoded for a function, special tokens included.

        The truncated whole comes first; a function of one block has no other, since both agree. The
        head, if it is wanted and the function is clearly longer, comes last.
        """
        first, last = self.first_block[index], self.first_block[index + 1]
        whole = self.wholes[index]
        start = whole if len(whole) else self.blocks[first]
        if only_whole:
            return [self._wrap(start)]
        rows = [self._wrap(self.blocks[row]) for row in range(first, last)]
        if include_whole and len(whole):
            rows.insert(0, self._wrap(whole))
        if has_head(len(start), head_pieces):
            rows.append(self._wrap(start[:head_pieces]))
        return rows

    def all_entries(
        self, *, include_whole: bool = True, only_whole: bool = False, head_pieces: int = 0
    ) -> tuple[list[np.ndarray], np.ndarray]:
        """Entries of every function end to end, and (n + 1,) where each function's start."""
        lists = [
            self.entries(
                index,
                include_whole=include_whole,
                only_whole=only_whole,
                head_pieces=head_pieces,
            )
            for index in range(len(self))
        ]
        starts = np.zeros(len(self) + 1, dtype=np.int64)
        np.cumsum([len(rows) for rows in lists], out=starts[1:])
        return [row for rows in lists for row in rows], starts

    def take(self, indices: Sequence[int] | np.ndarray) -> Prepared:
        """The functions at `indices`, in that order."""
        chosen = [int(index) for index in indices]
        blocks = [
            self.blocks[row]
            for index in chosen
            for row in range(self.first_block[index], self.first_block[index + 1])
        ]
        counts = np.diff(self.first_block)[chosen]
        return Prepared(
            origin=self.origin,
            urls=[self.urls[index] for index in chosen],
            queries=Ragged.of([self.queries[index] for index in chosen]),  # pyright: ignore[reportArgumentType]
            blocks=Ragged.of(blocks),  # pyright: ignore[reportArgumentType]
            first_block=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
            wholes=Ragged.of([self.wholes[index] for index in chosen]),  # pyright: ignore[reportArgumentType]
            lengths=self.lengths[chosen],
            query_hash=self.query_hash[chosen],
            code_hash=self.code_hash[chosen],
        )

    def save(self, path: str | Path) -> None:
        """Write the file; it is there whole or not at all."""
        small = np.uint16 if self.origin.vocab_size <= 1 << 16 else np.int32
        arrays: dict[str, np.ndarray] = {
            "first_block": self.first_block,
            "lengths": self.lengths,
            "query_hash": self.query_hash,
            "code_hash": self.code_hash,
            "origin": _text({"format": FORMAT, **asdict(self.origin)}),
            "urls": _text(self.urls),
        }
        for name in ("queries", "blocks", "wholes"):
            rows: Ragged = getattr(self, name)
            arrays[f"{name}.flat"] = rows.flat.astype(small)
            arrays[f"{name}.lengths"] = rows.lengths.astype(np.int32)
        with atomic_write(path) as file:
            np.savez_compressed(file, allow_pickle=False, **arrays)  # pyright: ignore[reportArgumentType]

    @classmethod
    def load(cls, path: str | Path) -> Prepared:
        """Read a file written by `save`."""
        path = Path(path)
        if not path.is_file():
            raise DataError(f"{path}: no such file")
        try:
            # Opened here: numpy leaves a damaged file open.
            with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            header = json.loads(arrays["origin"].tobytes())
            if header.pop("format") != FORMAT:
                raise DataError(
                    f"{path}: written by another version; run `polyzoo sea prepare` again"
                )
            header["prefix"], header["suffix"] = tuple(header["prefix"]), tuple(header["suffix"])
            return cls(
                origin=Origin(**header),
                urls=json.loads(arrays["urls"].tobytes()),
                first_block=arrays["first_block"],
                lengths=arrays["lengths"],
                query_hash=arrays["query_hash"],
                code_hash=arrays["code_hash"],
                **{name: _ragged(arrays, name) for name in ("queries", "blocks", "wholes")},
            )
        except (KeyError, TypeError, ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(
                f"{path}: not a file of `polyzoo sea prepare`, or a broken one ({error})"
            ) from error

    def _wrap(self, ids: np.ndarray) -> np.ndarray:
        return np.concatenate([self.origin.prefix, ids, self.origin.suffix]).astype(np.int32)


def has_head(pieces: int, head_pieces: int) -> bool:
    """Whether a function of that many pieces gets its head as an entry of its own."""
    return head_pieces > 0 and pieces > head_pieces + _HEAD_MARGIN


def _ragged(arrays: dict[str, np.ndarray], name: str) -> Ragged:
    lengths = arrays[f"{name}.lengths"].astype(np.int64)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    flat = arrays[f"{name}.flat"].astype(np.int32)
    if starts[-1] != len(flat):
        raise ValueError(f"{name}: lengths do not add up")
    return Ragged(flat, starts)


def _text(value: object) -> np.ndarray:
    return np.frombuffer(json.dumps(value).encode(), dtype=np.uint8)
