"""Pre-norm transformer blocks: those of the EVA tower and those behind the codebook."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polyzoo.attention import attention


class FusedAttention(nn.Module):
    """Self-attention with one matrix for queries, keys and values.

    EVA's has separate biases for queries and values and none for keys (`key_bias=False`).
    """

    def __init__(self, width: int, *, heads: int, key_bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=key_bias)
        if not key_bias:
            self.q_bias = nn.Parameter(torch.zeros(width))
            self.v_bias = nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map (b, n, d) to (b, n, d)."""
        b, n, d = x.shape
        bias = self.qkv.bias
        if bias is None:
            bias = torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))
        qkv = F.linear(x, self.qkv.weight, bias).view(b, n, 3, self.heads, d // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(attention(q, k, v).transpose(1, 2).reshape(b, n, d))


class FeedForward(nn.Module):
    """Two linear layers with an exact GELU between."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., d) to (..., d)."""
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Attention and feed-forward, each behind a layer norm and beside a skip connection."""

    def __init__(
        self, width: int, *, heads: int, hidden: int, key_bias: bool = True, norm_eps: float = 1e-6
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=norm_eps)
        self.attn = FusedAttention(width, heads=heads, key_bias=key_bias)
        self.norm2 = nn.LayerNorm(width, eps=norm_eps)
        self.mlp = FeedForward(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """Map (b, n, d) to (b, n, d)."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class BlockStack(nn.Module):
    """A learned position table and blocks that see all positions; no norm behind the last."""

    def __init__(self, width: int, *, tokens: int, depth: int, heads: int) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.zeros(1, tokens, width))
        self.blocks = nn.ModuleList(
            Block(width, heads=heads, hidden=4 * width) for _ in range(depth)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (b, n, d) to (b, n, d)."""
        x = x + self.positions
        for block in self.blocks:
            x = block(x)
        return x
