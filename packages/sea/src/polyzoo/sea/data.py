"""Prepared pairs as training batches: one packed row of tokens for queries and blocks together."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from polyzoo.core.errors import DataError
from polyzoo.sea.encoding.packing import PackedSequences, by_length
from polyzoo.sea.losses import check_negatives, find_duplicates
from polyzoo.sea.prepared import Prepared


@dataclass(frozen=True)
class Function:
    """What is encoded for one function."""

    entries: tuple[np.ndarray, ...]
    query_hash: int
    code_hash: int


@dataclass(frozen=True)
class Pair:
    """A query, its function, and functions that are only negatives."""

    query: np.ndarray
    functions: tuple[Function, ...]


@dataclass(frozen=True)
class PairBatch:
    """n queries and f >= n functions; function i answers query i, the rest are negatives."""

    packed: PackedSequences
    """All sequences, longest first."""
    place: Tensor
    """(n + k,) row of `packed` that holds each query, then each entry."""
    starts: Tensor
    """(f + 1,) where each function's entries start, counted from the first entry."""
    duplicates: Tensor
    """(n, f) bool, pairs that are no negatives."""
    n: int

    @property
    def f(self) -> int:
        """Number of functions."""
        return self.starts.shape[0] - 1

    def to(self, device: torch.device | str, non_blocking: bool = True) -> PairBatch:
        """The same on another device."""
        return replace(
            self,
            packed=self.packed.to(device),
            place=self.place.to(device, non_blocking=non_blocking),
            starts=self.starts.to(device, non_blocking=non_blocking),
            duplicates=self.duplicates.to(device, non_blocking=non_blocking),
        )

    def pin_memory(self) -> PairBatch:
        """The same in page-locked memory, for copies that do not wait."""
        return replace(
            self,
            packed=self.packed.pin_memory(),
            place=self.place.pin_memory(),
            starts=self.starts.pin_memory(),
            duplicates=self.duplicates.pin_memory(),
        )


class PairDataset(Dataset[Pair]):
    """Pairs of a prepared file, with extra functions mixed in where wanted.

    Example:
        >>> dataset = PairDataset(Prepared.load("train.npz"))
        >>> batch = collate([dataset[0], dataset[1]])
    """

    def __init__(
        self,
        prepared: Prepared,
        *,
        include_whole: bool = True,
        only_whole: bool = False,
        head_pieces: int = 0,
        extra: Prepared | None = None,
        extra_per_pair: int = 0,
        negatives: Sequence[Sequence[int]] | None = None,
        negatives_per_pair: int = 1,
    ) -> None:
        """Choose what a pair carries.

        Args:
            prepared: Pairs; every function has a query.
            include_whole: Give the truncated whole as an entry.
            only_whole: Give nothing else (the truncation twin).
            head_pieces: As in `Prepared.entries`.
            extra: Functions without queries, dealt out in turn.
            extra_per_pair: How many of them per pair.
            negatives: For each pair, rows of `prepared` that look right and are wrong.
            negatives_per_pair: How many of them; pairs with fewer bring what they have.
        """
        self._prepared = prepared
        self._include_whole, self._only_whole = include_whole, only_whole
        self._head_pieces = head_pieces
        self._extra = extra if extra_per_pair else None
        self._extra_per_pair = extra_per_pair
        self._negatives = negatives
        self._negatives_per_pair = negatives_per_pair
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Deal other extra functions in every epoch; called by the training engine."""
        self._epoch = epoch

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self._prepared)

    def __getitem__(self, index: int) -> Pair:
        """One pair, always the same for an index and an epoch."""
        functions = [self._function(self._prepared, index)]
        if self._negatives is not None:
            functions += [
                self._function(self._prepared, row)
                for row in self._negatives[index][: self._negatives_per_pair]
            ]
        if self._extra is not None:
            first = (self._epoch * len(self) + index) * self._extra_per_pair
            functions += [
                self._function(self._extra, row % len(self._extra))
                for row in range(first, first + self._extra_per_pair)
            ]
        return Pair(query=self._prepared.query(index), functions=tuple(functions))

    def _function(self, prepared: Prepared, index: int) -> Function:
        return Function(
            entries=tuple(
                prepared.entries(
                    index,
                    include_whole=self._include_whole,
                    only_whole=self._only_whole,
                    head_pieces=self._head_pieces,
                )
            ),
            query_hash=int(prepared.query_hash[index]),
            code_hash=int(prepared.code_hash[index]),
        )


def collate(pairs: Sequence[Pair]) -> PairBatch:
    """Pack a batch: answers first, then all negatives."""
    functions = [pair.functions[0] for pair in pairs]
    functions += [function for pair in pairs for function in pair.functions[1:]]
    sequences = [pair.query for pair in pairs]
    sequences += [entry for function in functions for entry in function.entries]
    order = by_length([len(sequence) for sequence in sequences])
    place = np.empty(len(order), dtype=np.int64)
    place[order] = np.arange(len(order))
    starts = np.zeros(len(functions) + 1, dtype=np.int64)
    np.cumsum([len(function.entries) for function in functions], out=starts[1:])
    duplicates = find_duplicates(
        _hashes([function.query_hash for function in functions]),
        _hashes([function.code_hash for function in functions]),
        columns=len(pairs),
    )
    check_negatives(duplicates)
    return PairBatch(
        packed=PackedSequences.pack([sequences[index] for index in order]),
        place=torch.from_numpy(place),
        starts=torch.from_numpy(starts),
        duplicates=duplicates,
        n=len(pairs),
    )


def read_negatives(path: str | Path, prepared: Prepared) -> list[list[int]]:
    """Read hard negatives: a JSON object per line, {"url": ..., "negatives": [url, ...]}.

    A url that is not in the training file is an error, counted and named.
    """
    path = Path(path)
    row_of = {url: row for row, url in enumerate(prepared.urls)}
    negatives: list[list[int]] = [[] for _ in prepared.urls]
    unknown: list[str] = []
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            content = json.loads(line)
            url, others = content["url"], content["negatives"]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f'{path}, line {number}: {{"url": ..., "negatives": [...]}} is wanted ({error!r})'
            ) from error
        unknown += [name for name in (url, *others) if name not in row_of]
        if url in row_of:
            negatives[row_of[url]] = [row_of[name] for name in others if name in row_of]
    if unknown:
        raise DataError(
            f"{path}: {len(unknown)} urls are not in the training file, first {unknown[:3]}"
        )
    return negatives


def _hashes(values: Sequence[int]) -> Tensor:
    return torch.from_numpy(np.asarray(values, dtype=np.uint64).view(np.int64))
