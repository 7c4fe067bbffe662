"""The codebook: nearest entry in fp32, straight-through gradient, and the two loss weightings."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from polyzoo.core.errors import DataError

Weighting = Literal["legacy", "fixed"]
COMMITMENT = 0.25


class Quantized(NamedTuple):
    """Vectors replaced by codebook entries."""

    vectors: Tensor
    """(b, n, d): entries, with the gradient of what they replace."""
    codes: Tensor
    """(b, n) int64."""
    entries: Tensor
    """(b, n, d): the same entries, with the codebook's gradient."""


class Quantizer(nn.Module):
    """A codebook searched by squared Euclidean distance; the first of equal entries wins.

    The search is in fp32 whatever the model's precision or autocast: on random data a search in
    fp16 changes 0.6 % of the codes and one in bf16 4 %.

    Example:
        >>> Quantizer(8, 4)(torch.zeros(1, 2, 4)).codes.shape
        torch.Size([1, 2])
    """

    def __init__(self, codes: int, dim: int) -> None:
        super().__init__()
        self.codebook = nn.Parameter(torch.empty(codes, dim).uniform_(-1 / codes, 1 / codes))

    def forward(self, z: Tensor) -> Quantized:
        """Quantise (b, n, d)."""
        codes = self.search(z)
        entries = self.codebook[codes]
        z = z.float()
        return Quantized(z + (entries - z).detach(), codes, entries)

    @torch.no_grad()
    def search(self, z: Tensor) -> Tensor:
        """Return the code of the entry nearest to each vector: (b, n) for (b, n, d)."""
        with torch.autocast(z.device.type, enabled=False):
            flat = z.detach().reshape(-1, z.shape[-1]).float()
            book = self.codebook.float()
            squares = flat.square().sum(1, keepdim=True) + book.square().sum(1)
            distances = torch.addmm(squares, flat, book.T, alpha=-2)
        return distances.argmin(1).view(z.shape[:-1])

    def lookup(self, codes: Tensor) -> Tensor:
        """Return (b, n, d) entries of codes (b, n).

        Raises:
            DataError: A code lies outside the codebook.
        """
        check_codes(codes, self.codebook.shape[0])
        return self.codebook[codes]


def quantisation_loss(z: Tensor, entries: Tensor, *, weighting: Weighting = "legacy") -> Tensor:
    """Mean squared distance of vectors and entries, once pulling each toward the other.

    legacy, as the reference trains: the vectors are pulled with weight 1 and the entries with 0.25.
    fixed is the textbook's way round. The values are equal, the gradients are not.

    Args:
        z: (b, n, d) vectors with gradient.
        entries: (b, n, d) entries with the codebook's gradient.
        weighting: Which term has 0.25.
    """
    pull_vectors = (entries.detach() - z).square().mean()
    pull_entries = (entries - z.detach()).square().mean()
    if weighting == "legacy":
        return pull_vectors + COMMITMENT * pull_entries
    return pull_entries + COMMITMENT * pull_vectors


def check_codes(codes: Tensor, count: int) -> None:
    """Refuse codes that are no entries of a codebook of `count`.

    Raises:
        DataError: Wrong dtype, or a value outside; hints at language-model ids.
    """
    if codes.is_floating_point() or codes.dtype == torch.bool:
        raise DataError(f"codes are {codes.dtype}; they must be integers in 0 to {count - 1}")
    if not codes.numel():
        raise DataError("no codes were given")
    low, high = int(codes.min()), int(codes.max())
    if low < 0 or high >= count:
        raise DataError(
            f"codes lie in {low} to {high}, and the codebook has 0 to {count - 1}; if these are "
            "ids of a language model, subtract its shift (ImageVocabulary.to_codes)"
        )
