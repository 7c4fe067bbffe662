"""Pictures in and out: to the size a model draws, to tensors and back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from polyzoo.core.errors import DataError
from polyzoo.core.images import open_image

Picture = str | Path | Image.Image
LEAST_SIDE = 8
"""A smaller control or source image holds nothing to go by."""


def read_picture(source: Picture, *, name: str = "image") -> Image.Image:
    """An upright RGB image of any mode and depth.

    Raises:
        DataError: No image, or too small to mean anything.
    """
    if not isinstance(source, str | Path | Image.Image):
        raise DataError(f"{name} is a {type(source).__name__}; give a path or a PIL image")
    picture = open_image(source)
    if min(picture.size) < LEAST_SIDE:
        raise DataError(
            f"{name} of {picture.width} x {picture.height} is too small: at least {LEAST_SIDE} "
            "pixels a side are needed"
        )
    return picture


def cover(picture: Image.Image, height: int, width: int) -> Image.Image:
    """Resize so that the picture covers a size, and cut out its middle."""
    if (picture.height, picture.width) == (height, width):
        return picture
    scale = max(height / picture.height, width / picture.width)
    # Rounded up: flooring can leave a side one pixel short.
    tall = max(math.ceil(picture.height * scale - 1e-6), height)
    wide = max(math.ceil(picture.width * scale - 1e-6), width)
    resized = picture.resize((wide, tall), Image.Resampling.BICUBIC)
    left, top = (wide - width) // 2, (tall - height) // 2
    return resized.crop((left, top, left + width, top + height))


def to_tensor(pictures: Sequence[Image.Image]) -> Tensor:
    """`(b, 3, H, W)` float32 in [0, 1] of RGB pictures of one size."""
    rows = [torch.from_numpy(np.asarray(p.convert("RGB")).copy()) for p in pictures]
    return torch.stack(rows).permute(0, 3, 1, 2).float() / 255


def to_pictures(images: Tensor) -> list[Image.Image]:
    """RGB pictures of `(b, 3, H, W)` in [-1, 1]."""
    bytes_ = ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return [Image.fromarray(row.permute(1, 2, 0).cpu().numpy()) for row in bytes_]


def mask_tensor(source: Picture, height: int, width: int, factor: int) -> Tensor:
    """`(1, 1, h, w)` of 0 and 1 for latents, by nearest neighbour: white is painted anew.

    Args:
        source: Grey, or anything that becomes so.
        height: Of the image to be drawn.
        width: Of it.
        factor: Image pixels to a latent pixel.
    """
    grey = cover(read_picture(source, name="mask_image"), height, width).convert("L")
    small = grey.resize((width // factor, height // factor), Image.Resampling.NEAREST)
    return torch.from_numpy((np.asarray(small) > 127).astype(np.float32))[None, None]
