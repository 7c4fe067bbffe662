"""A picture decoder of one pass: where there is ink, and in which colour.

It predicts coverage on a grid of half the picture's side and colour on one of a quarter, both
smooth, and lays the one on white through the other. The picture is the mean of all that the codes
allow, so its inside is soft; its outline is made crisp by sharpening the coverage.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polyzoo.core.errors import ConfigError
from polyzoo.seed.decoder_config import DecoderConfig


class SketchDecoder(nn.Module):
    """From code vectors (b, n, d) to a picture (b, 3, S, S) in 0 to 1.

    Example:
        >>> config = DecoderConfig(kind="sketch", tokens=16, context_width=128)
        >>> SketchDecoder(config)(torch.zeros(2, 16, 128)).shape
        torch.Size([2, 3, 64, 64])
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        inside, hidden = config.tokens * config.context_width, config.hidden
        self.ink, self.paint = config.size // 2, config.size // 4
        self.enter = nn.Linear(inside, hidden)
        self.norm = nn.LayerNorm(hidden)
        self.middle = nn.Sequential(nn.GELU(), nn.Linear(hidden, hidden), nn.GELU())
        self.coverage = nn.Linear(hidden, self.ink**2)
        self.colour = nn.Linear(hidden, 3 * self.paint**2)

    def forward(self, context: Tensor, *, sharpness: float = 1.0) -> Tensor:
        """Draw.

        Args:
            context: (b, n, d) code vectors.
            sharpness: Factor of the coverage's logits.
        """
        h = self.norm(self.enter(context.flatten(1)))
        h = h + self.middle(h)
        ink = self.coverage(h).view(-1, 1, self.ink, self.ink)
        paint = self.colour(h).view(-1, 3, self.paint, self.paint).sigmoid()
        size = (self.config.size, self.config.size)
        ink = F.interpolate(ink, size=size, mode="bicubic", align_corners=False)
        paint = F.interpolate(paint, size=size, mode="bilinear", align_corners=False)
        alpha = (sharpness * ink).sigmoid()
        return 1 - alpha * (1 - paint)


def sketch_loss(decoder: nn.Module, pictures: Tensor, context: Tensor) -> Tensor:
    """Mean absolute error of pictures (b, 3, S, S) in 0 to 1."""
    return F.l1_loss(decoder(context).float(), pictures.float())


@torch.no_grad()
def sketch(decoder: SketchDecoder, context: Tensor, *, sharpness: float | None = None) -> Tensor:
    """Return pictures (b, 3, S, S) in 0 to 1; nothing is drawn at random.

    Raises:
        ConfigError: The sharpness is not above 0.
    """
    sharpness = decoder.config.sharpness if sharpness is None else sharpness
    if not sharpness > 0:
        raise ConfigError(f"guidance={sharpness} is a sketch's sharpness and must be above 0")
    return decoder(context, sharpness=sharpness).clamp(0, 1)
