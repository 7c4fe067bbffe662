"""Images as users have them: paths, PIL, arrays, tensors; one upright RGB picture comes out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from polyzoo.core.errors import DataError
from polyzoo.core.images import open_image
from polyzoo.core.log import get_logger

_log = get_logger(__name__)
MAX_PIXELS = 178_956_970
"""Pillow's own limit, checked before anything is decoded."""
_WIDE = 4.0


def read_image(source: Any, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Return an upright RGB image; boxes refer to it.

    Args:
        source: A path, bytes, a PIL image, a uint8 array `(H, W)`, `(H, W, 3)` or `(H, W, 4)`, or a
            tensor `(3, H, W)` of uint8 or of 0..1.
        max_pixels: Width times height allowed.

    Raises:
        DataError: Names the dtype, range and shape where an array is not one of these.
    """
    if isinstance(source, Tensor):
        source = _from_tensor(source)
    if isinstance(source, np.ndarray):
        source = _from_array(source)
    if not isinstance(source, str | Path | bytes | Image.Image) and not hasattr(source, "read"):
        raise DataError(
            f"an image cannot be a {type(source).__name__}; give a path, a PIL image, an array or "
            "a tensor"
        )
    image = open_image(source, max_pixels=max_pixels)
    ratio = max(image.size) / min(image.size)
    if ratio > _WIDE:
        _log.warning(
            "the image is %d x %d, %.1f : 1: it is seen squashed or small, and names get worse; "
            "cut it into parts",
            *image.size, ratio,
        )  # fmt: skip
    return image


def _from_tensor(values: Tensor) -> np.ndarray:
    if values.ndim != 3 or values.shape[0] not in (1, 3, 4):
        raise DataError(
            f"a tensor image must be (3, H, W); this one is {values.dtype} {tuple(values.shape)}"
        )
    array = values.detach().cpu().permute(1, 2, 0)
    if array.is_floating_point():
        low, high = float(array.min()), float(array.max())
        if low < -1e-3 or high > 1 + 1e-3:
            raise DataError(
                f"a floating-point image must lie in 0..1; this {array.dtype} tensor of shape "
                f"{tuple(values.shape)} lies in {low:g}..{high:g}"
            )
        array = (array.float().clamp(0, 1) * 255).round()
    return array.to(torch.uint8).numpy()


def _from_array(values: np.ndarray) -> Image.Image:
    described = f"{values.dtype} {values.shape}"
    if values.ndim == 3 and values.shape[0] in (1, 3, 4) and values.shape[2] not in (1, 3, 4):
        raise DataError(
            f"the array is {described}: channels first; pass array.transpose(1, 2, 0), or a tensor"
        )
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[..., 0]
    if values.ndim not in (2, 3) or (values.ndim == 3 and values.shape[2] not in (3, 4)):
        raise DataError(f"the array is {described}; give (H, W), (H, W, 3) or (H, W, 4)")
    if values.dtype == np.uint16 and values.ndim == 2:
        return Image.fromarray(values)
    if values.dtype != np.uint8:
        low, high = (float(f(values)) if values.size else 0.0 for f in (np.min, np.max))
        hint = "; multiply by 255 and convert" if low >= 0 and high <= 1 else ""
        raise DataError(
            f"the array is {described} with values {low:g}..{high:g}; give uint8 of 0..255{hint}"
        )
    return Image.fromarray(np.ascontiguousarray(values))
