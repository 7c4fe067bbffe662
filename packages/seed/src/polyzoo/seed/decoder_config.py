"""Shape of our small picture decoders. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from polyzoo.core.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoderConfig:
    """Shape of a picture decoder: of the U-Net of a flow, or of a one-shot sketch."""

    kind: Literal["flow", "sketch"] = "flow"
    """flow: drawn from noise in steps, sharp, needs an hour of one GPU to train; sketch: the mean
    picture in one pass, soft inside and crisp at its outline, trained in minutes on a CPU."""
    size: int = 64
    """Side of the picture; a multiple of 8."""
    tokens: int = 16
    """Code vectors of an image; sketch only."""
    hidden: int = 384
    """Inner width; sketch only."""
    sharpness: float = 2.5
    """Factor of the coverage's logits when a sketch is drawn; 1 leaves outlines as soft as they
    are uncertain."""
    widths: tuple[int, int, int] = (48, 96, 160)
    """Channels at 1/2, 1/4 and 1/8 of the side; multiples of 16."""
    context_width: int = 768
    """Channels of the code vectors it looks at."""
    embedding: int = 128
    """Channels of the time and picture embedding; even."""
    steps: int = 24
    """Steps of a drawing where the caller names none."""
    guidance: float = 2.0
    """How far a drawing is pushed from the unconditional one; 1 is no push."""

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.size % 8:
            raise ConfigError(f"size={self.size} must be a multiple of 8")
        if self.tokens < 1 or self.hidden < 1 or not self.sharpness > 0:
            raise ConfigError(
                f"tokens={self.tokens} and hidden={self.hidden} must be at least 1, and "
                f"sharpness={self.sharpness} above 0"
            )
        if any(width % 16 for width in self.widths):
            raise ConfigError(f"widths={self.widths} must be multiples of 16")
        if self.embedding % 2:
            raise ConfigError(f"embedding={self.embedding} must be even")
