"""Open images of strangers: size checked before decoding, upright, and always RGB."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from polyzoo.core.errors import DataError
from polyzoo.core.log import get_logger

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
MAX_PIXELS = 64_000_000

_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_log = get_logger(__name__)


def open_image(
    source: str | Path | bytes | BinaryIO | Image.Image,
    *,
    max_pixels: int = MAX_PIXELS,
    background: tuple[int, int, int] = (255, 255, 255),
) -> Image.Image:
    """Return an upright RGB image.

    Grey, palette, CMYK and 16-bit images are converted; transparency is laid over the background;
    of an animation the first frame is taken.

    Args:
        source: A file's path, its bytes, an open binary file, or a PIL image.
        max_pixels: Width times height allowed; checked before anything is decoded.
        background: What shows through transparency, 0 to 255 for red, green, blue.

    Raises:
        DataError: Not an image of a known format, too large, or damaged.

    Example:
        >>> open_image("photo.jpg").size
        (640, 480)
    """
    name = _name(source)
    if isinstance(source, Image.Image):
        _check_size(source, name, max_pixels)
        return _to_rgb(source, name, background)
    if isinstance(source, bytes):
        source = io.BytesIO(source)
    try:
        with warnings.catch_warnings():
            # Pillow warns about sizes (our limit decides) and about odd metadata (not ours to fix).
            warnings.simplefilter("ignore")
            with Image.open(source, formats=FORMATS) as image:
                _check_size(image, name, max_pixels)
                image.load()
                return _to_rgb(_upright(image, name), name, background)
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(f"{name}: no such file") from None
    except IsADirectoryError:
        raise DataError(f"{name}: is a folder; give an image file") from None
    except PermissionError:
        raise
    except UnidentifiedImageError:
        raise DataError(
            f"{name}: is not one of {', '.join(FORMATS)}, or its start is damaged"
        ) from None
    except Image.DecompressionBombError:
        raise DataError(f"{name}: has more than {max_pixels:,} pixels") from None
    except Exception as error:  # decoders raise whatever they like on damaged files
        raise DataError(f"{name}: is damaged: {error}") from error


def _name(source: object) -> str:
    if isinstance(source, str) and source.startswith(("http://", "https://")):
        raise DataError(f"{source}: addresses are not fetched; download the file and give its path")
    return str(source) if isinstance(source, str | Path) else "image"


def _check_size(image: Image.Image, name: str, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise DataError(
            f"{name}: {width} x {height} is more than {max_pixels:,} pixels; scale it down, or "
            "raise max_pixels"
        )
    if not width * height:
        raise DataError(f"{name}: {width} x {height} holds no pixels")


def _upright(image: Image.Image, name: str) -> Image.Image:
    try:
        turn = _UPRIGHT.get(image.getexif().get(_ORIENTATION, 1))
    except Exception as error:  # damaged metadata around sound pixels
        _log.warning("%s: its EXIF data is damaged (%s); taken as upright", name, error)
        return image
    return image if turn is None else image.transpose(turn)


def _to_rgb(image: Image.Image, name: str, background: tuple[int, int, int]) -> Image.Image:
    if image.mode.startswith("I"):
        return _from_deep_grey(image, name)
    if image.mode == "F":
        raise DataError(f"{name}: holds floating-point pixels of no agreed range; save it as 8 bit")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, (*background, 255))
        return Image.alpha_composite(ground, image).convert("RGB")
    return image.copy() if image.mode == "RGB" else image.convert("RGB")


def _from_deep_grey(image: Image.Image, name: str) -> Image.Image:
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise DataError(f"{name}: grey values {values.min()} to {values.max()} are not 16 bit")
    # 65535 / 257 = 255, so black stays black and white stays white
    return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
