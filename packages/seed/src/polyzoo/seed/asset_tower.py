"""DINOv2 as tokens: the frozen tower of `vision.kind="dinov2"`, and the teacher of our own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class DinoTokens(nn.Module):
    """Class token and patches of DINOv2 as one sequence (b, 1 + patches, 384)."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, pixels: Tensor) -> Tensor:
        """Map ImageNet-normalised pixels (b, 3, H, W) to tokens; H and W multiples of 14."""
        out: Any = self.tower(pixels.to(next(self.tower.parameters()).dtype))
        return torch.cat((out.cls[:, None], out.patches.flatten(1, 2)), 1)


def load_dino(
    *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> DinoTokens:
    """Load the asset dinov2-small.

    Raises:
        AssetError: It has not been fetched; the message says how.
    """
    from polyzoo.towers.dinov2 import load_dinov2

    return DinoTokens(load_dinov2(device=device, dtype=dtype)).eval()
