"""Attention of the segment_anything package (and of encoders written alike) through ours.

The package holds every score, adds two relative-position tensors of that size and stores the sum;
ours adds the positions inside the kernel. Weights, state-dict keys and results stay the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polyzoo.attention.api import attention
from polyzoo.attention.types import DecomposedBias

_PARTS = ("qkv", "proj", "num_heads", "scale", "use_rel_pos")


class GridAttention(nn.Module):
    """Self-attention over a grid of tokens with decomposed relative position.

    Takes over the parts of a `segment_anything.modeling.image_encoder.Attention`, under the same
    names, so that a state dict fits both.
    """

    def __init__(self, original: nn.Module, *, backend: str = "auto") -> None:
        """Take the layers and tables of an existing module; nothing is copied.

        Args:
            original: Has `qkv`, `proj`, `num_heads`, `scale`, `use_rel_pos`, and with the latter
                `rel_pos_h` and `rel_pos_w` `(2 * side - 1, d)`.
            backend: As for `attention`.

        Raises:
            TypeError: It lacks one of these.
        """
        super().__init__()
        missing = [name for name in _PARTS if not hasattr(original, name)]
        if missing:
            raise TypeError(
                f"{type(original).__name__} has no {', '.join(missing)}; expected the Attention "
                "of segment_anything's image encoder"
            )
        source: Any = original
        self.num_heads: int = source.num_heads
        self.scale: float = source.scale
        self.use_rel_pos: bool = source.use_rel_pos
        self.backend = backend
        self.qkv: nn.Module = source.qkv
        self.proj: nn.Module = source.proj
        if self.use_rel_pos:
            self.rel_pos_h: nn.Parameter = source.rel_pos_h
            self.rel_pos_w: nn.Parameter = source.rel_pos_w
        self.train(original.training)

    def forward(self, x: Tensor) -> Tensor:
        """Attend within each grid: `(b, H, W, c)` to the same shape."""
        b, rows, columns, _ = x.shape
        qkv = self.qkv(x).reshape(b, rows * columns, 3, self.num_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        bias = None
        if self.use_rel_pos:
            h_table = _by_distance(self.rel_pos_h, rows).to(q.dtype)
            w_table = _by_distance(self.rel_pos_w, columns).to(q.dtype)
            grid = q.unflatten(2, (rows, columns))
            rel_h = torch.einsum("bnhwc,hkc->bnhwk", grid, h_table).flatten(2, 3)
            rel_w = torch.einsum("bnhwc,wkc->bnhwk", grid, w_table).flatten(2, 3)
            bias = DecomposedBias(rel_h, rel_w)
        out = attention(q, k, v, bias=bias, scale=self.scale, backend=self.backend)
        return self.proj(out.transpose(1, 2).reshape(b, rows, columns, -1))


def use_attention(encoder: nn.Module, *, backend: str = "auto") -> int:
    """Replace the attention of every block of an image encoder, in place.

    Args:
        encoder: `segment_anything`'s `ImageEncoderViT`, or a whole `Sam` model, which holds one.
        backend: As for `attention`.

    Returns:
        How many modules were replaced.

    Raises:
        ValueError: There was nothing to replace.

    Example:
        >>> from segment_anything import sam_model_registry
        >>> sam = sam_model_registry["vit_b"]()
        >>> use_attention(sam.image_encoder)
        12
    """
    replaced = 0
    for module in list(encoder.modules()):
        for name, child in list(module.named_children()):
            if _is_grid_attention(child):
                setattr(module, name, GridAttention(child, backend=backend))
                replaced += 1
    if not replaced:
        raise ValueError(
            f"{type(encoder).__name__} holds no attention like that of segment_anything's image "
            "encoder (qkv, proj, num_heads, scale, use_rel_pos), or it was replaced before"
        )
    return replaced


def _is_grid_attention(module: nn.Module) -> bool:
    return not isinstance(module, GridAttention) and all(hasattr(module, name) for name in _PARTS)


def _by_distance(table: Tensor, side: int) -> Tensor:
    """`(side, side, d)`: row [i, j] is the table's entry for distance i - j.

    A table made for another side is stretched linearly, as the package does.
    """
    length = 2 * side - 1
    if table.shape[0] != length:
        stretched = F.interpolate(table.t()[None].float(), size=length, mode="linear")
        table = stretched[0].t().to(table.dtype)
    places = torch.arange(side, device=table.device)
    return table[places[:, None] - places[None, :] + (side - 1)]
