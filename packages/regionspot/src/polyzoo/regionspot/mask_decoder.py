"""SAM's mask decoder: region tokens, and masks only where they are wanted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from polyzoo.attention import attention


@dataclass(frozen=True)
class Decoded:
    """What the decoder says about k prompts."""

    tokens: Tensor
    """`(k, 4, c)`: the four mask tokens after the transformer, before the hypernetworks."""
    logits: Tensor | None
    """`(k, 4, 4 * grid, 4 * grid)` mask logits, where they were asked for."""
    iou: Tensor | None
    """`(k, 4)`: estimated quality of each mask, likewise."""

    def selected(self, *, multimask: bool) -> Decoded:
        """Keep the single mask (index 0), or the three others."""
        part = slice(1, None) if multimask else slice(0, 1)
        return Decoded(
            self.tokens[:, part],
            None if self.logits is None else self.logits[:, part],
            None if self.iou is None else self.iou[:, part],
        )


def decode(
    decoder: Any,
    image: Tensor,
    positions: Tensor,
    sparse: Tensor,
    dense: Tensor,
    *,
    masks: bool = True,
) -> Decoded:
    """Run the decoder for the prompts of one image.

    Without mask prompts the image is the same for all regions until the first two-way block ends:
    its projections there are computed once, not k times. Without masks, upscaling and hypernetworks
    are skipped. Both leave the tokens as they are.

    Args:
        decoder: `sam.mask_decoder`.
        image: `(1, c, h, w)` image embedding.
        positions: `(1, c, h, w)` from `prompt_encoder.get_dense_pe()`.
        sparse: `(k, n, c)` embedded prompts.
        dense: `(k, c, h, w)` or `(1, c, h, w)` embedded mask prompts.
        masks: Whether logits and quality are wanted.
    """
    k = sparse.shape[0]
    if k == 0:
        return _nothing(decoder, image, masks)
    own = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
    tokens = torch.cat([own.expand(k, -1, -1), sparse.to(own.dtype)], 1)
    keys = (image + dense).flatten(2).transpose(1, 2)
    places = positions.to(keys.dtype).flatten(2).transpose(1, 2)
    queries, keys = _two_way(decoder.transformer, tokens, keys, places)
    found = queries[:, 1 : 1 + decoder.num_mask_tokens]
    if not masks:
        return Decoded(found, None, None)
    picture = keys.transpose(1, 2).unflatten(2, image.shape[-2:])
    picture = decoder.output_upscaling(picture)
    weights = torch.stack(
        [mlp(found[:, i]) for i, mlp in enumerate(decoder.output_hypernetworks_mlps)], 1
    )
    logits = (weights @ picture.flatten(2)).unflatten(2, picture.shape[-2:])
    return Decoded(found, logits, decoder.iou_prediction_head(queries[:, 0]))


def _two_way(
    transformer: Any, tokens: Tensor, keys: Tensor, places: Tensor
) -> tuple[Tensor, Tensor]:
    queries = tokens
    for layer in transformer.layers:
        if layer.skip_first_layer_pe:
            queries = _attend(layer.self_attn, queries, queries, queries)
        else:
            both = queries + tokens
            queries = queries + _attend(layer.self_attn, both, both, queries)
        queries = layer.norm1(queries)
        placed = keys + places
        queries = layer.norm2(
            queries + _attend(layer.cross_attn_token_to_image, queries + tokens, placed, keys)
        )
        queries = layer.norm3(queries + layer.mlp(queries))
        keys = layer.norm4(
            keys + _attend(layer.cross_attn_image_to_token, placed, queries + tokens, queries)
        )
    found = _attend(transformer.final_attn_token_to_image, queries + tokens, keys + places, keys)
    return transformer.norm_final_attn(queries + found), keys


def _attend(layer: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend; a side that all regions share has batch 1 and is projected once."""
    heads = layer.num_heads
    q, k, v = (
        project(x).unflatten(-1, (heads, -1)).transpose(1, 2)
        for project, x in ((layer.q_proj, q), (layer.k_proj, k), (layer.v_proj, v))
    )
    regions, n = q.shape[0], q.shape[2]
    if k.shape[0] == 1 and regions > 1:
        # The same keys for all: the regions' queries are one long sequence.
        folded = q.transpose(0, 1).flatten(1, 2)[None]
        out = attention(folded, k, v)[0].unflatten(1, (regions, n)).transpose(0, 1)
    else:
        out = attention(q.expand(k.shape[0], -1, -1, -1), k, v)
    return layer.out_proj(out.transpose(1, 2).flatten(2))


def _nothing(decoder: Any, image: Tensor, masks: bool) -> Decoded:
    count, side = decoder.num_mask_tokens, 4 * image.shape[-1]
    return Decoded(
        image.new_zeros(0, count, image.shape[1]),
        image.new_zeros(0, count, side, side) if masks else None,
        image.new_zeros(0, count) if masks else None,
    )
