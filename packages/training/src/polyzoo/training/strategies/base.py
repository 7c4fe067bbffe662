"""What the loop asks of a way to spread a model over devices."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from polyzoo.training.checkpoint.flat import FlatReader, Shard
from polyzoo.training.ema import Master
from polyzoo.training.world import World


@dataclass(frozen=True, slots=True)
class UpdateReport:
    """What an optimizer step saw; on the device, so that reporting it does not wait."""

    grad_norm: Tensor
    """Global norm before clipping, fp32 scalar."""
    bad: Tensor
    """1 where the loss or a gradient was not finite and the policy must act, else 0; scalar."""


class Strategy(Protocol):
    """One way to hold weights, gradients and optimizer state."""

    name: str
    world: World
    device: torch.device
    dtype: torch.dtype
    """Of the forward pass."""
    module: Any
    """What the step function calls."""
    model: nn.Module
    """The model itself, whose parameters may be in pieces."""
    is_whole: bool
    """Whether this process holds every parameter in full, in `model`."""

    def forward_context(self) -> AbstractContextManager[object]:
        """Return the context of a forward pass."""
        ...

    def call_method(self, model: Any, method: str, *arguments: Any, **named: Any) -> Any:
        """Call a method of the model other than forward."""
        ...

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradients of a micro-batch; `last` says that the optimizer step follows."""
        ...

    def optimizer_step(self, *, lr: float, loss: Tensor, divisor: Tensor | float) -> UpdateReport:
        """Divide the gradients, clip them, update the weights and clear the gradients.

        Args:
            lr: Learning rate of this step, before any group's own scale.
            loss: Of the whole step, to see whether it is finite.
            divisor: What the summed gradients are divided by.
        """
        ...

    def parameters_without_gradient(self) -> list[str]:
        """Return the trainable parameters that the backward pass has not reached."""
        ...

    def master_groups(self) -> Iterator[list[Master]]:
        """Yield the fp32 weights held here, in an order that never changes.

        A group is valid until the next one is asked for: it may come from a drive.
        """
        ...

    def local_shards(self) -> Iterator[Shard]:
        """Return every range of weights, optimizer state and buffers held here."""
        ...

    def load_shards(self, reader: FlatReader, state: dict[str, Any]) -> None:
        """Take weights, optimizer state and buffers from a checkpoint."""
        ...

    def plain_state(self) -> dict[str, Any]:
        """Return what `load_shards` needs beside tensors, as JSON values."""
        ...

    def memory_report(self) -> dict[str, float]:
        """Return peak bytes in use by tier."""
        ...

    def close(self) -> None:
        """Give back what the run's end does not: hooks, pinned memory, files on a drive."""
        ...
