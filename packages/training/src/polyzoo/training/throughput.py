"""How fast the run goes, evaluation and saving left out."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from polyzoo.training.checkpoint.state import Counters


class Clock:
    """Times the steps of a log window and adds up the run's training time in its counters.

    Example:
        >>> clock = Clock(counters)
        >>> take_steps()
        >>> clock.flush()
        >>> clock.rates()["samples_per_second"]
    """

    def __init__(self, counters: Counters, device: torch.device | str = "cpu") -> None:
        self.counters = counters
        self.device = torch.device(device)
        self.restart()

    def restart(self) -> None:
        """Begin a window."""
        self.waited = 0.0
        self._phases: dict[str, float] = {}
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._busy = 0.0
        self._samples = self.counters.samples
        self._tokens = self.counters.tokens
        self._step = self.counters.step
        self._mark = time.perf_counter()

    def flush(self) -> None:
        """Count the time until now."""
        now = time.perf_counter()
        self._busy += now - self._mark
        self.counters.seconds += now - self._mark
        self._mark = now

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time inside the block out."""
        self.flush()
        try:
            yield
        finally:
            self._mark = time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a part of a step: on the GPU by events, which do not wait, else by the clock."""
        if self.device.type != "cuda":
            started = time.perf_counter()
            yield
            self._phases[name] = self._phases.get(name, 0.0) + time.perf_counter() - started
            return
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        yield
        end.record()
        self._events.append((name, begin, end))

    def _phase_seconds(self, steps: int) -> dict[str, float]:
        """Return the mean seconds of each phase per step; call after the device has been read."""
        for name, begin, end in self._events:
            end.synchronize()
            self._phases[name] = self._phases.get(name, 0.0) + begin.elapsed_time(end) / 1e3
        self._events.clear()
        return {f"{name}_seconds": total / steps for name, total in self._phases.items()}

    def rates(self) -> dict[str, float]:
        """Return the window's speed; tokens only where the step function counts them."""
        busy = max(self._busy, 1e-9)
        steps = max(self.counters.step - self._step, 1)
        rates = {
            "samples_per_second": (self.counters.samples - self._samples) / busy,
            "step_seconds": self._busy / steps,
            "data_seconds": self.waited / steps,
            "seconds": self.counters.seconds,
            **self._phase_seconds(steps),
        }
        tokens = self.counters.tokens - self._tokens
        return {**rates, "tokens_per_second": tokens / busy} if tokens else rates
