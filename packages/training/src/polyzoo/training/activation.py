"""Activation checkpointing: blocks recompute their forward pass during the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from polyzoo.core.errors import ConfigError


@contextmanager
def recomputing(
    model: nn.Module, blocks: tuple[type[nn.Module], ...], *, reentrant: bool = False
) -> Iterator[int]:
    """Let every module of these classes keep only its inputs; undo it at the end of the block.

    Same numbers, dropout included; parameter names do not change. Gives the number of blocks.

    Args:
        model: The model.
        blocks: Classes of modules.
        reentrant: Use torch's older way, which parameters on a drive need: with the newer one and a
            single process, a gathered parameter is read again after its buffer has been reused.

    Raises:
        ConfigError: The model has none of them.
    """
    chosen = [module for module in model.modules() if isinstance(module, blocks)]
    if not chosen:
        names = ", ".join(block.__name__ for block in blocks) or "no class"
        raise ConfigError(
            f"activation_checkpointing: the model has no block of checkpoint_blocks ({names})"
        )
    for module in chosen:
        module.forward = partial(_recomputed, module.forward, reentrant)
    try:
        yield len(chosen)
    finally:
        for module in chosen:
            del module.forward


def _recomputed(forward: Callable[..., Any], reentrant: bool, *arguments: Any, **named: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*arguments, **named)
    if reentrant:
        return checkpoint(partial(forward, **named), *arguments, use_reentrant=True)
    return checkpoint(forward, *arguments, use_reentrant=False, **named)
