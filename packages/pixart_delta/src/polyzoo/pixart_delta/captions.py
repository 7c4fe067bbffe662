"""Captions of a batch without padding: what the transformer is given as text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from polyzoo.attention import CuSeqlens
from polyzoo.core.errors import DataError


@dataclass(frozen=True)
class PackedCaptions:
    """The real tokens of k captions, one after the other.

    Example:
        >>> captions = PackedCaptions.from_padded(states, mask)
        >>> captions.tokens.shape[0] == int(mask.sum())
        True
    """

    tokens: Tensor
    """`(total, c)` states of the text encoder."""
    lengths: tuple[int, ...]
    """Tokens of each caption, at least 1."""

    def __post_init__(self) -> None:
        """Check that lengths and tokens agree."""
        if self.tokens.ndim != 2 or self.tokens.shape[0] != sum(self.lengths):
            raise DataError(
                f"captions: tokens of shape {tuple(self.tokens.shape)} for lengths that add up to "
                f"{sum(self.lengths)}; give (total, channels)"
            )
        for row, length in enumerate(self.lengths):
            if length < 1:
                raise DataError(f"captions: row {row} has no token; the mask must keep at least 1")

    @classmethod
    def from_padded(cls, states: Tensor, mask: Tensor | None = None) -> PackedCaptions:
        """Take the tokens whose mask is 1 out of a padded batch.

        Args:
            states: `(k, n, c)`, or `(k, 1, n, c)` as the official code has it.
            mask: `(k, n)` or `(k, 1, 1, n)` of 0 and 1; None keeps every token.

        Raises:
            DataError: The shapes do not fit, the mask holds other values, or empties a row.
        """
        if states.ndim == 4 and states.shape[1] == 1:
            states = states[:, 0]
        if states.ndim != 3:
            raise DataError(
                f"captions of shape {tuple(states.shape)}: give (batch, tokens, channels)"
            )
        k, n, _ = states.shape
        if mask is None:
            return cls(states.reshape(k * n, -1), (n,) * k)
        keep = check_mask(mask, k, n).to(states.device)
        return cls(states[keep], tuple(keep.sum(dim=1).tolist()))

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def longest(self) -> int:
        """Tokens of the longest caption."""
        return max(self.lengths)

    @cached_property
    def uniform(self) -> bool:
        """Whether all captions have the same number of tokens."""
        return len(set(self.lengths)) == 1

    def repeat(self, times: int) -> PackedCaptions:
        """Each caption `times` times in a row."""
        if times == 1:
            return self
        parts = self.tokens.split(list(self.lengths))
        tokens = torch.cat([part for part in parts for _ in range(times)])
        return PackedCaptions(tokens, tuple(n for n in self.lengths for _ in range(times)))

    def rows(self, indices: Sequence[int]) -> PackedCaptions:
        """Some of the captions, in the order of the indices."""
        parts = self.tokens.split(list(self.lengths))
        return PackedCaptions(
            torch.cat([parts[i] for i in indices]), tuple(self.lengths[i] for i in indices)
        )

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> PackedCaptions:
        """The same on another device or in another dtype."""
        return replace(self, tokens=self.tokens.to(device, dtype))

    def replaced(self, drop: Tensor, null: Tensor, *, keep_lengths: bool) -> PackedCaptions:
        """The captions with `null` `(n, c)` in the rows that `drop` `(k,)` marks.

        Args:
            drop: bool.
            null: Replacement.
            keep_lengths: Whether a replaced row keeps its length, as the official training does;
                `null` must then be long enough.
        """
        null = null.to(self.tokens)
        parts = [
            (null[: len(part)] if keep_lengths else null) if dropped else part
            for part, dropped in zip(
                self.tokens.split(list(self.lengths)), drop.tolist(), strict=True
            )
        ]
        return PackedCaptions(torch.cat(parts), tuple(len(part) for part in parts))

    def padded(self, length: int | None = None) -> tuple[Tensor, Tensor]:
        """States `(k, n, c)` padded with zeros, and their int64 mask `(k, n)`."""
        n = length or self.longest
        parts = self.tokens.split(list(self.lengths))
        states = self.tokens.new_zeros(len(self), n, self.tokens.shape[1])
        mask = torch.zeros(len(self), n, dtype=torch.int64, device=self.tokens.device)
        for row, part in enumerate(parts):
            states[row, : len(part)] = part
            mask[row, : len(part)] = 1
        return states, mask

    def seqlens(self, queries: int) -> CuSeqlens:
        """Where the sequences of `queries` image tokens each, and of text, begin and end."""
        return CuSeqlens.from_lengths(
            [queries] * len(self), list(self.lengths), device=self.tokens.device
        )


@dataclass(frozen=True)
class RowCaptions:
    """Captions in rows of one length: what a compiled or captured step needs.

    What stands beyond a caption's length is not seen by the images.
    """

    states: Tensor
    """`(k, n, c)`."""
    kv_lens: Tensor
    """int32 `(k,)`."""

    def __len__(self) -> int:
        return len(self.states)

    def replaced(self, drop: Tensor, null: Tensor, *, keep_lengths: bool) -> RowCaptions:
        """The captions with `null` `(n', c)` in the rows that `drop` `(k,)` marks.

        Args:
            drop: bool.
            null: Replacement; cut or padded with zeros to n.
            keep_lengths: Whether a replaced row keeps its length, as the official training does.
        """
        n = self.states.shape[1]
        row = self.states.new_zeros(n, self.states.shape[2])
        row[: len(null)] = null[:n].to(row)
        lens = self.kv_lens
        if not keep_lengths:
            lens = torch.where(drop, torch.full_like(lens, min(len(null), n)), lens)
        return RowCaptions(torch.where(drop[:, None, None], row, self.states), lens)


def join(parts: Sequence[PackedCaptions]) -> PackedCaptions:
    """Several batches as one."""
    return PackedCaptions(
        torch.cat([part.tokens for part in parts]),
        tuple(length for part in parts for length in part.lengths),
    )


def check_mask(mask: Tensor, batch: int, tokens: int) -> Tensor:
    """Return a caption mask as bool `(k, n)`.

    Raises:
        DataError: Its shape does not fit, it holds more than 0 and 1, or a row is empty.
    """
    given = tuple(mask.shape)
    if mask.ndim == 4 and mask.shape[1] == mask.shape[2] == 1:
        mask = mask[:, 0, 0]
    if mask.ndim != 2:
        raise DataError(f"mask of shape {given}: give (batch, tokens) or (batch, 1, 1, tokens)")
    if mask.shape[0] != batch:
        raise DataError(f"mask has batch {mask.shape[0]}, the captions {batch}: they must agree")
    if mask.shape[1] != tokens:
        raise DataError(
            f"mask has {mask.shape[1]} tokens, the captions {tokens}: give the mask that the text "
            "encoder was given"
        )
    keep = mask != 0
    if mask.dtype != torch.bool and bool((keep & (mask != 1)).any()):
        bad = mask[keep & (mask != 1)].flatten()[0].item()
        raise DataError(f"mask holds {bad}; only 0 (padding) and 1 (token) are allowed")
    empty = (~keep.any(dim=1)).nonzero().flatten().tolist()
    if empty:
        raise DataError(
            f"mask row {empty[0]} is all zero: every caption needs at least one token (the empty "
            "prompt has its end token)"
        )
    return keep
