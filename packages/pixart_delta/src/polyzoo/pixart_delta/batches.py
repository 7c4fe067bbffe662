"""A training batch of latents and captions, whatever it was read from."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from polyzoo.pixart_delta.captions import PackedCaptions, RowCaptions


@dataclass(frozen=True)
class LatentBatch:
    """b images as the transformer is trained on them."""

    latents: Tensor
    """`(b, 4, h, w)`, times the autoencoder's factor."""
    captions: PackedCaptions | RowCaptions
    """One for each."""
    size: Tensor | None = None
    """`(b, 2)` float32: height and width of the original images."""
    ratio: Tensor | None = None
    """`(b, 1)` float32: aspect ratio of their bucket."""
    control: Tensor | None = None
    """`(b, 4, h, w)`: encoded control images, times the factor."""

    def __len__(self) -> int:
        return len(self.latents)
