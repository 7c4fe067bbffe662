"""Shapes of the networks, as saved beside their weights. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass

from polyzoo.core.errors import ConfigError

TRAIN_STEPS = 1000
"""Diffusion steps of the schedule."""
BETA_START, BETA_END = 1e-4, 2e-2
"""Ends of the linear schedule of betas; not Stable Diffusion's scaled-linear one."""
LATENT_SCALE = 0.18215
"""Factor from a posterior of the autoencoder to a latent."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PixArtConfig:
    """Shape of a PixArt transformer, with the field names of its diffusers configuration."""

    sample_size: int = 128
    """Side of the latent it was made for: image side over the autoencoder's factor."""
    patch_size: int = 2
    """Side of a token in latent pixels."""
    in_channels: int = 4
    """Channels of a latent."""
    out_channels: int = 8
    """Noise prediction, then as many channels of variance interpolation."""
    num_layers: int = 28
    """Blocks."""
    num_attention_heads: int = 16
    """Heads of both attentions."""
    attention_head_dim: int = 72
    """Channels of a head; with the heads it makes the width."""
    caption_channels: int = 4096
    """Channels of the text encoder's states."""
    caption_length: int = 120
    """Most tokens of a caption."""
    mlp_ratio: float = 4.0
    """Inner width of the feed-forward layer over the width."""
    interpolation_scale: float | None = None
    """Divides positions; by default the latent side over 64, at least 1."""
    use_additional_conditions: bool | None = None
    """Whether size and aspect ratio are conditions, and any size is drawn (MS models); by default
    only for sample_size 128."""

    def __post_init__(self) -> None:
        """Check the relations between fields."""
        for name in (
            "sample_size", "patch_size", "in_channels", "num_layers", "num_attention_heads",
            "attention_head_dim", "caption_channels", "caption_length",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
        if self.out_channels not in (self.in_channels, 2 * self.in_channels):
            raise ConfigError(
                f"out_channels={self.out_channels} must be in_channels={self.in_channels}, or "
                "twice that where the variance is learned"
            )
        if self.sample_size % self.patch_size:
            raise ConfigError(
                f"sample_size={self.sample_size} must be a multiple of patch_size={self.patch_size}"
            )
        if self.width % 4:
            raise ConfigError(
                f"width {self.width} (num_attention_heads={self.num_attention_heads} times "
                f"attention_head_dim={self.attention_head_dim}) must be divisible by 4: the "
                "position embedding has sine and cosine of rows and columns"
            )
        if self.multi_scale and self.width % 3:
            raise ConfigError(
                f"width {self.width} must be divisible by 3 with size conditions: height, width "
                "and aspect ratio share it; choose other heads, or "
                "use_additional_conditions=False"
            )
        if self.interpolation_scale is not None and not self.interpolation_scale > 0:
            raise ConfigError(f"interpolation_scale={self.interpolation_scale} must be above 0")

    @property
    def width(self) -> int:
        """Channels of a token."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def hidden(self) -> int:
        """Inner width of the feed-forward layer."""
        return int(self.width * self.mlp_ratio)

    @property
    def multi_scale(self) -> bool:
        """Whether size and aspect ratio are conditions."""
        if self.use_additional_conditions is None:
            return self.sample_size == 128
        return self.use_additional_conditions

    @property
    def position_scale(self) -> float:
        """Divisor of positions."""
        if self.interpolation_scale is None:
            return float(max(self.sample_size // 64, 1))
        return self.interpolation_scale

    @property
    def base_size(self) -> int:
        """Tokens along a side of the latent it was made for."""
        return self.sample_size // self.patch_size

    @property
    def learns_variance(self) -> bool:
        """Whether the second half of the output interpolates the variance."""
        return self.out_channels == 2 * self.in_channels


@dataclass(frozen=True, kw_only=True, slots=True)
class ControlConfig:
    """Shape of a control branch: how many of the transformer's first blocks are copied."""

    num_blocks: int = 13
    """Copied blocks; at least one block of the transformer must stay after them."""

    def __post_init__(self) -> None:
        if self.num_blocks < 1:
            raise ConfigError(f"num_blocks={self.num_blocks} must be at least 1")

    def check(self, transformer: PixArtConfig) -> None:
        """Refuse more copies than the transformer has room for."""
        if self.num_blocks >= transformer.num_layers:
            raise ConfigError(
                f"num_blocks={self.num_blocks} (copy_blocks) must be below the transformer's "
                f"num_layers={transformer.num_layers}: copy j adds to block j + 1"
            )


def xl(size: int, *, conditions: bool | None = None) -> PixArtConfig:
    """Shape of the published PixArt-XL/2 for images of 256, 512 or 1024 pixels.

    Args:
        size: Image side.
        conditions: Size conditions; by default only the 1024 model has them.
    """
    if size not in (256, 512, 1024):
        raise ConfigError(f"size={size} must be 256, 512 or 1024")
    return PixArtConfig(
        sample_size=size // 8,
        use_additional_conditions=size == 1024 if conditions is None else conditions,
    )
