"""The part that is trained: region tokens read the semantic feature map (paper, section 3.2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polyzoo.attention import attention
from polyzoo.regionspot.config import IntegrationConfig


class PackedAttention(nn.Module):
    """Attention with torch's packed parameter names: q, k and v rows of `in_proj_weight`."""

    def __init__(self, dim: int, heads: int, *, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(
        self, x: Tensor, memory: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Attend from `(b, n, d)` to the memory `(b, m, d)`, or to itself.

        Args:
            x: Queries.
            memory: Keys and values; the queries themselves where not given.
            mask: bool `(b, 1, 1, m)`, True attends.
        """
        dim = x.shape[-1]
        if memory is None:
            q, k, v = F.linear(x, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
        else:
            q = F.linear(x, self.in_proj_weight[:dim], self.in_proj_bias[:dim])
            both = F.linear(memory, self.in_proj_weight[dim:], self.in_proj_bias[dim:])
            k, v = both.chunk(2, -1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        dropout = self.dropout if self.training else 0.0
        out = attention(q, k, v, mask=mask, dropout=dropout)
        return self.out_proj(out.transpose(1, 2).flatten(2))


class DecoderLayer(nn.Module):
    """Self-attention over boxes, cross-attention into the map, MLP; each followed by a norm."""

    def __init__(self, dim: int, config: IntegrationConfig) -> None:
        super().__init__()
        self.self_attn = PackedAttention(dim, config.heads, dropout=config.dropout)
        self.multihead_attn = PackedAttention(dim, config.heads, dropout=config.dropout)
        self.linear1 = nn.Linear(dim, config.mlp)
        self.linear2 = nn.Linear(config.mlp, dim)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor | None) -> Tensor:
        """Return the boxes' next states."""
        drop = self.dropout
        x = self.norm1(x + drop(self.self_attn(x, mask=mask)))
        x = self.norm2(x + drop(self.multihead_attn(x, memory)))
        return self.norm3(x + drop(self.linear2(drop(self.linear1(x).relu()))))


class Decoder(nn.Module):
    """The layers and the last norm; key names as in `torch.nn.TransformerDecoder`."""

    def __init__(self, dim: int, config: IntegrationConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(dim, config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the boxes' last states."""
        for layer in self.layers:
            x = layer(x, memory, mask)
        return self.norm(x)


class Integration(nn.Module):
    """From position-aware tokens and a semantic map to one embedding per region.

    Boxes of an image see each other: what one is called depends on the set, though not on its
    order.

    Example:
        >>> module = Integration(256, 1024, 768, IntegrationConfig())
        >>> module(torch.randn(1, 5, 256), torch.randn(1, 257, 1024)).shape
        torch.Size([1, 5, 768])
    """

    def __init__(
        self, token_dim: int, width: int, text_dim: int, config: IntegrationConfig
    ) -> None:
        """Build it with random weights.

        Args:
            token_dim: Channels of a region token (256 in SAM).
            width: Channels of the semantic map.
            text_dim: Channels of the text space.
            config: The rest of the shape.
        """
        super().__init__()
        if width % config.heads:
            raise ValueError(f"heads={config.heads} must divide the map's width {width}")
        self.to_clip = nn.Linear(token_dim, width)
        self.decoder = Decoder(width, config)
        self.projector = nn.Linear(width, text_dim)

    def forward(self, tokens: Tensor, memory: Tensor, present: Tensor | None = None) -> Tensor:
        """Return region embeddings, not normalised.

        Args:
            tokens: `(b, k, token_dim)`; images with fewer boxes are padded.
            memory: `(b, m, width)`, the class token included.
            present: bool `(b, k)`, False where a row is padding; what real boxes give does not
                depend on it. Padded rows come out as zeros.

        Returns:
            `(b, k, text_dim)`.
        """
        mask = None
        if present is not None:
            mask = present[:, None, None, :]
            tokens = tokens.masked_fill(~present[..., None], 0)
        embeddings = self.projector(self.decoder(self.to_clip(tokens), memory, mask))
        return embeddings if present is None else embeddings.masked_fill(~present[..., None], 0)

    def independent(self, tokens: Tensor, memory: Tensor) -> Tensor:
        """Embed every box as if it were the image's only one; trained weights did not learn so."""
        b, k = tokens.shape[:2]
        alone = tokens.reshape(b * k, 1, -1)
        return self(alone, memory.repeat_interleave(k, 0)).reshape(b, k, -1)


def region_logits(embeddings: Tensor, classes: Tensor, scale: float | Tensor) -> Tensor:
    """Scaled cosine between regions `(..., k, t)` and unit class vectors `(c, t)`, in fp32."""
    with torch.autocast(embeddings.device.type, enabled=False):
        regions = embeddings.float()
        unit = regions / (regions.norm(dim=-1, keepdim=True) + 1e-7)
        return scale * unit @ classes.float().T
