"""Batches of RGBA pictures turned into training views, on the device they are on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Strength = Literal["none", "light", "strong"]


@dataclass(frozen=True)
class _Ranges:
    """How far each change goes."""

    scale: tuple[float, float]
    shift: float
    turn: float
    flip: bool
    colour: float
    ground: float
    """Share of pictures that get another background than white."""


_RANGES = {
    "none": _Ranges((1.0, 1.0), 0.0, 0.0, flip=False, colour=0.0, ground=0.0),
    "light": _Ranges((0.85, 1.1), 0.06, 0.05, flip=False, colour=0.08, ground=0.0),
    "strong": _Ranges((0.5, 1.5), 0.2, 0.3, flip=True, colour=0.25, ground=0.5),
}


def views(
    images: Tensor, *, strength: Strength, generator: torch.Generator, size: int | None = None
) -> Tensor:
    """Return RGB pictures in 0 to 1, (b, 3, size, size), moved, turned, tinted and on a ground.

    Args:
        images: uint8 (b, S, S, 4).
        strength: none only lays them on white.
        generator: On the same device; draws everything.
        size: Side of the result; the pictures' own where not given.
    """
    ranges = _RANGES[strength]
    b = len(images)
    pixels = images.permute(0, 3, 1, 2).float() / 255
    # Straight alpha bleeds the colour of invisible pixels when resampled: multiply first.
    pixels = torch.cat((pixels[:, :3] * pixels[:, 3:], pixels[:, 3:]), 1)
    size = size or images.shape[1]
    if strength != "none" or size != images.shape[1]:
        grid = F.affine_grid(
            _transforms(b, ranges, generator), [b, 4, size, size], align_corners=False
        )
        pixels = F.grid_sample(pixels, grid, mode="bilinear", align_corners=False)
    ground = torch.ones(b, 3, 1, 1, device=images.device)
    if ranges.ground:
        other = torch.rand(b, 3, 1, 1, device=images.device, generator=generator)
        chosen = torch.rand(b, 1, 1, 1, device=images.device, generator=generator) < ranges.ground
        ground = torch.where(chosen, other, ground)
    rgb = pixels[:, :3] + (1 - pixels[:, 3:]) * ground
    if ranges.colour:
        rgb = _tint(rgb, ranges.colour, generator)
    return rgb.clamp(0, 1)


def beside(images: Tensor, *, generator: torch.Generator, share: float) -> Tensor:
    """Put another picture of the batch, at half size, into a corner of some: (b, S, S, 4)."""
    b, side = len(images), images.shape[1]
    half = side // 2
    order = torch.rand(b, generator=generator, device=images.device).argsort()
    small = F.interpolate(
        images[order].permute(0, 3, 1, 2).float(), size=(half, half), mode="area"
    ).permute(0, 2, 3, 1)
    corners = torch.randint(0, 4, (b, 1, 1, 1), generator=generator, device=images.device)
    keep = torch.rand(b, 1, 1, 1, generator=generator, device=images.device) >= share
    corners = torch.where(keep, -1, corners)
    rest = side - half
    over = torch.zeros(images.shape, device=images.device)
    # Chosen by masks, not by indices: those would make the host wait for the device.
    for corner in range(4):
        row, column = (corner // 2) * rest, (corner % 2) * rest
        placed = F.pad(small, (0, 0, column, rest - column, row, rest - row))
        over = torch.where(corners == corner, placed, over)
    alpha = over[..., 3:] / 255
    mixed = images.float()
    colour = over[..., :3] * alpha + mixed[..., :3] * (1 - alpha)
    cover = over[..., 3:] + mixed[..., 3:] * (1 - alpha)
    return torch.cat((colour, cover), -1).round().to(torch.uint8)


def _transforms(b: int, ranges: _Ranges, generator: torch.Generator) -> Tensor:
    """Affine matrices (b, 2, 3) from output to input places."""
    device = generator.device

    def draw(low: float, high: float) -> Tensor:
        return torch.rand(b, device=device, generator=generator) * (high - low) + low

    zoom = 1 / draw(*ranges.scale)
    turn = draw(-ranges.turn, ranges.turn)
    mirror = torch.ones(b, device=device)
    if ranges.flip:
        mirror = torch.where(draw(0, 1) < 0.5, -1.0, 1.0)
    cos, sin = torch.cos(turn) * zoom, torch.sin(turn) * zoom
    rows = (
        torch.stack((cos * mirror, -sin, draw(-ranges.shift, ranges.shift)), 1),
        torch.stack((sin * mirror, cos, draw(-ranges.shift, ranges.shift)), 1),
    )
    return torch.stack(rows, 1)


def _tint(rgb: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Change brightness, contrast and saturation, each picture on its own."""
    b = len(rgb)

    def factor() -> Tensor:
        draw = torch.rand(b, 1, 1, 1, device=rgb.device, generator=generator)
        return 1 + (2 * draw - 1) * strength

    rgb = rgb * factor()
    mean = rgb.mean((1, 2, 3), keepdim=True)
    rgb = (rgb - mean) * factor() + mean
    grey = rgb.mean(1, keepdim=True)
    return (rgb - grey) * factor() + grey
