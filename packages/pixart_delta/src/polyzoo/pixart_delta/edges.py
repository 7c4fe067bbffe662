"""Edge maps without a network: what the small model's control branch is trained on."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

_THRESHOLD = 0.12
_SOFTNESS = 0.03


def edge_maps(images: Tensor) -> Tensor:
    """White edges on black: where neighbouring colours differ.

    Args:
        images: `(b, 3, H, W)` in [0, 1].

    Returns:
        `(b, 1, H, W)` in [0, 1], as a HED map looks: near 1 on an outline.
    """
    smooth = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    padded = F.pad(smooth, (1, 1, 1, 1), mode="replicate")
    across = padded[:, :, 1:-1, 2:] - padded[:, :, 1:-1, :-2]
    down = padded[:, :, 2:, 1:-1] - padded[:, :, :-2, 1:-1]
    strength = torch.sqrt(across**2 + down**2).amax(dim=1, keepdim=True)
    return torch.sigmoid((thinned(strength, across, down) - _THRESHOLD) / _SOFTNESS)


def thinned(strength: Tensor, across: Tensor, down: Tensor) -> Tensor:
    """Keep the strength where it is a ridge along its own direction, halve it elsewhere.

    Args:
        strength: `(b, 1, H, W)`.
        across: `(b, 3, H, W)` horizontal differences.
        down: Vertical ones.
    """
    horizontal = across.abs().amax(1, keepdim=True) >= down.abs().amax(1, keepdim=True)
    wide = F.max_pool2d(F.pad(strength, (1, 1, 0, 0)), (1, 3), stride=1)
    tall = F.max_pool2d(F.pad(strength, (0, 0, 1, 1)), (3, 1), stride=1)
    ridge = strength >= torch.where(horizontal, wide, tall)
    return torch.where(ridge, strength, strength * 0.5)


def edge_agreement(found: Tensor, wanted: Tensor, *, slack: int = 1) -> Tensor:
    """F1 of two edge maps, `(b,)`: an edge counts where the other has one within `slack` pixels.

    Args:
        found: `(b, 1, H, W)` in [0, 1]; an edge is above one half.
        wanted: The same.
        slack: In pixels.
    """
    ours, theirs = found > 0.5, wanted > 0.5
    near = [
        F.max_pool2d(edge.float(), 2 * slack + 1, stride=1, padding=slack) > 0
        for edge in (ours, theirs)
    ]
    hit = (ours & near[1]).flatten(1).sum(1)
    covered = (theirs & near[0]).flatten(1).sum(1)
    precision = hit / ours.flatten(1).sum(1).clamp(min=1)
    recall = covered / theirs.flatten(1).sum(1).clamp(min=1)
    return 2 * precision * recall / (precision + recall).clamp(min=1e-6)
