"""Where a pipeline's parts are and how long its stages take."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn


@dataclass
class StageTimes:
    """Seconds and peak memory of each stage of a run.

    Example:
        >>> times = StageTimes(torch.device("cuda"))
        >>> with times.stage("text"):
        ...     encode()
        >>> times.seconds["text"]
    """

    device: torch.device
    enabled: bool = True
    """Waiting for the device at every border costs a little: off unless asked for."""
    seconds: dict[str, float] = field(default_factory=dict)
    peak_bytes: dict[str, int] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time what runs inside; a stage that comes again adds up."""
        if not self.enabled:
            yield
            return
        self._settle(reset=True)
        start = time.perf_counter()
        try:
            yield
        finally:
            self._settle(reset=False)
            spent = time.perf_counter() - start
            self.seconds[name] = self.seconds.get(name, 0.0) + spent
            if self.device.type == "cuda":
                peak = torch.cuda.max_memory_allocated(self.device)
                self.peak_bytes[name] = max(self.peak_bytes.get(name, 0), peak)

    def _settle(self, *, reset: bool) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            if reset:
                torch.cuda.reset_peak_memory_stats(self.device)


@contextmanager
def visiting(module: nn.Module | None, device: torch.device, *, staged: bool) -> Iterator[None]:
    """Have a module on the device inside the block, and off it afterwards where staged.

    Args:
        module: None does nothing.
        device: Where it works.
        staged: Whether parts take turns on the device, as little memory demands.
    """
    if module is None or not staged:
        yield
        return
    module.to(device)
    try:
        yield
    finally:
        module.to("cpu")
        if device.type == "cuda":
            torch.cuda.empty_cache()
