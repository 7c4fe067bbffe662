"""DINOv2, a vision transformer trained without labels: dense features, and a saliency map.

Oquab et al., "DINOv2: Learning Robust Visual Features without Supervision", 2023.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polyzoo.attention import attention
from polyzoo.core.assets import asset_folder
from polyzoo.core.device import resolve_device
from polyzoo.core.weights import load_into, read_weights
from polyzoo.towers.saliency import SaliencyHead

ASSET = "dinov2-small"


@dataclass(frozen=True, kw_only=True, slots=True)
class DinoV2Config:
    """Shape of the transformer; the default is ViT-S/14."""

    dim: int = 384
    """Channels of a token."""
    depth: int = 12
    """Blocks."""
    heads: int = 6
    """Heads of a block; must divide dim."""
    patch: int = 14
    """Side of a patch in pixels."""
    grid: int = 37
    """Side of the stored position table in patches."""
    head_channels: tuple[int, int, int] = (256, 128, 64)
    """Channels of the saliency head's layers."""

    def __post_init__(self) -> None:
        if self.dim % self.heads:
            raise ValueError(f"heads={self.heads} must divide dim={self.dim}")
        smallest = min(self.dim, self.depth, self.heads, self.patch, self.grid, *self.head_channels)
        if smallest < 1:
            raise ValueError(f"{self}: every number must be at least 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class Features:
    """What the transformer says of images, after its last norm."""

    cls: Tensor
    """`(b, d)`: the class token, for the whole image."""
    patches: Tensor
    """`(b, h, w, d)`: one token a patch, rows from the top, columns from the left."""

    @property
    def pooled(self) -> Tensor:
        """`(b, 2 d)`: class token and mean patch, the features of linear maps (see `RidgeMap`)."""
        return torch.cat([self.cls, self.patches.mean(dim=(1, 2))], dim=1)


class DinoV2(nn.Module):
    """A vision transformer with layer scale and any image size, under timm's parameter names.

    Example:
        >>> features = load_dinov2()(image_batch(["cat.jpg"], size=(224, 224)))
        >>> features.cls.shape, features.patches.shape
        (torch.Size([1, 384]), torch.Size([1, 16, 16, 384]))
    """

    def __init__(self, config: DinoV2Config | None = None) -> None:
        super().__init__()
        config = config or DinoV2Config()
        self.config = config
        self.patch_embed = _PatchEmbed(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + config.grid**2, config.dim))
        self.blocks = nn.ModuleList(_Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.dim, eps=1e-6)
        self.head = SaliencyHead(config.dim, config.head_channels)

    def forward(self, images: Tensor) -> Features:
        """Compute features.

        Args:
            images: `(b, 3, H, W)`, normalised as for ImageNet (see `pictures.image_batch`); H and W
                multiples of the patch.

        Raises:
            ValueError: The shape does not fit.
        """
        tokens, h, w = self._embed(images)
        for block in self.blocks:
            tokens = block(tokens)
        tokens = self.norm(tokens)
        return Features(cls=tokens[:, 0], patches=tokens[:, 1:].unflatten(1, (h, w)))

    def saliency(self, images: Tensor) -> Tensor:
        """Tell how much each pixel belongs to what the image shows.

        Args:
            images: As for `forward`.

        Returns:
            `(b, 1, H, W)`, 0 to 1, float32.
        """
        return self.saliency_of(self(images), size=(images.shape[2], images.shape[3]))

    def saliency_of(self, features: Features, *, size: tuple[int, int]) -> Tensor:
        """The saliency of features computed before: one pass of the transformer for both.

        Args:
            features: Of `forward`.
            size: Height and width of the map in pixels.

        Returns:
            `(b, 1, *size)`, 0 to 1, float32.
        """
        logits = self.head(features.patches.permute(0, 3, 1, 2))
        return F.interpolate(logits.float(), size=size, mode="bilinear").sigmoid()

    def position_table(self, h: int, w: int) -> Tensor:
        """Resample the positions to `h x w` patches: `(1, 1 + h w, d)`, the class token's first.

        Bicubic and without antialiasing, as the published weights were used with their head; timm
        antialiases.
        """
        grid = self.config.grid
        if (h, w) == (grid, grid):
            return self.pos_embed
        first, rest = self.pos_embed[:, :1], self.pos_embed[:, 1:]
        table = rest.float().transpose(1, 2).unflatten(2, (grid, grid))
        table = F.interpolate(table, size=(h, w), mode="bicubic", align_corners=False)
        return torch.cat([first, table.flatten(2).transpose(1, 2).to(first.dtype)], dim=1)

    def _embed(self, images: Tensor) -> tuple[Tensor, int, int]:
        patch = self.config.patch
        if images.dim() != 4 or images.shape[1] != 3:
            raise ValueError(f"images are {tuple(images.shape)}; they must be (b, 3, H, W)")
        height, width = images.shape[2], images.shape[3]
        if height % patch or width % patch or not height * width:
            raise ValueError(
                f"images are {height} x {width}; both sides must be multiples of {patch} pixels"
            )
        h, w = height // patch, width // patch
        tokens = self.patch_embed(images)
        first = self.cls_token.expand(len(tokens), -1, -1)
        return torch.cat([first, tokens], dim=1) + self.position_table(h, w), h, w


class _PatchEmbed(nn.Module):
    def __init__(self, config: DinoV2Config) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, config.dim, config.patch, stride=config.patch)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)


class _Block(nn.Module):
    def __init__(self, config: DinoV2Config) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.dim, eps=1e-6)
        self.attn = _Attention(config)
        self.ls1 = _LayerScale(config.dim)
        self.norm2 = nn.LayerNorm(config.dim, eps=1e-6)
        self.mlp = _Mlp(config)
        self.ls2 = _LayerScale(config.dim)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.ls1(self.attn(self.norm1(tokens)))
        return tokens + self.ls2(self.mlp(self.norm2(tokens)))


class _Attention(nn.Module):
    def __init__(self, config: DinoV2Config) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.dim, 3 * config.dim)
        self.proj = nn.Linear(config.dim, config.dim)

    def forward(self, tokens: Tensor) -> Tensor:
        b, n, d = tokens.shape
        qkv = self.qkv(tokens).view(b, n, 3, self.heads, d // self.heads)
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
        out = attention(q, k, v)
        return self.proj(out.transpose(1, 2).reshape(b, n, d))


class _LayerScale(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens * self.gamma


class _Mlp(nn.Module):
    def __init__(self, config: DinoV2Config) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.dim, 4 * config.dim)
        self.fc2 = nn.Linear(4 * config.dim, config.dim)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(tokens)))


def load_dinov2(
    *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> DinoV2:
    """Return the real network, frozen, from the fetched asset.

    Raises:
        AssetError: The asset has not been fetched; the message says how to.
    """
    folder = asset_folder(ASSET)
    with torch.device("meta"):
        model = DinoV2()
    load_into(model, read_weights(folder, dtype=dtype), source=str(folder))
    return model.eval().requires_grad_(False).to(resolve_device(device))
