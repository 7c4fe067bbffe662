"""The head that turns DINOv2's patches into a map of what the image is about."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SaliencyHead(nn.Module):
    """Three steps of upsampling by two, then one logit a place: 8 x 8 places a patch."""

    def __init__(self, dim: int, channels: tuple[int, int, int]) -> None:
        super().__init__()
        widths = (dim, *channels)
        for step in (1, 2, 3):
            up = nn.ConvTranspose2d(widths[step - 1], widths[step], 4, stride=2, padding=1)
            self.add_module(f"upconv{step}", up)
            self.add_module(f"bn{step}", _FixedNorm(widths[step]))
        self.final_conv = nn.Conv2d(widths[-1], 1, 1)

    def forward(self, patches: Tensor) -> Tensor:
        """Return logits.

        Args:
            patches: `(b, d, h, w)`, after the transformer's last norm.

        Returns:
            `(b, 1, 8 h, 8 w)`.
        """
        for step in (1, 2, 3):
            up, norm = self.get_submodule(f"upconv{step}"), self.get_submodule(f"bn{step}")
            patches = F.relu(norm(up(patches)))
        return self.final_conv(patches)


class _FixedNorm(nn.Module):
    """Batch normalisation by stored statistics; it has no training mode, as the head has none."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, maps: Tensor) -> Tensor:
        statistics = (self.running_mean, self.running_var)
        return F.batch_norm(maps, *statistics, self.weight, self.bias, eps=1e-5)
