"""Segment Anything's modules, with all their attention through polyzoo.attention.

The modules and their weights are those of the `segment_anything` package. Only the order of the
operations is written here: decomposed relative positions reach the attention kernels as they are,
without an n x m matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polyzoo.attention import DecomposedBias, attention
from polyzoo.regionspot.config import SamConfig

if TYPE_CHECKING:
    from segment_anything.modeling import Sam

BlockForward = Callable[[Any, Tensor], Tensor]
PIXEL_MEAN = (123.675, 116.28, 103.53)
PIXEL_STD = (58.395, 57.12, 57.375)


def build_sam(config: SamConfig) -> Sam:
    """Build `segment_anything`'s model of this shape, with random weights."""
    from segment_anything.modeling import (
        ImageEncoderViT,
        MaskDecoder,
        PromptEncoder,
        Sam,
        TwoWayTransformer,
    )

    dim, grid = config.prompt_dim, config.grid
    return Sam(
        image_encoder=ImageEncoderViT(
            depth=config.depth,
            embed_dim=config.width,
            img_size=config.image_size,
            mlp_ratio=4,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),  # pyright: ignore[reportArgumentType]
            num_heads=config.heads,
            patch_size=config.patch_size,
            qkv_bias=True,
            use_rel_pos=True,
            global_attn_indexes=config.global_layers,
            window_size=config.window,
            out_chans=dim,
        ),
        prompt_encoder=PromptEncoder(
            embed_dim=dim,
            image_embedding_size=(grid, grid),
            input_image_size=(config.image_size, config.image_size),
            mask_in_chans=config.mask_channels,
        ),
        mask_decoder=MaskDecoder(
            num_multimask_outputs=3,
            transformer=TwoWayTransformer(
                depth=config.decoder_depth,
                embedding_dim=dim,
                mlp_dim=config.decoder_mlp,
                num_heads=config.decoder_heads,
            ),
            transformer_dim=dim,
            iou_head_depth=3,
            iou_head_hidden_dim=config.iou_hidden,
        ),
        pixel_mean=list(PIXEL_MEAN),
        pixel_std=list(PIXEL_STD),
    )


def preprocess(sam: Any, image: Tensor) -> Tensor:
    """Normalise `(c, H, W)` or `(b, c, H, W)` pixels of 0 to 255 and pad right and bottom."""
    normal = (image - sam.pixel_mean) / sam.pixel_std
    side = sam.image_encoder.img_size
    return F.pad(normal, (0, side - image.shape[-1], 0, side - image.shape[-2]))


def encode_image(encoder: Any, pixels: Tensor, *, block: BlockForward | None = None) -> Tensor:
    """Return the image embedding.

    Args:
        encoder: `sam.image_encoder`.
        pixels: `(b, 3, S, S)`, normalised and padded.
        block: A compiled `block_forward`.

    Returns:
        `(b, c, S / patch, S / patch)`.
    """
    x = encoder.patch_embed(pixels)
    if encoder.pos_embed is not None:
        x = x + encoder.pos_embed
    step = block or block_forward
    for layer in encoder.blocks:
        x = step(layer, x)
    return encoder.neck(x.permute(0, 3, 1, 2))


def encode_prompts(
    encoder: Any,
    *,
    boxes: Tensor | None = None,
    points: Tensor | None = None,
    labels: Tensor | None = None,
    masks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Embed prompts; several kinds of them describe the same k regions together.

    Args:
        encoder: `sam.prompt_encoder`.
        boxes: `(k, 4)`, corners in pixels of SAM's input.
        points: `(k, p, 2)`, x and y in the same pixels.
        labels: `(k, p)`: 1 inside, 0 outside, -1 nothing.
        masks: `(k, 1, 4 * grid, 4 * grid)` logits.

    Returns:
        Sparse `(k, n, c)`, and dense `(k, c, grid, grid)`; dense has k = 1 where no mask was given,
        since it is then the same for all.
    """
    parts: list[Tensor] = []
    if points is not None and labels is not None:
        if boxes is None:  # what the published encoder pads points with
            points = torch.cat([points, points.new_zeros(len(points), 1, 2)], 1)
            labels = torch.cat([labels, labels.new_full((len(labels), 1), -1)], 1)
        parts.append(_embed_points(encoder, points, labels))
    if boxes is not None:
        corners = _positions(encoder, boxes.reshape(-1, 2, 2))
        kinds = torch.stack([encoder.point_embeddings[i].weight[0] for i in (2, 3)])
        parts.append(corners + kinds.to(corners.dtype))
    weight = encoder.no_mask_embed.weight
    sparse = (
        torch.cat(parts, 1).to(weight.dtype) if parts else weight.new_zeros(1, 0, weight.shape[1])
    )
    if masks is not None:
        return sparse, encoder.mask_downscaling(masks.to(weight.dtype))
    height, width = encoder.image_embedding_size
    return sparse, weight.reshape(1, -1, 1, 1).expand(1, -1, height, width)


def _embed_points(encoder: Any, points: Tensor, labels: Tensor) -> Tensor:
    found = _positions(encoder, points)
    nothing = encoder.not_a_point_embed.weight.to(found.dtype)
    kinds = [encoder.point_embeddings[i].weight.to(found.dtype) for i in (0, 1)]
    choice = labels[..., None]
    found = torch.where(choice == -1, nothing.expand_as(found), found)
    for value, kind in enumerate(kinds):
        found = torch.where(choice == value, found + kind, found)
    return found


def _positions(encoder: Any, points: Tensor) -> Tensor:
    """Random Fourier features of pixel centres, in fp32 whatever the model's dtype."""
    with torch.autocast(points.device.type, enabled=False):
        height, width = encoder.input_image_size
        x, y = (points.float() + 0.5).unbind(-1)
        # No tensor is made from Python numbers here: a CUDA graph could not record the copy.
        shares = torch.stack([x / width, y / height], -1)
        matrix = encoder.pe_layer.positional_encoding_gaussian_matrix.float()
        angle = 2 * torch.pi * ((2 * shares - 1) @ matrix)
        return torch.cat([angle.sin(), angle.cos()], -1)


def block_forward(block: Any, x: Tensor) -> Tensor:
    """Run one block of the image encoder on `(b, H, W, c)`."""
    shortcut = x
    x = block.norm1(x)
    size = block.window_size
    if size > 0:
        height, width = x.shape[1:3]
        x = _split(x, size)
        x = _merge(_attend(block.attn, x), size, height, width)
    else:
        x = _attend(block.attn, x)
    x = shortcut + x
    return x + block.mlp(block.norm2(x))


def _attend(layer: Any, x: Tensor) -> Tensor:
    b, height, width, channels = x.shape
    heads = layer.num_heads
    qkv = layer.qkv(x).view(b, height * width, 3, heads, channels // heads)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    bias = None
    if layer.use_rel_pos:
        grid = q.unflatten(2, (height, width))
        rows = torch.einsum(
            "bnhwc,hkc->bnhwk", grid, _relative(layer.rel_pos_h, height).to(q.dtype)
        )
        columns = torch.einsum(
            "bnhwc,wkc->bnhwk", grid, _relative(layer.rel_pos_w, width).to(q.dtype)
        )
        bias = DecomposedBias(rows.flatten(2, 3), columns.flatten(2, 3))
    out = attention(q, k, v, bias=bias)
    return layer.proj(out.transpose(1, 2).reshape(b, height, width, channels))


def _relative(table: Tensor, size: int) -> Tensor:
    """Position vectors `(query, key, channel)` of one axis; other table sizes are resampled."""
    if table.shape[0] != 2 * size - 1:
        resized = F.interpolate(table.T[None], size=2 * size - 1, mode="linear")
        table = resized[0].T
    places = torch.arange(size, device=table.device)
    return table[places[:, None] - places[None, :] + size - 1]


def _split(x: Tensor, size: int) -> Tensor:
    """Cut `(b, H, W, c)` into windows, zeros filling the last ones."""
    b, height, width, c = x.shape
    down, right = -height % size, -width % size
    x = F.pad(x, (0, 0, 0, right, 0, down))
    x = x.view(b, (height + down) // size, size, (width + right) // size, size, c)
    return x.transpose(2, 3).reshape(-1, size, size, c)


def _merge(windows: Tensor, size: int, height: int, width: int) -> Tensor:
    rows, columns = -(-height // size), -(-width // size)
    x = windows.view(-1, rows, columns, size, size, windows.shape[-1]).transpose(2, 3)
    return x.reshape(-1, rows * size, columns * size, windows.shape[-1])[:, :height, :width]
