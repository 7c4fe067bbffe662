"""Masks as run lengths, in COCO's format, without its library."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Rle:
    """A mask as the lengths of its runs, column by column, zeros first."""

    height: int
    width: int
    counts: tuple[int, ...]

    @classmethod
    def encode(cls, mask: NDArray[np.bool_]) -> Rle:
        """Encode a boolean `(H, W)` mask."""
        flat = np.asarray(mask, dtype=bool).ravel(order="F")
        changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
        ends = np.concatenate([[0], changes, [flat.size]]) if flat.size else np.array([0, 0])
        runs = np.diff(ends).tolist()
        if flat.size and flat[0]:
            runs = [0, *runs]
        return cls(mask.shape[0], mask.shape[1], tuple(runs))

    def decode(self) -> NDArray[np.bool_]:
        """Return the boolean `(H, W)` mask."""
        values = np.arange(len(self.counts)) % 2 == 1
        flat = np.repeat(values, self.counts)
        return flat.reshape((self.height, self.width), order="F")

    @property
    def area(self) -> int:
        """Pixels inside."""
        return sum(self.counts[1::2])

    def to_coco(self) -> dict[str, object]:
        """Return `{"size": [H, W], "counts": text}`, compressed as COCO's tools read it."""
        return {"size": [self.height, self.width], "counts": _compress(self.counts)}


def _compress(counts: Sequence[int]) -> str:
    """COCO's text: differences to the run before last, in base 32 with a continuation bit."""
    text: list[str] = []
    for place, count in enumerate(counts):
        value = count - counts[place - 2] if place > 2 else count
        more = True
        while more:
            part = value & 0x1F
            value >>= 5
            more = value != -1 if part & 0x10 else value != 0
            text.append(chr((part | 0x20 if more else part) + 48))
    return "".join(text)
