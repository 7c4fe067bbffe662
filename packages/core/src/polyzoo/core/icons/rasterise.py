"""From drawings and renders to square images with transparency."""

from __future__ import annotations

import io
import re

from PIL import Image

from polyzoo.core.errors import DataError
from polyzoo.core.lazy import import_extra

_SVG_TAG = re.compile(r"<svg\b[^>]*>", re.DOTALL)
_ATTRIBUTE = re.compile(r"""\s(width|height|viewBox)\s*=\s*["']([^"']*)["']""")
_LENGTH = re.compile(r"\s*([+-]?[\d.]+(?:e[+-]?\d+)?)\s*([a-z%]*)\s*", re.IGNORECASE)
_PIXELS = {
    "": 1.0,
    "px": 1.0,
    "pt": 4 / 3,
    "pc": 16.0,
    "mm": 96 / 25.4,
    "cm": 96 / 2.54,
    "in": 96.0,
}
_LEAST_BEFORE_CROP = 256
_VISIBLE = 8


def emoji_image(svg: str, size: int) -> Image.Image:
    """Draw a square SVG document.

    Args:
        svg: The document; its viewBox is square.
        size: Side in pixels.

    Returns:
        RGBA, size x size.
    """
    return _square(_draw(svg, size), size)


def render_image(data: bytes, size: int) -> Image.Image:
    """Scale a rendered WebP image.

    Returns:
        RGBA, size x size.
    """
    try:
        with Image.open(io.BytesIO(data), formats=("WEBP",)) as image:
            return _square(image.convert("RGBA"), size)
    except (OSError, ValueError) as error:
        raise DataError(f"a render is damaged: {error}") from error


def clipart_image(svg: str, size: int) -> Image.Image | None:
    """Draw an SVG file of any size, cut to what is visible, and centred.

    Returns:
        RGBA, size x size; None where nothing can be seen or the drawing cannot be read.
    """
    document = with_pixels(svg)
    if document is None:
        return None
    try:
        image = _draw(document, max(_LEAST_BEFORE_CROP, 2 * size))
    except DataError:
        return None
    alpha = image.getchannel("A").point([255 * (value >= _VISIBLE) for value in range(256)])
    box = alpha.getbbox()
    return None if box is None else _square(image.crop(box), size)


def with_pixels(svg: str) -> str | None:
    """Return the document with its size in pixels and a viewBox; None where it states no size.

    resvg refuses documents whose size has units and that have no viewBox: half of the clip art.
    """
    tag = _SVG_TAG.search(svg)
    if tag is None:
        return None
    attributes = dict(_ATTRIBUTE.findall(tag[0]))
    width, height = (_pixels(attributes.get(name)) for name in ("width", "height"))
    numbers = re.split(r"[\s,]+", attributes.get("viewBox", "").strip())
    try:
        box = [float(number) for number in numbers]
    except ValueError:
        box = []
    if len(box) != 4:
        if width is None or height is None:
            return None
        box = [0.0, 0.0, width, height]
    if width is None or height is None:
        width, height = box[2], box[3]
    if min(width, height, box[2], box[3]) <= 0:
        return None
    rest = _ATTRIBUTE.sub("", tag[0]).removeprefix("<svg")
    view = " ".join(f"{number:g}" for number in box)
    new = f'<svg width="{width:g}" height="{height:g}" viewBox="{view}"{rest}'
    return svg[: tag.start()] + new + svg[tag.end() :]


def _pixels(length: str | None) -> float | None:
    match = _LENGTH.fullmatch(length or "")
    if match is None or match[2].lower() not in _PIXELS:
        return None
    return float(match[1]) * _PIXELS[match[2].lower()]


def _draw(svg: str, side: int) -> Image.Image:
    resvg = import_extra("resvg_py", install="polyzoo-core[icons]")
    try:
        # No system fonts: a pack must not depend on which ones a machine has.
        png = resvg.svg_to_bytes(svg_string=svg, width=side, skip_system_fonts=True)
        image = Image.open(io.BytesIO(bytes(png)), formats=("PNG",))
        if max(image.size) > 8 * side:
            raise DataError(f"a drawing is {image.size[0]} x {image.size[1]}: not a picture")
        return image.convert("RGBA")
    except (ValueError, OSError) as error:
        raise DataError(f"a drawing cannot be rasterised: {error}") from error


def _square(image: Image.Image, size: int) -> Image.Image:
    """Scale to fit, centred on a transparent square."""
    scale = size / max(image.size)
    new = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    if new != image.size:
        image = image.resize(new, Image.Resampling.LANCZOS)
    if new == (size, size):
        return image
    out = Image.new("RGBA", (size, size))
    out.paste(image, ((size - new[0]) // 2, (size - new[1]) // 2))
    return out
