"""The transformer's block: adaptive norm, self-attention, attention to the text, feed-forward.

Parameters have the names of the diffusers layout, so that its files, and peft's adapters for them,
fit as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polyzoo.attention import CuSeqlens, attention
from polyzoo.pixart_delta.config import PixArtConfig

NORM_EPS = 1e-6


class TextKeys(NamedTuple):
    """Keys and values of one block for the text of a batch; the same in every diffusion step."""

    keys: Tensor
    """`(b, h, m, d)`, or `(1, h, total, d)` where captions differ in length."""
    values: Tensor
    """The same."""


class TextLengths(NamedTuple):
    """How the text of a batch is laid out; one of the two is set unless all lengths agree."""

    packed: CuSeqlens | None = None
    """Captions follow one another."""
    kv_lens: Tensor | None = None
    """int32 `(b,)`: captions stand in rows of one fixed length, as a captured graph needs it."""


class Projections(nn.Module):
    """Query, key, value and output projections of one attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])
        self.joined: tuple[str, ...] = ()

    def split_heads(self, tokens: Tensor) -> Tensor:
        """`(b, n, c)` to `(b, h, n, d)`, a view."""
        return tokens.unflatten(2, (self.heads, -1)).transpose(1, 2)

    def merge_heads(self, tokens: Tensor) -> Tensor:
        """`(b, h, n, d)` to `(b, n, c)`."""
        return tokens.transpose(1, 2).flatten(2)

    def join(self, names: tuple[str, ...]) -> None:
        """Store the weights of some projections one after the other and compute them at once.

        The projections' own weights become views of the joint one: nothing is stored twice, and
        what changes them in place, such as merging an adapter, changes both.
        """
        layers = [self.get_submodule(name) for name in names]
        if not all(type(layer) is nn.Linear for layer in layers):
            return  # an adapter or a quantised layer does more than multiply
        with torch.no_grad():
            for kind in ("weight", "bias"):
                parts = [getattr(layer, kind) for layer in layers]
                whole = torch.cat([part.data for part in parts])
                for part, piece in zip(parts, whole.split([len(p) for p in parts]), strict=True):
                    part.data = piece
                self.register_buffer(f"joint_{kind}", whole, persistent=False)
        self.joined = names

    def part(self) -> None:
        """Undo `join`."""
        if self.joined:
            for layer in (self.get_submodule(name) for name in self.joined):
                for parameter in layer.parameters():
                    parameter.data = parameter.data.clone()
            del self.joint_weight, self.joint_bias
            self.joined = ()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        names = self.joined
        self.part()  # moving tensors one by one would store them twice
        result = super()._apply(fn, recurse)
        if names:
            self.join(names)
        return result


class SelfAttention(Projections):
    """Every token of an image sees every other."""

    def forward(self, x: Tensor) -> Tensor:
        """`(b, n, c)` to `(b, n, c)`."""
        if self.joined:
            q, k, v = F.linear(x, self.joint_weight, self.joint_bias).chunk(3, dim=2)  # pyright: ignore[reportArgumentType]
        else:
            q, k, v = self.to_q(x), self.to_k(x), self.to_v(x)
        q, k, v = (self.split_heads(t) for t in (q, k, v))
        return self.to_out[0](self.merge_heads(attention(q, k, v)))


class TextAttention(Projections):
    """Every token of an image sees the tokens of its caption, and no padding."""

    def remember(self, text: Tensor, *, rows: int | None = None) -> TextKeys:
        """Keys and values of projected captions.

        Args:
            text: `(total, c)` packed tokens.
            rows: Captions, where all have the same length and a plain batch will do.
        """
        if self.joined:
            k, v = F.linear(text, self.joint_weight, self.joint_bias).chunk(2, dim=1)  # pyright: ignore[reportArgumentType]
        else:
            k, v = self.to_k(text), self.to_v(text)
        shape = (rows or 1, -1, k.shape[1])
        return TextKeys(self.split_heads(k.reshape(shape)), self.split_heads(v.reshape(shape)))

    def forward(self, x: Tensor, text: TextKeys, lengths: TextLengths) -> Tensor:
        """`(b, n, c)` to `(b, n, c)`."""
        q = self.to_q(x)
        if lengths.packed is None:
            out = attention(self.split_heads(q), text.keys, text.values, kv_lens=lengths.kv_lens)
            return self.to_out[0](self.merge_heads(out))
        q = self.split_heads(q.reshape(1, -1, q.shape[2]))
        out = attention(q, text.keys, text.values, cu_seqlens=lengths.packed)
        return self.to_out[0](self.merge_heads(out).view(x.shape))


class GeluProjection(nn.Module):
    """Linear layer with the tanh approximation of GELU."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """`(..., width)` to `(..., hidden)`."""
        return F.gelu(self.proj(x), approximate="tanh")


class FeedForward(nn.Module):
    """Two linear layers."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        # The layout's names leave room for a dropout at index 1, which no published model has.
        self.net = nn.ModuleList(
            [GeluProjection(width, hidden), nn.Identity(), nn.Linear(hidden, width)]
        )

    def forward(self, x: Tensor) -> Tensor:
        """`(..., width)` to the same."""
        return self.net[2](self.net[0](x))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Layer norm without parameters of its own, scaled and shifted by the condition."""
    normed = F.layer_norm(x, (x.shape[-1],), eps=NORM_EPS)
    return normed * (1 + scale) + shift


class PixArtBlock(nn.Module):
    """One block (section 2.3, step 6). The text attention has neither norm nor gate."""

    def __init__(self, config: PixArtConfig) -> None:
        super().__init__()
        width, heads = config.width, config.num_attention_heads
        self.scale_shift_table = nn.Parameter(torch.empty(6, width))
        self.attn1 = SelfAttention(width, heads)
        self.attn2 = TextAttention(width, heads)
        self.ff = FeedForward(width, config.hidden)

    def forward(self, x: Tensor, condition: Tensor, text: TextKeys, lengths: TextLengths) -> Tensor:
        """`(b, n, c)` to the same; condition is `(b, 6c)`, shared by all blocks."""
        table = self.scale_shift_table + condition.unflatten(1, (6, -1))
        shift1, scale1, gate1, shift2, scale2, gate2 = table[:, :, None].unbind(1)
        x = x + gate1 * self.attn1(modulate(x, shift1, scale1))
        x = x + self.attn2(x, text, lengths)
        return x + gate2 * self.ff(modulate(x, shift2, scale2))

    def reset_parameters(self) -> None:
        """Draw fresh weights: the text attention starts at zero (section 2.4)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.scale_shift_table, std=self.scale_shift_table.shape[1] ** -0.5)
        nn.init.zeros_(self.attn2.to_out[0].weight)  # pyright: ignore[reportArgumentType]
