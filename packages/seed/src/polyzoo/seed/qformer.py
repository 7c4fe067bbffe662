"""The Q-Former: learned queries that look at an image, and a text branch that shares weights.

Whether the queries see later ones is an argument here. The reference turns its causal mask on where
there happen to be exactly 32 queries, and is silently bidirectional for any other number.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polyzoo.attention import attention
from polyzoo.seed.config import QFormerConfig


class KeyValues(NamedTuple):
    """Keys and values (b, h, n, d) of one self-attention."""

    keys: Tensor
    values: Tensor


class Attend(nn.Module):
    """Multi-head attention with separate projections, a residual and a norm behind."""

    def __init__(self, config: QFormerConfig, context_width: int | None = None) -> None:
        super().__init__()
        width = config.width
        self.heads, self.dropout = config.heads, config.dropout
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(context_width or width, width)
        self.value = nn.Linear(context_width or width, width)
        self.output = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=config.norm_eps)

    def key_values(self, context: Tensor) -> KeyValues:
        """Return what queries attend to."""
        return KeyValues(self._split(self.key(context)), self._split(self.value(context)))

    def forward(
        self, x: Tensor, past: KeyValues, *, causal: bool = False, mask: Tensor | None = None
    ) -> Tensor:
        """Map (b, n, d) to (b, n, d); `mask` is True where a query attends."""
        out = attention(
            self._split(self.query(x)),
            past.keys,
            past.values,
            causal=causal,
            mask=mask,
            dropout=self.dropout if self.training else 0.0,
        )
        out = self.output(out.transpose(1, 2).flatten(2))
        return self.norm(F.dropout(out, self.dropout, self.training) + x)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class PostNormFeedForward(nn.Module):
    """Feed-forward with residual and norm behind."""

    def __init__(self, config: QFormerConfig) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.expand = nn.Linear(config.width, config.ffn)
        self.contract = nn.Linear(config.ffn, config.width)
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        """Map (b, n, d) to (b, n, d)."""
        out = self.contract(F.gelu(self.expand(x)))
        return self.norm(F.dropout(out, self.dropout, self.training) + x)


class Layer(nn.Module):
    """Self-attention for all; cross-attention for queries; a feed-forward for each kind."""

    def __init__(self, config: QFormerConfig, *, context_width: int | None) -> None:
        super().__init__()
        self.self_attention = Attend(config)
        self.cross_attention = Attend(config, context_width) if context_width else None
        self.query_ffn = PostNormFeedForward(config)
        self.text_ffn = PostNormFeedForward(config) if config.vocabulary else None

    def forward(
        self,
        x: Tensor,
        *,
        queries: int,
        causal: bool,
        mask: Tensor | None,
        context: Tensor | None,
        past: KeyValues | None,
    ) -> tuple[Tensor, KeyValues]:
        """Map (b, n, d) to (b, n, d); the first `queries` positions are queries, the rest text."""
        own = self.self_attention.key_values(x)
        seen = own
        if past is not None:
            seen = KeyValues(
                torch.cat((past.keys, own.keys), 2), torch.cat((past.values, own.values), 2)
            )
        x = self.self_attention(x, seen, causal=causal, mask=mask)
        if not queries:
            return self._text(x), own
        first = x if queries == x.shape[1] else x[:, :queries]
        if self.cross_attention is not None and context is not None:
            first = self.cross_attention(first, self.cross_attention.key_values(context))
        first = self.query_ffn(first)
        if queries == x.shape[1]:
            return first, own
        return torch.cat((first, self._text(x[:, queries:])), 1), own

    def _text(self, x: Tensor) -> Tensor:
        assert self.text_ffn is not None  # noqa: S101 - QFormer lets no text in without it
        return self.text_ffn(x)


class QFormer(nn.Module):
    """A BERT body (post-norm) for queries, text, or both.

    Example:
        >>> former = QFormer(QFormerConfig(width=48, heads=4, layers=2, ffn=96), context_width=40)
        >>> former(torch.zeros(1, 8, 48), context=torch.zeros(1, 10, 40), causal=True).shape
        torch.Size([1, 8, 48])
    """

    def __init__(self, config: QFormerConfig, *, context_width: int) -> None:
        super().__init__()
        self.config = config
        self.embedding_norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        if config.vocabulary:
            self.words = nn.Embedding(config.vocabulary, config.width)
            self.positions = nn.Embedding(config.max_text, config.width)
        self.layers = nn.ModuleList(
            Layer(config, context_width=None if i % config.cross_every else context_width)
            for i in range(config.layers)
        )
        self.apply(_initialise)

    def forward(
        self,
        queries: Tensor,
        *,
        context: Tensor,
        causal: bool,
        hidden: list[Tensor] | None = None,
        past: list[KeyValues] | None = None,
    ) -> Tensor:
        """Let queries look at an image.

        Args:
            queries: (b, n, d); order comes from their values and the mask only.
            context: (b, m, d') tokens of the image.
            causal: Query i sees queries up to i.
            hidden: Filled with the states before the first and behind every layer.
            past: Filled with every layer's keys and values, for `caption`.
        """
        return self._run(
            self._embed(queries),
            queries=queries.shape[1],
            causal=causal,
            context=context,
            hidden=hidden,
            keep=past,
        )

    def text(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return (b, n, d) states of text: ids (b, n), mask (b, n) True for real pieces."""
        return self._run(self._embed(self._words(ids)), mask=mask.bool()[:, None, None, :])

    def joint(
        self, queries: Tensor, ids: Tensor, text_mask: Tensor, *, context: Tensor, causal: bool
    ) -> Tensor:
        """Run queries and text together (image-text matching): (b, queries + text, d).

        Queries hear later queries through the text: never take codes from here.
        """
        x = torch.cat((queries.expand(len(ids), -1, -1), self._words(ids)), 1)
        mask = joint_mask(queries.shape[1], text_mask, causal=causal)
        return self._run(self._embed(x), queries=queries.shape[1], mask=mask, context=context)

    def caption(self, ids: Tensor, text_mask: Tensor, past: Sequence[KeyValues]) -> Tensor:
        """Return (b, n, d) states of text that sees all queries, and text up to itself."""
        mask = caption_mask(past[0].keys.shape[2], text_mask)
        return self._run(self._embed(self._words(ids)), mask=mask, past=past)

    def _words(self, ids: Tensor) -> Tensor:
        if not self.config.vocabulary:
            raise ValueError("this Q-Former has no text branch: its config has vocabulary=0")
        places = torch.arange(ids.shape[1], device=ids.device)
        return self.words(ids) + self.positions(places)

    def _embed(self, x: Tensor) -> Tensor:
        return F.dropout(self.embedding_norm(x), self.config.dropout, self.training)

    def _run(
        self,
        x: Tensor,
        *,
        queries: int = 0,
        causal: bool = False,
        mask: Tensor | None = None,
        context: Tensor | None = None,
        past: Sequence[KeyValues] | None = None,
        hidden: list[Tensor] | None = None,
        keep: list[KeyValues] | None = None,
    ) -> Tensor:
        if hidden is not None:
            hidden.append(x)
        for i, layer in enumerate(self.layers):
            x, own = layer(
                x,
                queries=queries,
                causal=causal,
                mask=mask,
                context=context,
                past=None if past is None else past[i],
            )
            if hidden is not None:
                hidden.append(x)
            if keep is not None:
                keep.append(own)
        return x


class CaptionHead(nn.Module):
    """From states of text to logits of the next piece, with BERT's transform in between."""

    def __init__(self, config: QFormerConfig) -> None:
        super().__init__()
        self.transform = nn.Linear(config.width, config.width)
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.decoder = nn.Linear(config.width, config.vocabulary)

    def forward(self, x: Tensor) -> Tensor:
        """Map (b, n, d) to (b, n, v)."""
        return self.decoder(self.norm(F.gelu(self.transform(x))))


def joint_mask(queries: int, text_mask: Tensor, *, causal: bool) -> Tensor:
    """Return bool (b, 1, queries + n, queries + n), True where a row attends to a column."""
    b, n = text_mask.shape
    total = queries + n
    mask = torch.ones(total, total, dtype=torch.bool, device=text_mask.device)
    if causal:
        mask[:queries, :queries] = mask[:queries, :queries].tril()
    keys = torch.cat((text_mask.new_ones(b, queries, dtype=torch.bool), text_mask.bool()), 1)
    return mask[None, None] & keys[:, None, None, :]


def caption_mask(queries: int, text_mask: Tensor) -> Tensor:
    """Return bool (b, 1, n, queries + n): all queries, and text up to the own position."""
    b, n = text_mask.shape
    text = torch.ones(n, n, dtype=torch.bool, device=text_mask.device).tril()
    text = text[None] & text_mask.bool()[:, None, :]
    return torch.cat((text.new_ones(b, n, queries), text), 2)[:, None]


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
