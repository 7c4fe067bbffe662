"""SceneSpot: RegionSpot on one small frozen network, with proposals and masks of its own.

The frozen tower is EfficientNet-lite0 on the whole image, once. Pooled inside a box, its maps are
the region's token; its last map is the semantic memory; its classifier gives each box a mixture of
ImageNet names (ConSE). The trained integration module adds to that mixture what the mixture lacks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import roi_align

from polyzoo.regionspot import lite0
from polyzoo.regionspot.config import IntegrationConfig, SceneSpotConfig
from polyzoo.regionspot.integration import Integration

_POOL = 4
_FREQUENCIES = 4
_KEPT_CLASSES = 30


@dataclass(frozen=True)
class SceneMaps:
    """What the model knows about a batch of images before it is asked about boxes."""

    pyramid: lite0.Pyramid
    pixels: Tensor
    """`(b, pyramid, H / 8, W / 8)`."""
    saliency: Tensor
    """`(b, H / 8, W / 8)` logits: whether a pixel belongs to a thing."""
    memory: Tensor
    """`(b, m, width)`."""
    sides: Tensor
    """`(b, 4, H / 8, W / 8)`: distances to the sides of the thing there, in pixels of 8."""
    center: Tensor
    """`(b, H / 8, W / 8)` logits: whether it is the middle of a thing."""


@dataclass(frozen=True)
class SceneRegions:
    """What the model says about boxes."""

    embeddings: Tensor
    """`(b, k, text_dim)`, unit length."""
    masks: Tensor | None
    """`(b, k, r, r)` logits of a grid over each box, where they were asked for."""


class SceneSpot(nn.Module):
    """The frozen tower, the integration module, and the heads for masks and proposals.

    Example:
        >>> model = SceneSpot(SceneSpotConfig())
        >>> maps = model.maps(torch.rand(1, 3, 448, 320))
        >>> model.regions(maps, torch.tensor([[[0.1, 0.1, 0.6, 0.9]]])).embeddings.shape
        torch.Size([1, 1, 192])
    """

    def __init__(self, config: SceneSpotConfig) -> None:
        """Build it with random weights."""
        super().__init__()
        self.config = config
        width, pyramid = config.width, config.pyramid
        self.tower = lite0.Lite0()
        self.tower.requires_grad_(False)
        self.class_names = nn.Buffer(torch.zeros(lite0.CLASSES, config.text_dim))
        """Text vectors of the classifier's classes."""
        self.fine = nn.Conv2d(lite0.FINE_CHANNELS, pyramid, 1)
        self.middle = nn.Conv2d(lite0.MIDDLE_CHANNELS, pyramid, 1)
        self.coarse = nn.Conv2d(lite0.COARSE_CHANNELS, pyramid, 1)
        self.smooth = nn.Sequential(
            nn.Conv2d(pyramid, pyramid, 3, padding=1), nn.ReLU(),
            nn.Conv2d(pyramid, pyramid, 3, padding=1),
        )  # fmt: skip
        self.proposal = nn.Sequential(
            nn.Conv2d(pyramid, pyramid, 3, padding=1), nn.ReLU(), nn.Conv2d(pyramid, 6, 1)
        )
        self.memory = nn.Linear(lite0.COARSE_CHANNELS, width)
        token_dim = lite0.TOP_CHANNELS + pyramid * _POOL * _POOL + 4 * 2 * _FREQUENCIES
        self.integration = Integration(
            token_dim,
            width,
            config.text_dim,
            IntegrationConfig(
                heads=config.heads, layers=config.layers, mlp=config.mlp, dropout=config.dropout
            ),
        )
        self.mask_token = nn.Linear(token_dim, config.mask_dim + 1)
        self.mask_pixels = nn.Conv2d(pyramid, config.mask_dim, 1)
        self.name_weight = nn.Parameter(torch.tensor(1.0))
        # What is learned starts at nothing: the first answer is the classifier's mixture.
        nn.init.zeros_(self.integration.projector.weight)
        nn.init.zeros_(self.integration.projector.bias)
        self.tower.to(memory_format=torch.channels_last)

    def train(self, mode: bool = True) -> SceneSpot:
        """Set the mode; the frozen tower stays in evaluation mode."""
        super().train(mode)
        self.tower.eval()
        return self

    def maps(self, images: Tensor) -> SceneMaps:
        """Look at whole images once.

        Args:
            images: `(b, 3, H, W)` of 0..1, sides multiples of 32.
        """
        return self.read(self.look(images))

    @torch.no_grad()
    def look(self, images: Tensor) -> lite0.Pyramid:
        """Run the frozen tower."""
        return self.tower(images.contiguous(memory_format=torch.channels_last))

    def read(self, pyramid: lite0.Pyramid) -> SceneMaps:
        """Make the maps that are asked about boxes out of the frozen tower's."""
        size = pyramid.fine.shape[-2:]
        middle = F.interpolate(self.middle(pyramid.middle), size, mode="bilinear")
        coarse = F.interpolate(self.coarse(pyramid.coarse), size, mode="bilinear")
        pixels = self.fine(pyramid.fine) + middle + coarse
        pixels = pixels + self.smooth(pixels.relu())
        found = self.proposal(pixels.relu())
        memory = self.memory(pyramid.coarse.flatten(2).transpose(1, 2))
        height, width = pyramid.coarse.shape[-2:]
        memory = memory + _grid_positions(height, width, memory)
        return SceneMaps(
            pyramid=pyramid,
            pixels=pixels,
            saliency=found[:, 0],
            memory=memory,
            sides=found[:, 1:5].clamp(max=6).exp(),
            center=found[:, 5],
        )

    def regions(
        self,
        maps: SceneMaps,
        boxes: Tensor,
        present: Tensor | None = None,
        *,
        mask_size: int | None = None,
    ) -> SceneRegions:
        """Embed boxes.

        Args:
            maps: Of the images.
            boxes: `(b, k, 4)` corners as shares of width and height.
            present: bool `(b, k)`, False where a row is padding.
            mask_size: Side of a mask's grid over its box; no masks where not given.
        """
        average, tokens = self.tokens(maps, boxes)
        learned = self.integration(tokens, maps.memory, present)
        named = self.mixture(average)
        embeddings = F.normalize(self.name_weight * named + learned, dim=-1)
        masks = None
        if mask_size is not None:
            masks = self._masks(maps, boxes, tokens, mask_size)
        if present is not None:
            embeddings = embeddings.masked_fill(~present[..., None], 0)
        return SceneRegions(embeddings, masks)

    def tokens(self, maps: SceneMaps, boxes: Tensor) -> tuple[Tensor, Tensor]:
        """Return pooled top features `(b, k, 1280)` and region tokens `(b, k, token_dim)`."""
        average = self._pool(maps.pyramid.top, boxes, 5).mean((-2, -1))
        local = self._pool(maps.pixels, boxes, _POOL).flatten(2)
        return average, torch.cat([average, local, _box_features(boxes)], -1)

    def mixture(self, average: Tensor) -> Tensor:
        """ConSE: the mean of the likeliest classes' name vectors, unit length."""
        logits = self.tower.classifier(average) / self.config.temperature
        best, place = logits.softmax(-1).topk(_KEPT_CLASSES, -1)
        mean = (best[..., None] * self.class_names[place]).sum(-2)
        return F.normalize(mean, dim=-1)

    def _pool(self, picture: Tensor, boxes: Tensor, size: int) -> Tensor:
        b, k = boxes.shape[:2]
        height, width = picture.shape[-2:]
        scaled = boxes * boxes.new_tensor([width, height, width, height])
        with torch.autocast(picture.device.type, enabled=False):
            found = roi_align(
                picture.float(), list(scaled.float()), output_size=size, sampling_ratio=2,
                aligned=True,
            )  # fmt: skip
        return found.view(b, k, *found.shape[1:])

    def _masks(self, maps: SceneMaps, boxes: Tensor, tokens: Tensor, size: int) -> Tensor:
        pixels = self._pool(self.mask_pixels(maps.pixels.relu()), boxes, size)
        weights = self.mask_token(tokens)
        weight, bias = weights[..., :-1], weights[..., -1]
        return torch.einsum("bkchw,bkc->bkhw", pixels, weight) + bias[..., None, None]


def _box_features(boxes: Tensor) -> Tensor:
    """Sines and cosines of a box's middle and sides."""
    middle = (boxes[..., :2] + boxes[..., 2:]) / 2
    sides = boxes[..., 2:] - boxes[..., :2]
    return _waves(torch.cat([middle, sides], -1), _FREQUENCIES)


def _waves(values: Tensor, count: int) -> Tensor:
    factors = torch.pi * 2.0 ** torch.arange(count, device=values.device, dtype=values.dtype)
    angles = (values[..., None] * factors).flatten(-2)
    return torch.cat([angles.sin(), angles.cos()], -1)


def _grid_positions(height: int, width: int, like: Tensor) -> Tensor:
    """`(1, height * width, channels)` sines and cosines of the middle of each cell."""
    rows = (torch.arange(height, device=like.device, dtype=like.dtype) + 0.5) / height
    columns = (torch.arange(width, device=like.device, dtype=like.dtype) + 0.5) / width
    grid = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), -1).flatten(0, 1)
    return _waves(grid, like.shape[-1] // 4)[None]
