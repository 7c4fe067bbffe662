"""The EVA-CLIP tower, at any size: a plain ViT without a final norm and without a head."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polyzoo.core.errors import DataError
from polyzoo.seed.blocks import Block
from polyzoo.seed.config import VisionConfig


class EvaVit(nn.Module):
    """Patches and a class token through pre-norm blocks.

    Example:
        >>> tower = EvaVit(VisionConfig(image_size=28, patch_size=7, width=64, depth=2, heads=4))
        >>> tower(torch.zeros(1, 3, 28, 28)).shape
        torch.Size([1, 17, 64])
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.patches = nn.Conv2d(3, config.width, config.patch_size, stride=config.patch_size)
        self.class_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.positions = nn.Parameter(torch.zeros(1, config.tokens, config.width))
        self.blocks = nn.ModuleList(
            Block(
                config.width,
                heads=config.heads,
                hidden=config.mlp_hidden,
                key_bias=False,
                norm_eps=config.norm_eps,
            )
            for _ in range(config.depth)
        )
        nn.init.trunc_normal_(self.class_token, std=0.02)
        nn.init.trunc_normal_(self.positions, std=0.02)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return (b, 1 + patches, d) features of normalised pixels (b, 3, H, W).

        Raises:
            DataError: H or W is not a multiple of the patch size.
        """
        x = self.embed(pixels)
        for block in self.blocks:
            x = block(x)
        return x

    def embed(self, pixels: Tensor) -> Tensor:
        """Return (b, 1 + patches, d): what enters the first block."""
        size = self.config.patch_size
        if pixels.shape[-2] % size or pixels.shape[-1] % size:
            raise DataError(
                f"pixels of shape {tuple(pixels.shape)}: height and width must be multiples of "
                f"the patch size {size}"
            )
        grid = self.patches(pixels)
        x = torch.cat(
            (self.class_token.expand(len(grid), -1, -1), grid.flatten(2).transpose(1, 2)), 1
        )
        return x + self.positions_for(grid.shape[-2], grid.shape[-1]).to(x.dtype)

    def positions_for(self, rows: int, columns: int) -> Tensor:
        """Return the position table for a grid of patches, resized where it is not the own one."""
        side = self.config.image_size // self.config.patch_size
        if (rows, columns) == (side, side):
            return self.positions
        table = self.positions[:, 1:].transpose(1, 2).unflatten(2, (side, side))
        resized = F.interpolate(
            table.float(), size=(rows, columns), mode="bicubic", align_corners=False
        )
        flat = resized.flatten(2).transpose(1, 2).to(table.dtype)
        return torch.cat((self.positions[:, :1], flat), 1)
