"""Sequences of different lengths as one flat row of tokens: no padding anywhere."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from polyzoo.core.errors import ConfigError, DataError


@dataclass(frozen=True)
class PackedSequences:
    """Token sequences laid end to end. T tokens, s sequences."""

    ids: Tensor
    """(T,) int64."""
    starts: Tensor
    """(s + 1,) int32, where each sequence starts, then T; on the device of `ids`."""
    lengths: tuple[int, ...]
    """The same on the host, so that cutting into chunks waits for no device."""

    @classmethod
    def pack(cls, sequences: Sequence[Sequence[int] | np.ndarray]) -> PackedSequences:
        """Lay sequences end to end; an empty one is refused."""
        lengths = tuple(len(sequence) for sequence in sequences)
        if not lengths or min(lengths) == 0:
            where = lengths.index(0) if lengths else 0
            raise DataError(f"sequence {where} of {len(lengths)} is empty: nothing to encode")
        flat = np.concatenate([np.asarray(sequence, dtype=np.int64) for sequence in sequences])
        starts = np.zeros(len(lengths) + 1, dtype=np.int32)
        np.cumsum(lengths, out=starts[1:])
        return cls(ids=torch.from_numpy(flat), starts=torch.from_numpy(starts), lengths=lengths)

    @property
    def max_length(self) -> int:
        """Longest sequence."""
        return max(self.lengths)

    def __len__(self) -> int:
        """Number of sequences."""
        return len(self.lengths)

    def to(self, device: torch.device | str) -> PackedSequences:
        """The same on another device."""
        return replace(
            self,
            ids=self.ids.to(device, non_blocking=True),
            starts=self.starts.to(device, non_blocking=True),
        )

    def pin_memory(self) -> PackedSequences:
        """The same in page-locked memory, for copies that do not wait."""
        return replace(self, ids=self.ids.pin_memory(), starts=self.starts.pin_memory())

    def chunks(
        self, *, max_tokens: int, max_sequences: int | None = None
    ) -> Iterator[PackedSequences]:
        """Cut between sequences so that no chunk exceeds the limits.

        A sequence longer than `max_tokens` is a chunk of its own: it cannot be cut.
        """
        if max_tokens < 1 or (max_sequences is not None and max_sequences < 1):
            raise ConfigError(
                f"max_tokens_per_forward={max_tokens} and max_blocks_per_forward={max_sequences} "
                "must be at least 1"
            )
        offsets = [0, *accumulate(self.lengths)]
        first = 0
        while first < len(self.lengths):
            last = first + 1
            while (
                last < len(self.lengths)
                and offsets[last + 1] - offsets[first] <= max_tokens
                and (max_sequences is None or last - first < max_sequences)
            ):
                last += 1
            yield PackedSequences(
                ids=self.ids[offsets[first] : offsets[last]],
                starts=self.starts[first : last + 1] - offsets[first],
                lengths=self.lengths[first:last],
            )
            first = last


def by_length(lengths: Sequence[int]) -> np.ndarray:
    """Order that puts the longest first; equal lengths keep their order, so results repeat."""
    return np.argsort(-np.asarray(lengths), kind="stable")
