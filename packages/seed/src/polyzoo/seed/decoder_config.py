"""Shape of our small picture decoder. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass

from polyzoo.core.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoderConfig:
    """Shape of the U-Net."""

    size: int = 64
    """Side of the picture; a multiple of 8."""
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
        if any(width % 16 for width in self.widths):
            raise ConfigError(f"widths={self.widths} must be multiples of 16")
        if self.embedding % 2:
            raise ConfigError(f"embedding={self.embedding} must be even")
