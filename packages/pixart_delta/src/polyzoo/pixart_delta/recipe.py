"""Options of the objectives. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from polyzoo.core.errors import ConfigError

Null = Literal["learned", "empty"]


@dataclass(frozen=True, kw_only=True, slots=True)
class NoiseRecipe:
    """The objective of ordinary and ControlNet training."""

    caption_dropout: float = 0.1
    """Share of captions replaced by the null caption."""
    null: Null = "learned"
    """learned: a fixed random vector sequence under the caption's own mask, as published; empty:
    the encoding of the empty prompt."""
    snr_loss: bool = False
    """Compare noise above step 249 and clean latents below."""

    def __post_init__(self) -> None:
        """Check ranges."""
        _share("caption_dropout", self.caption_dropout)


@dataclass(frozen=True, kw_only=True, slots=True)
class LcmRecipe:
    """Consistency distillation."""

    guidance: float = 4.5
    """w of the teacher: ordinary guidance of scale 1 + w."""
    grid_steps: int = 50
    """Points between which the teacher's solver goes."""
    loss: Literal["huber", "l2"] = "huber"
    """Distance of two predictions."""
    huber_c: float = 0.001
    """Where the Huber distance turns from square to absolute."""
    ema_decay: float = 0.95
    """Of the target network; adapters have none and are their own target."""
    caption_dropout: float = 0.0
    """Share of the student's captions replaced by the null caption."""
    null: Null = "learned"
    """The teacher's unconditional caption; see NoiseRecipe."""

    def __post_init__(self) -> None:
        """Check ranges."""
        _share("caption_dropout", self.caption_dropout)
        if not 0 <= self.ema_decay < 1:
            raise ConfigError(f"ema_decay={self.ema_decay} must lie in [0, 1)")
        if self.guidance < 0:
            raise ConfigError(f"guidance={self.guidance} must not be negative")
        if not self.huber_c > 0:
            raise ConfigError(f"huber_c={self.huber_c} must be above 0")
        if not 1 <= self.grid_steps <= 1000 or 1000 % self.grid_steps:
            raise ConfigError(f"grid_steps={self.grid_steps} must divide 1000")


@dataclass(frozen=True, kw_only=True, slots=True)
class VaeRecipe:
    """The objective of the small autoencoder."""

    edges: float = 1.0
    """Weight of the differences between neighbouring pixels."""
    coarse: float = 1.0
    """Weight of the errors of 4 x 4 and 8 x 8 means: the colours."""
    kl: float = 3e-5
    """Weight of the divergence from the normal distribution, per latent value."""

    def __post_init__(self) -> None:
        """Check ranges."""
        for name in ("edges", "coarse", "kl"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}={getattr(self, name)} must not be negative")


def _share(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ConfigError(f"{name}={value} must be between 0 and 1")
