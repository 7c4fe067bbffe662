"""A compact forward pass of the BERT and RoBERTa families for inference over packed sequences.

Same weights, same arithmetic as transformers' modules, arranged for speed: one matrix product for
query, key and value; no padding; the position and type tables added up once; everything between
two attentions in one function, which `torch.compile` turns into a few fused kernels and compiles
once for all layers; and where only the first token's state is wanted, the last layer computes only
that row. A copy of the weights: made for a finished model, not for one in training.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polyzoo.attention import CuSeqlens, attention
from polyzoo.sea.config import Pooling
from polyzoo.sea.packing import PackedSequences
from polyzoo.sea.segments import segment_ids, segment_mean

_FAMILIES = frozenset({"bert", "roberta", "xlm-roberta", "camembert"})
_OFFSET_FAMILIES = _FAMILIES - {"bert"}
Gelu = Literal["exact", "tanh"]


@dataclass(frozen=True)
class _Norm:
    weight: Tensor
    bias: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


@dataclass(frozen=True)
class _Layer:
    qkv: tuple[Tensor, Tensor]
    output: tuple[Tensor, Tensor]
    up: tuple[Tensor, Tensor]
    down: tuple[Tensor, Tensor]
    norm_attention: _Norm
    norm_output: _Norm


class FusedEncoder:
    """Inference of one encoder; see the module's text.

    Example:
        >>> fused = FusedEncoder.of(model, pooling="mean")
        >>> vectors = fused(PackedSequences.pack(sequences))
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        pooling: Pooling,
        dtype: torch.dtype | None = None,
        gelu: Gelu = "exact",
        compile: bool = False,
        compile_mode: str | None = None,
    ) -> None:
        """Copy the weights of a supported model (see `of`).

        Args:
            model: transformers' BertModel, RobertaModel or one with their layout.
            pooling: What a sequence's vector is.
            dtype: Of weights and arithmetic; the model's own where not given.
            gelu: "tanh" uses the matrix library's built-in approximation, which differs from the
                exact function by at most 5e-4 and saves one pass over the widest activation.
            compile: Compile what lies between two attentions, for any number of tokens.
            compile_mode: Passed to `torch.compile`.
        """
        parts: Any = model
        config = parts.config
        weight = parts.embeddings.word_embeddings.weight
        self.dtype = dtype or weight.dtype
        self.pooling: Pooling = pooling
        self.heads = int(config.num_attention_heads)
        self.offset = int(config.pad_token_id) + 1 if config.model_type in _OFFSET_FAMILIES else 0
        with torch.no_grad():
            self.words = self._copy(weight)
            positions = parts.embeddings.position_embeddings.weight.float()
            types = parts.embeddings.token_type_embeddings.weight.float()
            self.places = self._copy(positions + types[0])
            self.norm = self._norm(parts.embeddings.LayerNorm)
            self.layers = [self._layer(layer) for layer in parts.encoder.layer]
            self.pooler = self._linear(parts.pooler.dense) if pooling == "pooler" else None
        between: Callable[..., tuple[Tensor, Tensor]] = _between
        embed: Callable[..., tuple[Tensor, Tensor]] = _embed
        if compile:
            between = torch.compile(_between, dynamic=True, mode=compile_mode)
            embed = torch.compile(_embed, dynamic=True, mode=compile_mode)
        self._between = between
        self._embed = embed
        self.gelu: Gelu = gelu

    @classmethod
    def of(
        cls,
        model: nn.Module,
        *,
        pooling: Pooling,
        dtype: torch.dtype | None = None,
        compile: bool = False,
    ) -> FusedEncoder | None:
        """The fused form of a model, or None if its family or its layers are not supported."""
        config: Any = model.config
        plain = all(
            type(module) in (nn.Linear, nn.Embedding, nn.LayerNorm)
            for module in model.modules()
            if hasattr(module, "weight")
        )  # an adapter's layer computes more than its weight says
        supported = (
            config.model_type in _FAMILIES
            and config.hidden_act == "gelu"
            and not config.is_decoder
            and getattr(config, "position_embedding_type", "absolute") == "absolute"
            and plain
        )
        return cls(model, pooling=pooling, dtype=dtype, compile=compile) if supported else None

    @torch.no_grad()
    def __call__(self, packed: PackedSequences) -> Tensor:
        """(s, d) vectors, in the dtype of the weights (mean pooling: float32)."""
        hidden = self._run(packed, first_only=self.pooling != "mean")
        if self.pooling == "mean":
            owner = segment_ids(packed.starts, packed.ids.shape[0])
            return segment_mean(hidden.float(), packed.starts, owner)
        if self.pooler is not None:
            return torch.tanh(F.linear(hidden, *self.pooler))
        return hidden

    @torch.no_grad()
    def states(self, packed: PackedSequences) -> Tensor:
        """(T, d) last hidden state of every token."""
        return self._run(packed, first_only=False)

    def _run(self, packed: PackedSequences, *, first_only: bool) -> Tensor:
        starts = packed.starts
        owner = segment_ids(starts, packed.ids.shape[0])
        positions = torch.arange(packed.ids.shape[0], device=starts.device) - starts[owner]
        x, qkv = self._embed(
            packed.ids, positions + self.offset, self.words, self.places, self.norm,
            self.layers[0].qkv,
        )  # fmt: skip
        longest = packed.max_length
        everywhere = CuSeqlens(starts, starts, longest, longest)
        for index, layer in enumerate(self.layers):
            last = index == len(self.layers) - 1
            q, k, v = self._heads(qkv)
            lengths = everywhere
            if last and first_only:
                first = starts[:-1].long()
                count = torch.arange(len(packed) + 1, dtype=starts.dtype, device=starts.device)
                lengths = CuSeqlens(count, starts, 1, longest)
                q, x = q[:, :, first], x[first]
            mixed = attention(q, k, v, cu_seqlens=lengths)
            mixed = mixed[0].transpose(0, 1).flatten(1)
            following = None if last else self.layers[index + 1].qkv
            x, qkv = self._between(x, mixed, layer, following, self.gelu)
        return x

    def _heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(T, 3 d) to three (1, h, T, d/h), as views."""
        split = qkv.view(qkv.shape[0], 3, self.heads, -1).permute(1, 2, 0, 3)[:, None]
        return split[0], split[1], split[2]

    def _layer(self, layer: Any) -> _Layer:
        own = layer.attention.self
        three = (own.query, own.key, own.value)
        return _Layer(
            qkv=(
                self._copy(torch.cat([part.weight for part in three])),
                self._copy(torch.cat([part.bias for part in three])),
            ),
            output=self._linear(layer.attention.output.dense),
            up=self._linear(layer.intermediate.dense),
            down=self._linear(layer.output.dense),
            norm_attention=self._norm(layer.attention.output.LayerNorm),
            norm_output=self._norm(layer.output.LayerNorm),
        )

    def _linear(self, linear: nn.Linear) -> tuple[Tensor, Tensor]:
        return self._copy(linear.weight), self._copy(linear.bias)

    def _norm(self, norm: nn.LayerNorm) -> _Norm:
        return _Norm(self._copy(norm.weight), self._copy(norm.bias), norm.eps)

    def _copy(self, weight: Tensor) -> Tensor:
        # Same dtype: shared, not copied; nothing here writes to it.
        return weight.detach().to(self.dtype)


def _embed(
    ids: Tensor,
    positions: Tensor,
    words: Tensor,
    places: Tensor,
    norm: _Norm,
    qkv: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    x = norm(words[ids] + places[positions])
    return x, F.linear(x, *qkv)


def _between(
    x: Tensor,
    mixed: Tensor,
    layer: _Layer,
    following: tuple[Tensor, Tensor] | None,
    gelu: Gelu,
) -> tuple[Tensor, Tensor]:
    """From one attention's output to the next one's input."""
    x = layer.norm_attention(x + F.linear(mixed, *layer.output))
    weight, bias = layer.up
    if gelu == "exact":
        wide = F.gelu(F.linear(x, weight, bias))
    else:
        wide = torch.ops.aten._addmm_activation(bias, x, weight.t(), use_gelu=True)
    x = layer.norm_output(x + F.linear(wide, *layer.down))
    return x, x if following is None else F.linear(x, *following)
