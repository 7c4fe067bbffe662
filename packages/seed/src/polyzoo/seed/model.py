"""The SEED tokenizer: image -> causal embeddings -> codes -> condition of an image generator."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polyzoo.core.errors import ConfigError
from polyzoo.seed.blocks import BlockStack
from polyzoo.seed.config import SeedConfig
from polyzoo.seed.heads import MlpHead, ReverseHead
from polyzoo.seed.qformer import QFormer
from polyzoo.seed.quantizer import Quantized, Quantizer
from polyzoo.seed.vision import EvaVit


class Decoded(NamedTuple):
    """What codes say."""

    vectors: Tensor
    """(b, n, w): codebook entries at the Q-Former's width."""
    causal: Tensor | None
    """(b, n, w): causal embeddings, reconstructed; None where the config says so."""
    condition: Tensor
    """(b, dim) or (b, queries, dim): what the image generator is given."""


class ContrastHead(nn.Module):
    """Where images meet captions: two projections and a learned temperature (stage 1)."""

    def __init__(self, width: int, dim: int) -> None:
        super().__init__()
        self.image = nn.Linear(width, dim)
        self.text = nn.Linear(width, dim)
        self.temperature = nn.Parameter(torch.tensor(0.07))


class SeedModel(nn.Module):
    """Everything between pixels and codes, and between codes and the generator's condition.

    A tower that is an asset (`vision.kind="dinov2"`) is no part of the weights: hand it to
    `use_tower` before images go in.

    Example:
        >>> model = SeedModel(config).eval()
        >>> codes = model.encode(pixels)  # (b, tokens_per_image)
        >>> condition = model.decode(codes).condition
    """

    def __init__(self, config: SeedConfig) -> None:
        super().__init__()
        self.config = config
        width = config.qformer.width
        self.vision = EvaVit(config.vision) if config.vision.kind == "eva" else None
        self.vision_norm = nn.LayerNorm(config.vision.width, eps=1e-5)
        self.queries = nn.Parameter(torch.randn(1, config.tokens_per_image, width) * 0.02)
        self.qformer = QFormer(config.qformer, context_width=config.vision.width)
        self.contrast = ContrastHead(width, config.contrast_dim) if config.contrast_dim else None
        self.to_code = nn.Sequential(
            nn.Linear(width, width), nn.Tanh(), nn.Linear(width, config.code_dim)
        )
        self.quantizer = Quantizer(config.codes, config.code_dim)
        self.from_code = nn.Sequential(
            nn.Linear(config.code_dim, config.code_dim),
            nn.Tanh(),
            nn.Linear(config.code_dim, width),
        )
        stack = {
            "tokens": config.tokens_per_image,
            "depth": config.decode_depth,
            "heads": config.decode_heads,
        }
        self.reconstruct = BlockStack(width, **stack) if config.reconstructs else None
        self.prepare_head = BlockStack(width, **stack)
        if config.head.kind == "mlp":
            self.head = MlpHead(width, tokens=config.tokens_per_image, config=config.head)
        else:
            self.head = ReverseHead(
                width,
                heads=config.qformer.heads,
                config=config.head,
                norm_eps=config.qformer.norm_eps,
            )
        self._tower: list[nn.Module] = []  # in a list: neither a submodule nor in the state dict

    def use_tower(self, tower: nn.Module) -> None:
        """Give the model its frozen tower: pixels (b, 3, H, W) to tokens (b, m, vision.width)."""
        if self.vision is not None:
            raise ConfigError(f"vision.kind={self.config.vision.kind!r}: the model has its tower")
        self._tower = [tower.eval()]

    def features(self, pixels: Tensor) -> Tensor:
        """Return the tower's tokens (b, m, vision.width), before the norm."""
        if self.vision is not None:
            return self.vision(pixels)
        if not self._tower:
            raise ConfigError(
                f"vision.kind={self.config.vision.kind!r}: the tower is an asset and not loaded; "
                "load the model with SeedPipeline.from_pretrained, or call use_tower"
            )
        with torch.no_grad():
            return self._tower[0](pixels).to(self.queries.dtype)

    def context(self, features: Tensor) -> Tensor:
        """Normalise the tower's tokens in fp32, as `ln_vision` does, and cast back."""
        with torch.autocast(features.device.type, enabled=False):
            norm = self.vision_norm
            out = F.layer_norm(
                features.float(),
                norm.normalized_shape,
                norm.weight.float(),
                norm.bias.float(),
                norm.eps,
            )
        return out.to(features.dtype)

    def embed(self, features: Tensor, *, hidden: list[Tensor] | None = None) -> Tensor:
        """Return causal embeddings (b, n, w) of the tower's tokens."""
        context = self.context(features)
        queries = self.queries.expand(len(context), -1, -1)
        return self.qformer(queries, context=context, causal=self.config.causal, hidden=hidden)

    def pre_quant(self, causal: Tensor) -> Tensor:
        """Return (b, n, code_dim) fp32: what the codebook is searched for."""
        with torch.autocast(causal.device.type, enabled=False):
            x = causal.float()
            for layer in self.to_code:
                if isinstance(layer, nn.Linear):
                    x = F.linear(x, layer.weight.float(), layer.bias.float())
                else:
                    x = layer(x)
        return x

    def quantise(self, causal: Tensor) -> Quantized:
        """Replace causal embeddings (b, n, w) by codebook entries."""
        return self.quantizer(self.pre_quant(causal))

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Return codes (b, n) of normalised pixels (b, 3, H, W)."""
        return self.quantizer.search(self.pre_quant(self.embed(self.features(pixels))))

    def decode(self, codes: Tensor) -> Decoded:
        """Return what codes (b, n) say.

        Raises:
            DataError: A code lies outside the codebook.
        """
        return self.decode_vectors(self.quantizer.lookup(codes))

    def decode_vectors(self, entries: Tensor) -> Decoded:
        """Return what codebook entries (b, n, code_dim) say; gradients pass."""
        vectors = self.from_code(entries.to(self.queries.dtype))
        causal = None if self.reconstruct is None else self.reconstruct(vectors)
        return Decoded(vectors, causal, self.head(self.prepare_head(vectors)))

    def context_of(self, codes: Tensor) -> Tensor:
        """Return (b, n, w) vectors of codes (b, n): what our small picture decoder looks at."""
        vectors = self.from_code(self.quantizer.lookup(codes).to(self.queries.dtype))
        return self.prepare_head(vectors)

    def image_vectors(self, causal: Tensor) -> Tensor:
        """Return (b, contrast_dim) unit vectors of images: their last causal embedding."""
        return F.normalize(self._contrast().image(causal[:, -1]), dim=-1)

    def text_vectors(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return (b, contrast_dim) unit vectors of captions: the text branch's first position."""
        return F.normalize(self._contrast().text(self.qformer.text(ids, mask)[:, 0]), dim=-1)

    def _contrast(self) -> ContrastHead:
        if self.contrast is None:
            raise ConfigError(
                "contrast_dim=0: this tokenizer has no projections of stage 1, so images and "
                "captions cannot be compared; keep them when stage 2 starts from stage 1"
            )
        return self.contrast
