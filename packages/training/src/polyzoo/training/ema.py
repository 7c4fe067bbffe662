"""A moving average of the weights, in fp32, evaluated and shipped in their place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from polyzoo.training.config import EmaConfig


@dataclass(frozen=True, slots=True)
class Master:
    """One parameter's fp32 weights as held in this process: all of them, or a range."""

    name: str
    """As `named_parameters` calls it."""
    tensor: Tensor
    """The weights themselves, not a copy; 1-D where they are a range."""
    start: int = 0
    """Index of the first value in the flattened parameter."""
    full_shape: tuple[int, ...] | None = None
    """Shape of the whole parameter; that of the tensor where not given."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole parameter."""
        return tuple(self.tensor.shape) if self.full_shape is None else self.full_shape


MasterGroups = Callable[[], Iterator[list[Master]]]
"""Masters in an order that never changes; each group is valid until the next is asked for."""


class Ema:
    """Follows the master weights; costs one fp32 copy of them, in host memory where they are.

    Example:
        >>> ema = Ema(strategy.master_groups, EmaConfig(decay=0.999))
        >>> ema.update(step=1)
        >>> with ema.applied():
        ...     evaluate(model)
    """

    @torch.no_grad()
    def __init__(self, master_groups: MasterGroups, config: EmaConfig) -> None:
        if config.decay is None:
            raise ValueError("decay=None keeps no average")
        self.decay = config.decay
        self.warmup = config.warmup
        self.master_groups = master_groups
        self.groups = [
            [replace(master, tensor=master.tensor.detach().clone()) for master in group]
            for group in master_groups()
        ]
        """The averages, laid out as the masters are."""

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the average toward the weights after optimizer step `step`, counted from 1."""
        decay = min(self.decay, (1 + step) / (10 + step)) if self.warmup else self.decay
        for averages, masters in zip(self.groups, self.master_groups(), strict=True):
            if masters:
                torch._foreach_lerp_(  # pyright: ignore[reportPrivateImportUsage]
                    [average.tensor for average in averages],
                    [master.tensor for master in masters],
                    1 - decay,
                )

    @property
    def averages(self) -> list[Master]:
        """All averages, in the masters' order."""
        return [average for group in self.groups for average in group]

    @torch.no_grad()
    def start_anew(self) -> None:
        """Set the averages to the weights."""
        for averages, masters in zip(self.groups, self.master_groups(), strict=True):
            for average, master in zip(averages, masters, strict=True):
                average.tensor.copy_(master.tensor)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Put the average in the model's place inside the block; for unsharded models."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    def swap(self) -> None:
        """Exchange average and weights; no numbers are copied."""
        for index, (averages, masters) in enumerate(
            zip(self.groups, self.master_groups(), strict=True)
        ):
            exchanged: list[Master] = []
            for average, master in zip(averages, masters, strict=True):
                weights = master.tensor.data
                master.tensor.data = average.tensor
                exchanged.append(replace(average, tensor=weights))
            self.groups[index] = exchanged
