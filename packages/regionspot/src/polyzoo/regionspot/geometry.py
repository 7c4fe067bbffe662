"""Sizes, pixels and masks between an image and the frames of the two towers."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from polyzoo.regionspot.clip import MEAN, STD


class SamFrame(NamedTuple):
    """How an image lies in SAM's square."""

    height: int
    """Of the image."""
    width: int
    """Of the image."""
    sam_height: int
    """Of the resized image."""
    sam_width: int
    """Of the resized image."""

    def boxes(self, boxes: Tensor) -> Tensor:
        """Scale `(k, 4)` corners, or `(k, p, 2)` points, from the image to SAM's frame."""
        across, down = self.sam_width / self.width, self.sam_height / self.height
        scale = boxes.new_tensor([across, down]).repeat(boxes.shape[-1] // 2)
        return boxes * scale


def sam_frame(height: int, width: int, side: int) -> SamFrame:
    """Return the frame in which the longer side is `side`."""
    scale = side / max(height, width)
    return SamFrame(
        height, width, max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))
    )


def sam_pixels(image: Image.Image, frame: SamFrame) -> Tensor:
    """Resize with PIL's antialiased bilinear filter to uint8 `(3, h, w)`."""
    resized = image.resize((frame.sam_width, frame.sam_height), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(resized, copy=True)).permute(2, 0, 1)


def squash(pixels: Tensor, size: tuple[int, int], *, antialias: bool) -> Tensor:
    """Resize `(b, 3, H, W)` pixels of 0..1 to CLIP's square, bilinear, and normalise."""
    resized = F.interpolate(
        pixels.float(), size=size, mode="bilinear", align_corners=False, antialias=antialias
    )
    mean, std = (resized.new_tensor(v)[:, None, None] for v in (MEAN, STD))
    return (resized - mean) / std


def clip_pixels(image: Image.Image, size: tuple[int, int], *, antialias: bool) -> Tensor:
    """Squash a PIL image to `(3, h, w)`.

    A very large image is first reduced by a whole factor that keeps it at least eight times CLIP's
    size, so that memory stays bounded.
    """
    factor = min(image.width // (8 * size[1]), image.height // (8 * size[0]))
    if factor > 1:
        image = image.reduce(factor)
    array = torch.from_numpy(np.array(image, copy=True)).permute(2, 0, 1)
    return squash(array[None].float() / 255, size, antialias=antialias)[0]


def upscale_masks(logits: Tensor, frame: SamFrame, side: int) -> Tensor:
    """Return boolean `(k, m, H, W)` masks of the image from low-resolution logits."""
    large = F.interpolate(logits.float(), (side, side), mode="bilinear", align_corners=False)
    cut = large[..., : frame.sam_height, : frame.sam_width]
    size = (frame.height, frame.width)
    return F.interpolate(cut, size, mode="bilinear", align_corners=False) > 0
