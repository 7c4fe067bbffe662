"""From whatever a user calls a picture to normalised pixels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from polyzoo.core.errors import DataError
from polyzoo.core.images import open_image
from polyzoo.seed.config import SeedConfig

Picture = str | Path | bytes | Image.Image | NDArray[np.uint8] | Tensor
_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


def to_pixels(picture: Any, config: SeedConfig) -> Tensor:
    """Return (3, S, S) fp32: upright RGB on white, resized to a square, normalised.

    The aspect ratio is not kept and nothing is cropped, as published. A tensor is taken as
    normalised already and only checked.

    Raises:
        DataError: It cannot be read, or is a tensor or array of the wrong kind.
    """
    if isinstance(picture, Tensor):
        return check_pixels(picture[None] if picture.ndim == 3 else picture, config)[0]
    if isinstance(picture, np.ndarray):
        picture = _from_array(picture)
    values = np.asarray(square(open_image(picture), config), dtype=np.uint8)
    return from_bytes(torch.from_numpy(values.copy())[None], config)[0]


def square(image: Image.Image, config: SeedConfig) -> Image.Image:
    """Return an RGB picture resized to the tower's square."""
    size = config.vision.image_size
    if image.size == (size, size):
        return image
    return image.resize((size, size), _FILTERS[config.preprocess.resample])


def from_bytes(values: Tensor, config: SeedConfig) -> Tensor:
    """Return normalised (b, 3, S, S) fp32 of uint8 (b, S, S, 3), on the device they are on."""
    mean = torch.tensor(config.preprocess.mean, device=values.device).view(3, 1, 1)
    std = torch.tensor(config.preprocess.std, device=values.device).view(3, 1, 1)
    return (values.permute(0, 3, 1, 2).float() / 255 - mean) / std


def check_pixels(pixels: Tensor, config: SeedConfig) -> Tensor:
    """Return the tensor if it is (b, 3, S, S) normalised floats.

    Raises:
        DataError: Names what is wrong and what is wanted.
    """
    size = config.vision.image_size
    wanted = f"normalised floats of shape (b, 3, {size}, {size})"
    if pixels.dtype == torch.uint8:
        raise DataError(
            f"pixels are uint8; wanted are {wanted}: divide by 255, subtract the mean and divide "
            "by the std of the config, or give pictures instead of tensors"
        )
    if not pixels.is_floating_point():
        raise DataError(f"pixels are {pixels.dtype}; wanted are {wanted}")
    if pixels.ndim != 4 or pixels.shape[1:] != (3, size, size):
        raise DataError(f"pixels have shape {tuple(pixels.shape)}; wanted are {wanted}")
    if not len(pixels):
        raise DataError(f"the batch is empty; wanted are {wanted}")
    low, high = (float(x) for x in pixels.aminmax())
    if not (np.isfinite(low) and np.isfinite(high)):
        raise DataError("pixels hold NaN or infinity")
    if max(abs(low), abs(high)) > 20:
        raise DataError(
            f"pixels lie in {low:.3g} to {high:.3g}, which no normalised picture does: divide by "
            "255, subtract the mean and divide by the std of the config"
        )
    return pixels


def _from_array(array: NDArray[Any]) -> Image.Image:
    if array.dtype != np.uint8 or array.ndim not in (2, 3):
        raise DataError(
            f"an array of {array.dtype} and shape {array.shape} is no picture; wanted is uint8 "
            "(H, W), (H, W, 3) or (H, W, 4)"
        )
    if array.ndim == 3 and array.shape[2] not in (3, 4):
        raise DataError(f"an array of shape {array.shape} has no 3 or 4 channels behind H and W")
    if not array.size:
        raise DataError(f"an array of shape {array.shape} holds no pixels")
    return Image.fromarray(array)
