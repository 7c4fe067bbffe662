"""CLIP's modules as open_clip builds them, with their attention through polyzoo.attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polyzoo.attention import attention
from polyzoo.core.errors import ConfigError
from polyzoo.regionspot.config import ClipConfig, ClipShape

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def build_clip(config: ClipConfig) -> Any:
    """Build open_clip's model of this name or shape, with random weights.

    Raises:
        ConfigError: open_clip has no model of that name.
    """
    import open_clip

    if config.shape is not None:
        return _build_shape(config.shape)
    if config.name not in open_clip.list_models():
        raise ConfigError(
            f"clip.name={config.name!r}: open_clip has no such model; open_clip.list_models() "
            "names them, such as ViT-B-16-quickgelu or ViT-L-14-336-quickgelu"
        )
    return open_clip.create_model(
        config.name, load_weights=False, force_image_size=config.image_size
    )


def _build_shape(shape: ClipShape) -> nn.Module:
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    return CLIP(
        shape.embed_dim,
        CLIPVisionCfg(
            layers=shape.vision_layers,
            width=shape.vision_width,
            patch_size=shape.patch_size,
            image_size=shape.image_size,
        ),
        CLIPTextCfg(
            context_length=shape.context_length,
            vocab_size=shape.vocab_size,
            width=shape.text_width,
            heads=max(1, shape.text_width // 64),
            layers=shape.text_layers,
        ),
        quick_gelu=shape.quick_gelu,
    )


def input_size(clip: Any) -> tuple[int, int]:
    """Height and width the image tower takes."""
    size = clip.visual.image_size
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def map_width(clip: Any) -> int:
    """Channels of the feature map."""
    visual = clip.visual
    if _is_vit(visual):
        return visual.conv1.out_channels
    height, width = input_size(clip)
    parameter = next(visual.parameters())
    with torch.no_grad():
        return feature_map(clip, parameter.new_zeros(1, 3, height, width)).shape[-1]


def text_width(clip: Any) -> int:
    """Channels of the common space."""
    projection = getattr(clip, "text_projection", None)
    if isinstance(projection, nn.Linear):
        return projection.out_features
    if isinstance(projection, Tensor):
        return projection.shape[1]
    device = next(clip.parameters()).device
    length = getattr(clip, "context_length", 77)
    with torch.no_grad():
        return clip.encode_text(torch.zeros(1, length, dtype=torch.long, device=device)).shape[-1]


def feature_map(
    clip: Any, pixels: Tensor, *, block: Callable[[Any, Tensor], Tensor] | None = None
) -> Tensor:
    """Return the last block's tokens, before the last norm and the projection.

    Args:
        clip: Any open_clip model.
        pixels: `(b, 3, H, W)`, normalised, of the model's size.
        block: A compiled `block_forward`.

    Returns:
        `(b, m, d)`, the class token first where the tower has one.
    """
    visual = clip.visual
    if not _is_vit(visual):
        return _other_map(visual, pixels)
    x = visual.conv1(pixels).flatten(2).transpose(1, 2)
    first = visual.class_embedding.to(x.dtype).expand(x.shape[0], 1, -1)
    x = visual.ln_pre(torch.cat([first, x], 1) + visual.positional_embedding.to(x.dtype))
    step = block or block_forward
    for layer in visual.transformer.resblocks:
        x = step(layer, x)
    return x


def block_forward(block: Any, x: Tensor) -> Tensor:
    """Run one block of the image tower on `(b, n, d)`."""
    return _block(block, x, causal=False)


def encode_text(clip: Any, tokens: Tensor) -> Tensor:
    """Embed texts, not normalised; padding behind the longest of them is not computed.

    Args:
        clip: Any open_clip model.
        tokens: `(b, context)` ids, zero padded.
    """
    from open_clip.model import CLIP

    plain = (
        type(clip) is CLIP
        and clip.text_pool_type == "argmax"
        and clip.attn_mask is not None
        and all(_is_plain(block) for block in clip.transformer.resblocks)
    )
    if not plain:
        return clip.encode_text(tokens)
    tower: Any = clip
    ends = tokens.argmax(1)
    length = int(ends.max()) + 1
    dtype = tower.transformer.get_cast_dtype()
    x = tower.token_embedding(tokens[:, :length]).to(dtype)
    x = x + tower.positional_embedding[:length].to(dtype)
    for block in tower.transformer.resblocks:
        x = _block(block, x, causal=True)
    x = tower.ln_final(x)[torch.arange(len(x), device=x.device), ends]
    projection = tower.text_projection
    if projection is None:
        return x
    return projection(x) if isinstance(projection, nn.Linear) else x @ projection


def uses_quick_gelu(clip: Any) -> bool | None:
    """Tell whether the towers use QuickGELU; None where they are of another kind."""
    from open_clip.transformer import QuickGELU

    kinds = [type(m) for m in clip.modules() if isinstance(m, QuickGELU | nn.GELU)]
    if not kinds:
        return None
    return all(kind is QuickGELU for kind in kinds)


def resize_positions(table: Tensor, side: int, *, antialias: bool = False) -> Tensor:
    """Resample a position table `(1 + n * n, d)` to `(1 + side * side, d)`.

    The published code does not antialias here; open_clip's own function does, which changes
    upsampling too.
    """
    first, grid = table[:1], table[1:]
    old = round(len(grid) ** 0.5)
    if old * old != len(grid):
        raise ConfigError(f"positional_embedding has {len(grid)} patches, which is no square")
    if old == side:
        return table
    picture = grid.T.reshape(1, -1, old, old).float()
    picture = F.interpolate(
        picture, size=(side, side), mode="bicubic", align_corners=False, antialias=antialias
    )
    return torch.cat([first, picture.flatten(2)[0].T.to(table.dtype)])


def _is_vit(visual: Any) -> bool:
    from open_clip.transformer import VisionTransformer

    return (
        isinstance(visual, VisionTransformer)
        and all(_is_plain(block) for block in visual.transformer.resblocks)
        and not isinstance(visual.class_embedding, nn.Module)
    )


def _is_plain(block: Any) -> bool:
    from open_clip.transformer import ResidualAttentionBlock

    return (
        type(block) is ResidualAttentionBlock
        and not hasattr(block, "ln_1_kv")
        and type(block.attn) is nn.MultiheadAttention
    )


def _block(block: Any, x: Tensor, *, causal: bool) -> Tensor:
    x = x + block.ls_1(_attend(block.attn, block.ln_1(x), causal=causal))
    return x + block.ls_2(block.mlp(block.ln_2(x)))


def _attend(layer: nn.MultiheadAttention, x: Tensor, *, causal: bool) -> Tensor:
    qkv = F.linear(x, layer.in_proj_weight, layer.in_proj_bias)
    q, k, v = qkv.unflatten(-1, (3, layer.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    out = attention(q, k, v, causal=causal)
    return layer.out_proj(out.transpose(1, 2).flatten(2))


def _other_map(visual: Any, pixels: Tensor) -> Tensor:
    """Tokens of towers that open_clip takes from elsewhere; their attention is their own."""
    out = visual.forward_intermediates(
        pixels, indices=1, normalize_intermediates=False, intermediates_only=True,
        output_fmt="NCHW", output_extra_tokens=True,
    )  # fmt: skip
    patches = out["image_intermediates"][-1].flatten(2).transpose(1, 2)
    extra = out.get("image_intermediates_prefix")
    return patches if not extra else torch.cat([extra[-1], patches], 1)
