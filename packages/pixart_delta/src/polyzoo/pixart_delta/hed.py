"""HED: holistically-nested edge detection, which makes the published control maps (section 6)."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polyzoo.core.weights import load_into, read_weights

_CHANNELS = (64, 128, 256, 512, 512)
_LAYERS = (2, 2, 3, 3, 3)


class HedMaps(NamedTuple):
    """An edge map, and the side outputs it is made of."""

    edge: Tensor
    """`(b, 1, H, W)` in [0, 1]."""
    sides: tuple[Tensor, ...]
    """`(b, 1, H / 2^i, W / 2^i)`, before the sigmoid."""


class HedStage(nn.Module):
    """Convolutions of one resolution, and their projection to one channel."""

    def __init__(self, inputs: int, outputs: int, layers: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            [nn.Conv2d(inputs if i == 0 else outputs, outputs, 3, padding=1) for i in range(layers)]
        )
        self.projection = nn.Conv2d(outputs, 1, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Features for the next stage, and the side output."""
        for conv in self.convs:
            x = F.relu(conv(x))
        return x, self.projection(x)


class HedNetwork(nn.Module):
    """Edges of photographs, 14.7 M parameters.

    Example:
        >>> network = load_hed("ControlNetHED.safetensors")
        >>> network(images).edge.shape
        torch.Size([1, 1, 512, 512])
    """

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.Parameter(torch.zeros(1, 3, 1, 1))
        inputs = (3, *_CHANNELS[:-1])
        for index, (i, o, n) in enumerate(zip(inputs, _CHANNELS, _LAYERS, strict=True), start=1):
            self.add_module(f"block{index}", HedStage(i, o, n))

    def forward(self, images: Tensor) -> HedMaps:
        """Find edges.

        Args:
            images: `(b, 3, H, W)` RGB in [0, 1]; sides of at least 16.
        """
        x = images * 255 - self.norm
        sides: list[Tensor] = []
        for index in range(1, 6):
            if index > 1:
                x = F.max_pool2d(x, 2)
            x, side = self.get_submodule(f"block{index}")(x)
            sides.append(side)
        size = images.shape[2:]
        resized = [F.interpolate(s, size=size, mode="bilinear") for s in sides]
        edge = torch.sigmoid(torch.stack(resized).mean(dim=0))
        return HedMaps(edge, tuple(sides))


def load_hed(path: str | Path, *, dtype: torch.dtype | None = None) -> HedNetwork:
    """Read the network from safetensors (convert ControlNetHED.pth first), strictly."""
    network = HedNetwork()
    load_into(network, read_weights(path, dtype=dtype), source=str(path))
    return network.eval()
