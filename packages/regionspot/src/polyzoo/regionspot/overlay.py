"""Pictures of results: masks, boxes and names over the image."""

from __future__ import annotations

import colorsys

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from polyzoo.regionspot.results import Region, RegionResult

_GOLDEN = 0.61803398875
_MASK_SHARE = 0.38
_MOST_PIXELS = 4_000_000


def draw(image: Image.Image, result: RegionResult, *, rejected: bool = False) -> Image.Image:
    """Return the image with every region drawn on it; a very large image is scaled down first.

    Args:
        image: Upright, as the result refers to it.
        result: What was found.
        rejected: Whether rejected regions are drawn too, in grey.
    """
    factor = min(1.0, (_MOST_PIXELS / (image.width * image.height)) ** 0.5)
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    canvas = image.resize(size, Image.Resampling.LANCZOS) if factor < 1 else image.copy()
    regions = [r for r in result.regions(top=1) if rejected or not r.rejected]
    # Large ones first, so that small ones stay visible.
    regions.sort(key=lambda r: -(r.box[2] - r.box[0]) * (r.box[3] - r.box[1]))
    colours = {name: _colour(place) for place, name in enumerate(result.names)}
    pixels = np.asarray(canvas).astype(np.float32)
    for region in regions:
        if region.mask is not None:
            mask = Image.fromarray(region.mask.decode())
            small = np.asarray(mask.resize(size, Image.Resampling.NEAREST))
            colour = np.array(_shade(region, colours), dtype=np.float32)
            pixels[small] = pixels[small] * (1 - _MASK_SHARE) + colour * _MASK_SHARE
    canvas = Image.fromarray(pixels.round().astype(np.uint8))
    pen = ImageDraw.Draw(canvas)
    unit = max(canvas.size) / 640
    font = ImageFont.load_default(size=max(11, round(15 * unit)))
    for region in regions:
        corners = tuple(v * factor for v in region.box)
        colour = _shade(region, colours)
        pen.rectangle(corners, outline=colour, width=max(2, round(2.5 * unit)))
    for region in regions:
        _label(pen, region, _shade(region, colours), font, factor, canvas.size)
    return canvas


def _label(
    pen: ImageDraw.ImageDraw,
    region: Region,
    colour: tuple[int, int, int],
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    factor: float,
    size: tuple[int, int],
) -> None:
    text = f"{region.name} {region.score:.2f}"
    left, top, right, bottom = pen.textbbox((0, 0), text, font=font)
    width, height = right - left + 8, bottom - top + 6
    x = min(max(0, region.box[0] * factor), max(0, size[0] - width))
    y = region.box[1] * factor - height
    if y < 0:
        y = region.box[1] * factor
    pen.rectangle((x, y, x + width, y + height), fill=colour)
    dark = colour[0] * 0.299 + colour[1] * 0.587 + colour[2] * 0.114 < 140
    pen.text((x + 4 - left, y + 3 - top), text, font=font, fill="white" if dark else "black")


def _shade(region: Region, colours: dict[str, tuple[int, int, int]]) -> tuple[int, int, int]:
    return (128, 128, 128) if region.rejected else colours[region.name]


def _colour(place: int) -> tuple[int, int, int]:
    red, green, blue = colorsys.hsv_to_rgb((0.02 + place * _GOLDEN) % 1, 0.78, 0.95)
    return round(red * 255), round(green * 255), round(blue * 255)
