"""A moving average of the weights, in fp32, evaluated and shipped in their place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from polyzoo.training.config import EmaConfig


@dataclass(frozen=True, slots=True)
class Master:
    """One parameter's fp32 weights as held on this device."""

    name: str
    """As `named_parameters` calls it."""
    tensor: Tensor
    """The weights themselves, not a copy."""


class Ema:
    """Follows the master weights; costs one fp32 copy of them.

    Example:
        >>> ema = Ema(strategy.masters(), EmaConfig(decay=0.999))
        >>> ema.update(step=1)
        >>> with ema.applied():
        ...     evaluate(model)
    """

    def __init__(self, masters: list[Master], config: EmaConfig) -> None:
        if config.decay is None:
            raise ValueError("decay=None keeps no average")
        self.decay = config.decay
        self.warmup = config.warmup
        self.names = [master.name for master in masters]
        self.masters = [master.tensor for master in masters]
        self.averages = [tensor.detach().clone() for tensor in self.masters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the average toward the weights after optimizer step `step`, counted from 1."""
        decay = min(self.decay, (1 + step) / (10 + step)) if self.warmup else self.decay
        torch._foreach_lerp_(self.averages, self.masters, 1 - decay)  # pyright: ignore[reportPrivateImportUsage]

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Put the average in the model's place inside the block."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    def swap(self) -> None:
        """Exchange average and weights; no numbers are copied."""
        for index, master in enumerate(self.masters):
            average = self.averages[index]
            self.averages[index] = master.data
            master.data = average
