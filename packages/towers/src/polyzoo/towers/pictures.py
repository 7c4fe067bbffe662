"""From pictures of any kind to the normalised tensors that networks take."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from polyzoo.core.errors import DataError
from polyzoo.core.images import open_image

Picture = str | Path | Image.Image | NDArray[np.uint8]
"""A path, a PIL image, or uint8 (H, W, 3)."""

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Mean and standard deviation of red, green, blue that DINOv2 was trained with."""
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
"""Those of EfficientNet-lite: -1 to 1."""


def image_batch(
    pictures: Sequence[Picture],
    *,
    size: tuple[int, int],
    normalise: tuple[tuple[float, ...], tuple[float, ...]] = IMAGENET,
) -> Tensor:
    """Scale pictures to one size (their sides' ratio is not kept) and normalise them.

    Args:
        pictures: One or more; transparency shows white.
        size: Height and width in pixels.
        normalise: Mean and standard deviation of each colour, for values of 0 to 1.

    Returns:
        `(b, 3, *size)` float32.

    Raises:
        DataError: A picture cannot be read, or an array is not uint8 `(H, W, 3)`.

    Example:
        >>> image_batch(["cat.jpg"], size=(224, 224)).shape
        torch.Size([1, 3, 224, 224])
    """
    if not pictures:
        raise DataError("no pictures: give at least one")
    if min(size) < 1:
        raise DataError(f"size={size}: height and width must be at least 1 pixel")
    height, width = size
    rows = np.empty((len(pictures), height, width, 3), np.uint8)
    for row, picture in zip(rows, pictures, strict=True):
        image = rgb_image(picture)
        if image.size != (width, height):
            image = image.resize((width, height), Image.Resampling.BICUBIC)
        row[:] = np.asarray(image)
    return normalised(torch.from_numpy(rows), normalise=normalise)


def normalised(
    pixels: Tensor, *, normalise: tuple[tuple[float, ...], tuple[float, ...]] = IMAGENET
) -> Tensor:
    """Turn `(b, H, W, 3)` uint8 into normalised `(b, 3, H, W)` float32, on the same device."""
    mean, std = (torch.tensor(part, device=pixels.device) for part in normalise)
    scaled = (pixels.to(torch.float32) / 255 - mean) / std
    return scaled.permute(0, 3, 1, 2).contiguous()


def rgb_image(picture: Picture) -> Image.Image:
    """Return any picture as an upright RGB image.

    Raises:
        DataError: It cannot be read, or an array is not uint8 `(H, W, 3)`.
    """
    if isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
            raise DataError(
                f"an array is {picture.dtype} {picture.shape}; as a picture it must be uint8 "
                "(H, W, 3)"
            )
        return Image.fromarray(picture)
    return open_image(picture)


def central_square(picture: Picture, *, size: int, share: float = 0.875) -> Image.Image:
    """Scale a picture and cut out its middle, as ImageNet classifiers are evaluated.

    Args:
        picture: The picture.
        size: Side of the square in pixels.
        share: Of the picture's shorter side that the square takes, above 0, at most 1.

    Raises:
        DataError: The picture cannot be read, or a value is out of its range.
    """
    if size < 1 or not 0 < share <= 1:
        raise DataError(f"size={size} must be at least 1, share={share} above 0 and at most 1")
    image = rgb_image(picture)
    scale = round(size / share) / min(image.size)
    width, height = (max(size, round(length * scale)) for length in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))
