"""Features of many pictures, as every evaluation here takes them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from polyzoo.core.errors import DataError
from polyzoo.core.log import progress
from polyzoo.towers.dinov2 import DinoV2
from polyzoo.towers.pictures import Picture, image_batch

SIDE = 98
"""Side in pixels at which pictures are compared: seven patches, enough for an icon."""


@torch.no_grad()
def picture_features(
    pictures: Sequence[Picture],
    model: DinoV2,
    *,
    side: int = SIDE,
    batch_size: int = 32,
    quiet: bool = False,
) -> Tensor:
    """Return class token and mean patch of each picture, scaled to a square.

    Args:
        pictures: Paths, PIL images or uint8 arrays; transparency shows white.
        model: DINOv2.
        side: Of the square in pixels, a multiple of the patch.
        batch_size: Pictures computed together.
        quiet: Show no progress.

    Returns:
        `(n, 2 d)` float32 on the CPU; the first d columns are the class tokens.

    Raises:
        DataError: There are no pictures, or one cannot be read.
    """
    if not pictures:
        raise DataError("no pictures: give at least one")
    parameter = next(model.parameters())
    found = []
    starts = range(0, len(pictures), batch_size)
    for start in progress(starts, description="features", unit="batch", quiet=quiet):
        part = pictures[start : start + batch_size]
        images = image_batch(part, size=(side, side)).to(parameter.device, parameter.dtype)
        found.append(model(images).pooled.float().cpu())
    return torch.cat(found)
