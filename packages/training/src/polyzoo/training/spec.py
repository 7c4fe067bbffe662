"""A model's sizes from the module itself, built on the meta device, where nothing takes memory."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from polyzoo.core.errors import ConfigError
from polyzoo.core.seeding import capture_random_state, restore_random_state
from polyzoo.training.plan import ModelSpec
from polyzoo.training.strategies.blocks import full_size, shard_blocks


def spec_of(model: nn.Module, *, width: int | None = None, vocabulary: int = 0) -> ModelSpec:
    """Return the sizes of a module.

    Args:
        model: Anywhere, also on the meta device.
        width: Channels between its blocks; the last dimension of a block's first norm or linear
            layer where not given.
        vocabulary: Outputs of a token classifier.
    """
    parameters = list(model.parameters())
    blocks = shard_blocks(model)
    sizes = [sum(full_size(p) for p in block.parameters()) for block in blocks]
    return ModelSpec(
        trainable=sum(full_size(p) for p in parameters if p.requires_grad),
        frozen=sum(full_size(p) for p in parameters if not p.requires_grad),
        largest_parameter=max((full_size(p) for p in parameters), default=0),
        largest_block=max(sizes, default=sum(map(full_size, parameters))),
        layers=max(len(blocks), 1),
        width=_width(blocks) if width is None else width,
        vocabulary=vocabulary,
    )


def _width(blocks: list[nn.Module]) -> int:
    """Return the channels of the stream between blocks, as far as their layers tell."""
    for block in blocks:
        for module in block.modules():
            if isinstance(module, nn.LayerNorm):
                return int(module.normalized_shape[-1])
            if isinstance(module, nn.Linear):
                return int(module.in_features)
    return 0


def spec_on_meta(
    build: Callable[[], nn.Module], *, width: int | None = None, vocabulary: int = 0
) -> ModelSpec:
    """Return the sizes of what a function builds, without the memory.

    Raises:
        ConfigError: The function does not return a module.
    """
    states = capture_random_state()
    try:
        with torch.device("meta"):
            model = build()
    finally:
        restore_random_state(states)
    if not isinstance(model, nn.Module):
        raise ConfigError(f"{build!r} returned a {type(model).__name__}, not a torch module")
    return spec_of(model, width=width, vocabulary=vocabulary)
