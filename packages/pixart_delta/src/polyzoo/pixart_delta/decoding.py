"""Latents to images in little memory: in tiles above a size, and previews from small latents."""

from __future__ import annotations

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor
from torch.nn import functional as F

from polyzoo.pixart_delta.vae import decode_latents, vae_factor

TILE_ABOVE = 1536 * 1536
"""Image pixels above which a decoder works in tiles by itself."""
TILE = 64
"""Side of a tile in latent pixels."""
OVERLAP = 16
"""Latent pixels that neighbouring tiles share."""


def decode(
    vae: AutoencoderKL, latents: Tensor, *, tiling: bool | None = None, batch: int | None = None
) -> Tensor:
    """Images `(b, 3, H, W)` in about [-1, 1] of scaled latents.

    Args:
        vae: The autoencoder.
        latents: `(b, 4, h, w)`.
        tiling: Work in tiles; by default above 1536 x 1536 pixels.
        batch: Images at a time; all at once where not given.
    """
    factor = vae_factor(vae)
    if tiling is None:
        tiling = latents.shape[2] * latents.shape[3] * factor**2 > TILE_ABOVE
    work = decode_tiled if tiling else decode_latents
    if tiling and batch is None:
        batch = 1
    if batch is None or len(latents) <= batch:
        return work(vae, latents)
    return torch.cat([work(vae, part) for part in latents.split(batch)])


def decode_tiled(
    vae: AutoencoderKL, latents: Tensor, *, tile: int = TILE, overlap: int = OVERLAP
) -> Tensor:
    """Decode tile by tile and blend where tiles overlap.

    Args:
        vae: The autoencoder.
        latents: `(b, 4, h, w)`.
        tile: Side in latent pixels.
        overlap: Shared by neighbours.
    """
    factor = vae_factor(vae)
    b, _, height, width = latents.shape
    image = latents.new_zeros(b, 3, height * factor, width * factor, dtype=torch.float32)
    weight = torch.zeros(height * factor, width * factor, device=latents.device)
    for top in starts(height, tile, overlap):
        for left in starts(width, tile, overlap):
            part = latents[:, :, top : top + tile, left : left + tile]
            drawn = decode_latents(vae, part).float()
            ramp = _ramp(drawn.shape[2], drawn.shape[3], overlap * factor, drawn.device)
            rows = slice(top * factor, top * factor + drawn.shape[2])
            columns = slice(left * factor, left * factor + drawn.shape[3])
            image[:, :, rows, columns] += drawn * ramp
            weight[rows, columns] += ramp
    return image / weight


def starts(length: int, tile: int, overlap: int) -> list[int]:
    """Where tiles begin so that they cover a side and share at least `overlap`."""
    if length <= tile:
        return [0]
    count = -(-(length - overlap) // (tile - overlap))
    return [round(i * (length - tile) / (count - 1)) for i in range(count)]


def preview(vae: AutoencoderKL, latents: Tensor, *, side: int = 32) -> Tensor:
    """A small image of latents, for showing while drawing: `(b, 3, H, W)` in about [-1, 1].

    Args:
        vae: The autoencoder.
        latents: Clean latents as a step sees them.
        side: Longest side in latent pixels that is decoded.
    """
    scale = min(1.0, side / max(latents.shape[2:]))
    if scale < 1:
        latents = F.interpolate(latents.float(), scale_factor=scale, mode="area")
    return decode_latents(vae, latents)


def _ramp(height: int, width: int, overlap: int, device: torch.device) -> Tensor:
    """`(H, W)` weights that fall toward the edges and are nowhere 0."""
    sides = []
    for length in (height, width):
        position = torch.arange(length, device=device) + 1.0
        nearest = torch.minimum(position, length + 1 - position)
        sides.append((nearest / (overlap + 1)).clamp(max=1.0))
    return sides[0][:, None] * sides[1]
