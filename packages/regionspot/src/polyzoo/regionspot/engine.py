"""What the pipeline asks of a model, whichever towers it stands on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from PIL import Image
from torch import Tensor

from polyzoo.regionspot.rle import Rle
from polyzoo.regionspot.text import TextClassifier


@dataclass(frozen=True)
class Proposals:
    """Boxes that a model found by itself, best first."""

    boxes: Tensor
    """float32 `(k, 4)` corners in pixels of the image."""
    scores: Tensor
    """`(k,)`, 0 to 1."""


class View(Protocol):
    """One image, looked at once; ask as often as you like."""

    image: Image.Image

    def propose(self, *, limit: int) -> Proposals:
        """Find things."""
        ...

    def boxes_at(self, points: Tensor, labels: Tensor) -> Tensor:
        """Return a box for each of `(k, p, 2)` pixel prompts; labels 1 inside, 0 outside."""
        ...

    def masks(self, boxes: Tensor) -> tuple[Rle, ...]:
        """Outline what is in each of `(k, 4)` pixel boxes."""
        ...


class Engine(Protocol):
    """A model with its weights, on its device."""

    def describe(self) -> dict[str, str]:
        """Say which towers and weights answer."""
        ...

    def open(self, images: Sequence[Image.Image]) -> list[View]:
        """Look at images."""
        ...

    def embed(
        self, views: Sequence[View], boxes: Sequence[Tensor], *, independent: bool = False
    ) -> list[Tensor]:
        """Return unit `(k, t)` float32 embeddings of each image's boxes, on the CPU."""
        ...

    def classifier(self, names: str | Sequence[str]) -> TextClassifier:
        """Turn names into class vectors."""
        ...
