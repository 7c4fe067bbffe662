"""Whole weights out of pieces: for adapters, evaluation and the finished model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from polyzoo.core.seeding import capture_random_state, restore_random_state
from polyzoo.training import lora
from polyzoo.training.ema import Ema, Master
from polyzoo.training.strategies.base import Strategy
from polyzoo.training.world import World


@torch.no_grad()
def whole_weights(strategy: Strategy, ema: Ema | None = None) -> Iterator[tuple[str, Tensor]]:
    """Yield the trainable parameters in full, in fp32, one at a time; all processes together.

    Args:
        strategy: Whose weights.
        ema: Take the averages in their place.
    """
    groups: Iterable[list[Master]] = strategy.master_groups() if ema is None else ema.groups
    for group in groups:
        for master in group:
            if strategy.is_whole:
                yield master.name, master.tensor.detach()
            else:
                yield master.name, _joined(master, strategy.world, strategy.device)


def _joined(master: Master, world: World, device: torch.device) -> Tensor:
    size = math.prod(master.shape)
    values = master.tensor.detach().reshape(-1).to(device)
    if world.size > 1:
        # Ranges differ in length; a sum over disjoint ranges needs no padding.
        full = torch.zeros(size, dtype=values.dtype, device=device)
        full[master.start : master.start + values.numel()] = values
        values = world.total(full)
    return values.reshape(master.shape)


@contextmanager
def collected_adapter(strategy: Strategy) -> Iterator[dict[str, Tensor] | None]:
    """Give the trainable parameters in full where the model carries adapters, else None."""
    if not lora.is_adapted(strategy.model):
        yield None
        return
    yield {name: weights.cpu() for name, weights in whole_weights(strategy)}


class Replica:
    """A plain copy of a spread model, in process 0, to be called in any way.

    Example:
        >>> replica = Replica(strategy, build=lambda: Net())
        >>> model = replica.filled(ema)
    """

    def __init__(self, strategy: Strategy, build: Callable[[], nn.Module]) -> None:
        self.strategy = strategy
        self.build = build
        self._model: nn.Module | None = None

    @torch.no_grad()
    def filled(self, ema: Ema | None = None) -> nn.Module | None:
        """Return the copy with today's weights, or their averages; None but in process 0."""
        main = self.strategy.world.is_main
        model = self._built() if main else None
        targets = dict(model.named_parameters()) if model is not None else {}
        for name, weights in whole_weights(self.strategy, ema):
            if main:
                targets[name].copy_(weights)
        if model is None:
            return None
        buffers = dict(self.strategy.model.named_buffers())
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
        return model

    def _built(self) -> nn.Module:
        if self._model is None:
            states = capture_random_state()
            try:
                self._model = self.build().to(self.strategy.device)
            finally:
                restore_random_state(states)
        return self._model
