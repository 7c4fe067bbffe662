"""Shape of a SEED tokenizer, saved beside its weights as config.json. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from polyzoo.core.errors import ConfigError

Tower = Literal["eva", "dinov2"]
Resample = Literal["bicubic", "bilinear"]
HeadKind = Literal["mlp", "reverse"]
Target = Literal["image", "text"]

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True, slots=True)
class PreprocessConfig:
    """From a picture to what the tower sees; the codes depend on every field."""

    resample: Resample = "bicubic"
    """Filter of the resize to a square; bilinear gives other codes for the same picture."""
    mean: tuple[float, float, float] = CLIP_MEAN
    """Subtracted from red, green, blue in 0 to 1."""
    std: tuple[float, float, float] = CLIP_STD
    """Divides them afterwards."""

    def __post_init__(self) -> None:
        """Check ranges."""
        if min(self.std) <= 0:
            raise ConfigError(f"std={self.std} must be above 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class VisionConfig:
    """The image tower. Defaults: EVA-CLIP-g without its last block, as in the paper."""

    kind: Tower = "eva"
    """eva: ours to train and store, of any size; dinov2: the frozen asset dinov2-small."""
    image_size: int = 224
    """Side of the square the picture is resized to, in pixels."""
    patch_size: int = 14
    """Side of a patch; divides image_size."""
    width: int = 1408
    """Channels of a token."""
    depth: int = 39
    """Blocks."""
    heads: int = 16
    """Attention heads; divides width."""
    mlp_hidden: int = 6144
    """Inner width of the feed-forward layers."""
    norm_eps: float = 1e-6
    """Of the blocks' layer norms."""

    def __post_init__(self) -> None:
        """Check the relations between fields."""
        _divides("patch_size", self.patch_size, "image_size", self.image_size)
        _divides("heads", self.heads, "width", self.width)
        _positive(self, "depth", "mlp_hidden")
        if self.kind == "dinov2" and (self.width, self.patch_size) != (384, 14):
            raise ConfigError(
                f"vision.kind='dinov2' has width 384 and patches of 14, not {self.width} and "
                f"{self.patch_size}"
            )

    @property
    def tokens(self) -> int:
        """Patches and the class token."""
        return (self.image_size // self.patch_size) ** 2 + 1


@dataclass(frozen=True, kw_only=True, slots=True)
class QFormerConfig:
    """A BERT body with queries. Defaults: the causal Q-Former of the paper."""

    width: int = 768
    """Channels."""
    layers: int = 12
    """Layers; every second one, from the first, looks at the image."""
    heads: int = 12
    """Attention heads; divides width."""
    ffn: int = 3072
    """Inner width of the feed-forward layers."""
    cross_every: int = 2
    """Cross-attention in layers 0, cross_every, 2 * cross_every ..."""
    dropout: float = 0.1
    """Of hidden states and attention, while training."""
    norm_eps: float = 1e-12
    """Of the layer norms."""
    vocabulary: int = 0
    """Word pieces of the text branch; 0 leaves the branch out."""
    max_text: int = 512
    """Positions of the text branch."""

    def __post_init__(self) -> None:
        """Check the relations between fields."""
        _divides("heads", self.heads, "width", self.width)
        _positive(self, "layers", "ffn", "cross_every", "max_text")
        if self.vocabulary < 0:
            raise ConfigError(f"vocabulary={self.vocabulary} must not be negative")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout={self.dropout} must lie in [0, 1)")


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadConfig:
    """From codes to what the image generator is conditioned on."""

    kind: HeadKind = "mlp"
    """mlp: SEED-2's public weights; reverse: queries that look at the decoded codes."""
    target: Target = "image"
    """image: one embedding of the picture (v2); text: features of its caption (v1)."""
    dim: int = 1024
    """Channels of the target: 1024 for CLIP ViT-H, 768 for Stable Diffusion's text features."""
    queries: int = 1
    """Vectors a reverse head gives: 1 for an image embedding, 77 for text features."""
    layers: int = 4
    """Layers of the reverse Q-Former."""
    ffn: int = 3072
    """Inner width of its feed-forward layers."""
    mlp: tuple[int, int, int] = (256, 128, 32)
    """Widths of the mlp head; the last, times the codes, enters the projection."""

    def __post_init__(self) -> None:
        """Check the relations between fields."""
        _positive(self, "dim", "queries", "layers", "ffn")
        if self.kind == "mlp" and self.queries != 1:
            raise ConfigError(f"head.queries={self.queries}: an mlp head gives one vector; set 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class SeedConfig:
    """A SEED tokenizer. The default is SEED-2, the one with public weights.

    Example:
        >>> SeedConfig().tokens_per_image
        32
    """

    vision: VisionConfig = field(default_factory=VisionConfig)
    """Image tower."""
    qformer: QFormerConfig = field(default_factory=QFormerConfig)
    """From the tower's tokens to causal embeddings."""
    head: HeadConfig = field(default_factory=HeadConfig)
    """From codes to the generator's condition."""
    preprocess: PreprocessConfig = field(default_factory=PreprocessConfig)
    """From pictures to tensors."""
    tokens_per_image: int = 32
    """Queries, and so codes, of an image."""
    causal: bool = True
    """Code i depends on nothing after it; the reference ties this to there being 32 queries."""
    codes: int = 8192
    """Entries of the codebook."""
    code_dim: int = 32
    """Channels of an entry."""
    decode_depth: int = 4
    """Blocks in each of the two stacks behind the codebook."""
    decode_heads: int = 12
    """Their attention heads; divides qformer.width."""
    reconstructs: bool = True
    """Keep the stack that gives causal embeddings back; v1's inference files lack it."""
    contrast_dim: int = 0
    """Channels of the space where images meet captions (stage 1); 0 leaves it out."""

    def __post_init__(self) -> None:
        """Check the relations between fields."""
        _positive(self, "tokens_per_image", "codes", "code_dim", "decode_depth")
        _divides("decode_heads", self.decode_heads, "qformer.width", self.qformer.width)
        if self.codes > 65536:
            raise ConfigError(f"codes={self.codes}: at most 65536, as records hold 16 bits a code")
        if self.contrast_dim < 0:
            raise ConfigError(f"contrast_dim={self.contrast_dim} must not be negative")

    def require_causal(self) -> None:
        """Refuse a tokenizer whose codes could not be predicted from left to right.

        Raises:
            ConfigError: `causal` is off.
        """
        if not self.causal:
            raise ConfigError(
                "causal=False: codes then depend on later ones, and a language model cannot "
                "predict them from left to right; set causal=True and train again"
            )


def v1() -> SeedConfig:
    """SEED of the first paper: 77 text features, for Stable Diffusion 1.4."""
    return SeedConfig(head=HeadConfig(kind="reverse", target="text", dim=768, queries=77))


def v2() -> SeedConfig:
    """SEED-2: one image embedding, for unCLIP."""
    return SeedConfig()


def _divides(small_name: str, small: int, large_name: str, large: int) -> None:
    if small < 1 or large < 1 or large % small:
        raise ConfigError(f"{small_name}={small} must divide {large_name}={large}")


def _positive(owner: object, *names: str) -> None:
    for name in names:
        if getattr(owner, name) < 1:
            raise ConfigError(f"{name}={getattr(owner, name)} must be at least 1")
