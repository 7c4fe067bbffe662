"""T5's encoder (v1.1): the text encoder of the published models, without padding."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polyzoo.attention import attention
from polyzoo.core.errors import WeightsError
from polyzoo.core.weights import load_into, read_weights
from polyzoo.pixart_delta.folders import finite, read_json


@dataclass(frozen=True, kw_only=True, slots=True)
class T5Config:
    """Shape of an encoder, under transformers' names; the defaults are T5-v1.1-XXL's."""

    vocab_size: int = 32128
    d_model: int = 4096
    d_kv: int = 64
    d_ff: int = 10240
    num_layers: int = 24
    num_heads: int = 64
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> T5Config:
        """Take what is known out of a config.json.

        Raises:
            WeightsError: It is no T5 of version 1.1.
        """
        kind = values.get("feed_forward_proj", "gated-gelu")
        if kind != "gated-gelu":
            raise WeightsError(
                f"feed_forward_proj={kind!r}: PixArt's text encoder is T5-v1.1 with 'gated-gelu'"
            )
        names = cls.__dataclass_fields__
        return cls(**{name: value for name, value in values.items() if name in names})


class T5LayerNorm(nn.Module):
    """Root-mean-square norm, without mean or shift."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.d_model))
        self.eps = config.layer_norm_epsilon

    def forward(self, x: Tensor) -> Tensor:
        """`(..., c)` to the same; the sum of squares in float32."""
        square = x.float().square().mean(-1, keepdim=True)
        normed = (x.float() * torch.rsqrt(square + self.eps)).to(x.dtype)
        return self.weight * normed


class T5Attention(nn.Module):
    """Self-attention without scale; its bias is shared by all layers."""

    def __init__(self, config: T5Config, *, has_bias: bool) -> None:
        super().__init__()
        inner = config.num_heads * config.d_kv
        self.heads = config.num_heads
        self.q = nn.Linear(config.d_model, inner, bias=False)
        self.k = nn.Linear(config.d_model, inner, bias=False)
        self.v = nn.Linear(config.d_model, inner, bias=False)
        self.o = nn.Linear(inner, config.d_model, bias=False)
        if has_bias:
            self.relative_attention_bias = nn.Embedding(
                config.relative_attention_num_buckets, config.num_heads
            )

    def forward(self, x: Tensor, bias: Tensor, kv_lens: Tensor | None) -> Tensor:
        """`(b, n, c)` to the same."""
        q, k, v = (
            layer(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        out = attention(q, k, v, bias=bias, kv_lens=kv_lens, scale=1.0)
        return self.o(out.transpose(1, 2).flatten(2))


class T5FeedForward(nn.Module):
    """Gated GELU."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.wi_0 = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.wi_1 = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.wo = nn.Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`(b, n, c)` to the same; the last product in float32 where its weight is kept so."""
        hidden = F.gelu(self.wi_0(x), approximate="tanh") * self.wi_1(x)
        weight = getattr(self.wo, "weight", None)
        if weight is not None and weight.dtype == torch.float32:
            hidden = hidden.float()
        return self.wo(hidden).to(x.dtype)


class _Part(nn.Module):
    """A norm and the layer behind it, named as in the published files."""

    def __init__(self, config: T5Config, name: str, layer: nn.Module) -> None:
        super().__init__()
        self.add_module(name, layer)
        self.layer_norm = T5LayerNorm(config)


class T5Block(nn.Module):
    """Attention and feed-forward."""

    def __init__(self, config: T5Config, *, first: bool) -> None:
        super().__init__()
        attend = T5Attention(config, has_bias=first)
        self.layer = nn.ModuleList(
            [
                _Part(config, "SelfAttention", attend),
                _Part(config, "DenseReluDense", T5FeedForward(config)),
            ]
        )

    def forward(self, x: Tensor, bias: Tensor, kv_lens: Tensor | None) -> Tensor:
        """`(b, n, c)` to the same."""
        attend, feed = self.layer
        x = x + attend.SelfAttention(attend.layer_norm(x), bias, kv_lens)  # pyright: ignore[reportCallIssue]
        return x + feed.DenseReluDense(feed.layer_norm(x))  # pyright: ignore[reportCallIssue]


class _Stack(nn.Module):
    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.block = nn.ModuleList(
            [T5Block(config, first=i == 0) for i in range(config.num_layers)]
        )
        self.final_layer_norm = T5LayerNorm(config)


class T5Encoder(nn.Module):
    """Token ids to states.

    Example:
        >>> encoder = load_t5("PixArt-XL-2-1024-MS/text_encoder", dtype=torch.bfloat16)
        >>> states = encoder(torch.tensor([[3, 9, 1712, 1]]))
    """

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.config = config
        self.shared = nn.Embedding(config.vocab_size, config.d_model)
        self.encoder = _Stack(config)

    @property
    def channels(self) -> int:
        """Channels of a state."""
        return self.config.d_model

    @property
    def dtype(self) -> torch.dtype:
        """Of the states."""
        return self.shared.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self.shared.weight.device

    def forward(self, ids: Tensor, kv_lens: Tensor | None = None) -> Tensor:
        """Encode.

        Args:
            ids: int64 `(b, n)`.
            kv_lens: int32 `(b,)` real tokens of each row; None where all are full.

        Returns:
            `(b, n, c)`; rows beyond a length hold nothing of use.
        """
        x = self.shared(ids)
        bias = self.position_bias(ids.shape[1]).to(x.dtype)
        for block in self.encoder.block:
            x = block(x, bias, kv_lens)
        return self.encoder.final_layer_norm(x)

    def position_bias(self, n: int) -> Tensor:
        """`(1, h, n, n)`: a learned number for each logarithmic bucket of distance."""
        config = self.config
        positions = torch.arange(n, device=self.device)
        distance = positions[None] - positions[:, None]
        half = config.relative_attention_num_buckets // 2
        exact = half // 2
        far = distance.abs().float().clamp(min=1)
        steps = (far / exact).log() / math.log(config.relative_attention_max_distance / exact)
        coarse = (exact + (steps * (half - exact)).long()).clamp(max=half - 1)
        bucket = torch.where(distance.abs() < exact, distance.abs(), coarse)
        bucket = bucket + (distance > 0) * half
        table = self.encoder.block[0].layer[0].SelfAttention.relative_attention_bias  # pyright: ignore[reportAttributeAccessIssue, reportIndexIssue]
        return table(bucket).permute(2, 0, 1)[None]


def load_t5(folder: str | Path, *, dtype: torch.dtype | None = None) -> T5Encoder:
    """Read transformers' folder of an encoder, strictly; sharded or not.

    Raises:
        WeightsError: It is no T5-v1.1 encoder, or files are missing.
    """
    folder = Path(folder)
    config = T5Config.read(read_json(folder / "config.json"))
    tensors = {
        name: tensor
        for name, tensor in read_weights(folder, dtype=dtype).items()
        if name != "encoder.embed_tokens.weight"
    }
    with torch.device("meta"):
        encoder = T5Encoder(config)
    load_into(encoder, finite(tensors, folder), source=str(folder))
    if dtype == torch.float16:  # the last product overflows in half precision
        for block in encoder.encoder.block:
            block.layer[1].DenseReluDense.wo.float()  # pyright: ignore[reportAttributeAccessIssue, reportIndexIssue]
    return encoder.eval()
