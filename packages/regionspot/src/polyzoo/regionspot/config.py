"""Shapes of RegionSpot models, saved beside the weights as config.json. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from polyzoo.core.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class SamConfig:
    """Shape of a Segment Anything model, as `segment_anything` builds it; ViT-B by default."""

    image_size: int = 1024
    """Side of the square the padded image fills, in pixels."""
    patch_size: int = 16
    """Side of a patch."""
    width: int = 768
    """Channels of the image encoder."""
    depth: int = 12
    """Its blocks."""
    heads: int = 12
    """Its attention heads."""
    window: int = 14
    """Side of an attention window, in patches."""
    global_layers: tuple[int, ...] = (2, 5, 8, 11)
    """Blocks that see the whole image."""
    prompt_dim: int = 256
    """Channels of prompts, image embedding and mask tokens."""
    decoder_depth: int = 2
    """Two-way blocks of the mask decoder."""
    decoder_heads: int = 8
    """Heads of the mask decoder."""
    decoder_mlp: int = 2048
    """Hidden channels of its MLPs."""
    mask_channels: int = 16
    """Channels of the mask-prompt encoder."""
    iou_hidden: int = 256
    """Hidden channels of the quality head."""

    def __post_init__(self) -> None:
        """Check the relations between fields."""
        if self.image_size % self.patch_size:
            raise ConfigError(
                f"patch_size={self.patch_size} must divide image_size={self.image_size}"
            )
        if self.width % self.heads:
            raise ConfigError(f"heads={self.heads} must divide width={self.width}")
        if any(not 0 <= layer < self.depth for layer in self.global_layers):
            raise ConfigError(
                f"global_layers={self.global_layers} must lie in 0 to {self.depth - 1} (depth - 1)"
            )

    @property
    def grid(self) -> int:
        """Patches along a side."""
        return self.image_size // self.patch_size


SAMS: dict[str, SamConfig] = {
    "vit_b": SamConfig(),
    "vit_l": SamConfig(width=1024, depth=24, heads=16, global_layers=(5, 11, 17, 23)),
    "vit_h": SamConfig(width=1280, depth=32, heads=16, global_layers=(7, 15, 23, 31)),
}
"""The published sizes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipShape:
    """Shape of a CLIP model that is not among open_clip's names, such as a tiny one."""

    image_size: int = 28
    """Side of the square input, in pixels."""
    patch_size: int = 7
    """Side of a patch."""
    vision_width: int = 64
    """Channels of the image tower."""
    vision_layers: int = 2
    """Its blocks."""
    text_width: int = 64
    """Channels of the text tower."""
    text_layers: int = 2
    """Its blocks."""
    embed_dim: int = 24
    """Channels of the common space."""
    context_length: int = 77
    """Tokens of a text."""
    vocab_size: int = 49408
    """Tokens there are."""
    quick_gelu: bool = True
    """Whether activations are x * sigmoid(1.702 x), as in OpenAI's weights."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipConfig:
    """Which CLIP names the regions."""

    name: str = "ViT-L-14-quickgelu"
    """Model name of open_clip; ignored where shape is given."""
    image_size: int | None = None
    """Side of the input; the model's own where not given."""
    shape: ClipShape | None = None
    """A model outside open_clip's list."""


@dataclass(frozen=True, kw_only=True, slots=True)
class IntegrationConfig:
    """Shape of the trained part: 60 tensors with the published three layers."""

    heads: int = 8
    """Attention heads; must divide the width of CLIP's image tower."""
    layers: int = 3
    """Decoder layers."""
    mlp: int = 2048
    """Hidden channels of a layer's MLP."""
    dropout: float = 0.1
    """Of attention weights and of every residual branch, in training."""

    def __post_init__(self) -> None:
        """Check ranges."""
        for name in ("heads", "layers", "mlp"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout={self.dropout} must lie in [0, 1)")


@dataclass(frozen=True, kw_only=True, slots=True)
class RegionSpotConfig:
    """Shape of a RegionSpot model on SAM and CLIP."""

    sam: SamConfig = field(default_factory=SamConfig)
    """Where regions are."""
    clip: ClipConfig = field(default_factory=ClipConfig)
    """What they are called."""
    integration: IntegrationConfig = field(default_factory=IntegrationConfig)
    """The trained module between them."""
    clip_antialias: bool = False
    """Antialias when the image is squashed for CLIP; off as in the published training."""


BoxFormat = Literal["xyxy", "xywh", "xyxyn"]
OnInvalid = Literal["error", "drop"]
Names = Literal["readable", "official"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SceneSpotConfig:
    """Shape of the model that polyzoo trained and ships: RegionSpot on small towers."""

    side: int = 448
    """Longer side of the image the tower sees, in pixels; a multiple of 32."""
    pyramid: int = 48
    """Channels of the map at a stride of 8 that finds and outlines regions."""
    width: int = 128
    """Channels of the integration module."""
    text_dim: int = 192
    """Channels of the text space."""
    heads: int = 4
    """Attention heads of the integration module."""
    layers: int = 2
    """Its layers."""
    mlp: int = 256
    """Hidden channels of its MLPs."""
    dropout: float = 0.1
    """As in IntegrationConfig."""
    mask_dim: int = 16
    """Channels in which a region's token meets the pixels to give a mask."""
    temperature: float = 1.5
    """Divides the classifier's logits before its class names are averaged."""
    scale: float = 20.0
    """Multiplies the cosine between regions and names."""

    def __post_init__(self) -> None:
        """Check the relations between fields."""
        if self.side % 32 or self.side < 64:
            raise ConfigError(f"side={self.side} must be a multiple of 32, at least 64")
        if self.width % self.heads:
            raise ConfigError(f"heads={self.heads} must divide width={self.width}")
