"""Name what a box holds without training: a classifier's guesses, averaged as word vectors.

Norouzi et al., "Zero-Shot Learning by Convex Combination of Semantic Embeddings", 2013.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from polyzoo.core.errors import DataError
from polyzoo.towers.classifier import SIZE, Classifier
from polyzoo.towers.pictures import HALF, Picture, image_batch, rgb_image
from polyzoo.towers.text import TextTower

MARGIN = 1.1
"""Side of a crop over the longer side of its box."""
_BATCH = 32


class Conse:
    """Vectors of pictures in a text tower's space, and scores of names.

    The vector of a picture is the mean of the likeliest class names' vectors, weighted by the
    classifier's probabilities, and made of length 1 (eq. 2 of the paper).

    Example:
        >>> conse = Conse(load_classifier(), load_text_tower("minilm"))
        >>> crops = crop_boxes("photo.jpg", [(10, 20, 200, 220)])
        >>> conse.scores(crops, ["cat", "racing car"]).argmax(1)
        tensor([0])
    """

    def __init__(self, classifier: Classifier, text: TextTower, *, top: int = 10) -> None:
        if not 1 <= top <= len(classifier.names):
            raise DataError(f"top={top} must be 1 to {len(classifier.names)} classes")
        self._classifier = classifier
        self._text = text
        self._top = top
        self._class_vectors = text.encode(classifier.names)

    @torch.no_grad()
    def vectors(self, pictures: Sequence[Picture]) -> Tensor:
        """Return `(b, dim)` float32 vectors of length 1.

        Args:
            pictures: Crops, best square.
        """
        parameter = next(self._classifier.parameters())
        found = []
        for start in range(0, len(pictures), _BATCH):
            part = pictures[start : start + _BATCH]
            images = image_batch(part, size=(SIZE, SIZE), normalise=HALF)
            logits = self._classifier(images.to(parameter.device, parameter.dtype))
            found.append(self.combine(logits))
        if not found:
            raise DataError("no pictures: give at least one")
        return torch.cat(found)

    def combine(self, logits: Tensor) -> Tensor:
        """Average the likeliest classes' vectors.

        Args:
            logits: `(b, classes)`.

        Returns:
            `(b, dim)` float32 of length 1.
        """
        chances, classes = logits.float().softmax(1).topk(self._top, dim=1)
        vectors = self._class_vectors.to(chances.device)[classes]
        return F.normalize(torch.einsum("bk,bkd->bd", chances, vectors), dim=1)

    def scores(self, pictures: Sequence[Picture], names: Sequence[str]) -> Tensor:
        """Return the cosine of each picture with each name: `(b, names)`."""
        vectors = self.vectors(pictures)
        return vectors @ self._text.encode(names).to(vectors.device).T


def crop_boxes(
    picture: Picture, boxes: Sequence[Sequence[float]], *, margin: float = MARGIN
) -> list[Image.Image]:
    """Cut squares around boxes out of a picture; what lies outside it repeats its edge.

    Args:
        picture: The picture.
        boxes: Left, top, right, bottom in pixels.
        margin: Side of the square over the box's longer side.

    Raises:
        DataError: A box has no area or lies outside the picture.
    """
    image = rgb_image(picture)
    crops = []
    for box in boxes:
        left, top, right, bottom = box
        if not (right > left and bottom > top):
            raise DataError(f"box {tuple(box)}: right must exceed left, and bottom top")
        if right <= 0 or bottom <= 0 or left >= image.width or top >= image.height:
            raise DataError(
                f"box {tuple(box)} lies outside the picture of {image.width} x {image.height}"
            )
        half = margin * max(right - left, bottom - top) / 2
        x, y = (left + right) / 2, (top + bottom) / 2
        # Moved inside where it fits: a real surrounding tells more than a repeated edge.
        x = _inside(x, half, image.width)
        y = _inside(y, half, image.height)
        side = max(1, round(2 * half))
        corner = (round(x - half), round(y - half))
        frame = (*corner, corner[0] + side, corner[1] + side)
        crops.append(_crop_with_edges(image, frame))
    return crops


def _inside(centre: float, half: float, length: int) -> float:
    return length / 2 if 2 * half >= length else min(max(centre, half), length - half)


def _crop_with_edges(image: Image.Image, frame: tuple[int, int, int, int]) -> Image.Image:
    left, top, right, bottom = frame
    if left >= 0 and top >= 0 and right <= image.width and bottom <= image.height:
        return image.crop(frame)
    pixels = np.asarray(image)
    rows = np.clip(np.arange(top, bottom), 0, image.height - 1)
    columns = np.clip(np.arange(left, right), 0, image.width - 1)
    return Image.fromarray(pixels[rows][:, columns])
