"""Large linear layers in tiles, so that ZeRO gathers a tile at a time (arXiv 2104.07857, 5.1.3)."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from polyzoo.core.log import get_logger

logger = get_logger(__name__)


class TiledLinear(nn.Module):
    """The same function as a linear layer, computed in tiles of its outputs.

    Under ZeRO-3 the working memory of the layer falls by the number of tiles, because each tile's
    weights and gradients are gathered and released by themselves. State dicts are those of the
    whole layer, so weights go to and from models without tiles.

    Example:
        >>> layer = nn.Linear(8, 32)
        >>> tiled = TiledLinear(layer, tiles=4)
        >>> tiled(torch.ones(1, 8)).shape
        torch.Size([1, 32])
    """

    def __init__(self, layer: nn.Linear, *, tiles: int) -> None:
        super().__init__()
        self.in_features = layer.in_features
        self.out_features = layer.out_features
        biased = layer.bias is not None
        weights = layer.weight.detach().tensor_split(tiles)
        biases = layer.bias.detach().tensor_split(tiles) if biased else [None] * tiles
        self.tiles = nn.ModuleList()
        for weight, bias in zip(weights, biases, strict=True):
            tile = nn.Linear(
                layer.in_features, len(weight), bias=biased,
                device=weight.device, dtype=weight.dtype,
            )  # fmt: skip
            with torch.no_grad():
                tile.weight.copy_(weight)
                if bias is not None:
                    tile.bias.copy_(bias)
            tile.weight.requires_grad_(layer.weight.requires_grad)
            if biased:
                tile.bias.requires_grad_(layer.bias.requires_grad)
            self.tiles.append(tile)
        self.register_state_dict_post_hook(_join)
        self.register_load_state_dict_pre_hook(_split)

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs of all tiles, side by side."""
        return torch.cat([tile(x) for tile in self.tiles], dim=-1)


def _join(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    assert isinstance(module, TiledLinear)  # noqa: S101 - registered there
    for name in ("weight", "bias"):
        keys = [f"{prefix}tiles.{index}.{name}" for index in range(len(module.tiles))]
        if keys[0] in state:
            state[f"{prefix}{name}"] = torch.cat([state.pop(key) for key in keys])


def _split(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    assert isinstance(module, TiledLinear)  # noqa: S101 - registered there
    for name in ("weight", "bias"):
        whole = state.pop(f"{prefix}{name}", None)
        if whole is not None:
            for index, part in enumerate(whole.tensor_split(len(module.tiles))):
                state[f"{prefix}tiles.{index}.{name}"] = part


def tile_linears(model: nn.Module, *, tiles: int, above: int) -> list[str]:
    """Put tiled layers in the place of a model's large linear layers; return their names.

    Layers that share a parameter with another module stay as they are.

    Args:
        model: Is changed in place.
        tiles: Of each layer.
        above: Elements of a weight from which its layer is tiled.
    """
    owners = Counter(
        parameter for module in model.modules() for parameter in module.parameters(recurse=False)
    )
    changed: list[str] = []
    for path, parent in list(model.named_modules()):
        for name, child in list(parent.named_children()):
            if type(child) is not nn.Linear or child.weight.numel() < above:
                continue
            if all(owners[parameter] == 1 for parameter in child.parameters()):
                setattr(parent, name, TiledLinear(child, tiles=tiles))
                changed.append(f"{path}.{name}" if path else name)
    logger.info("%d linear layers are computed in %d tiles", len(changed), tiles)
    return changed
