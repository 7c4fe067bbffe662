"""How fast the run goes, evaluation and saving left out."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from polyzoo.training.checkpoint.state import Counters


class Clock:
    """Times the steps of a log window and adds up the run's training time in its counters.

    Example:
        >>> clock = Clock(counters)
        >>> take_steps()
        >>> clock.flush()
        >>> clock.rates()["samples_per_second"]
    """

    def __init__(self, counters: Counters) -> None:
        self.counters = counters
        self.restart()

    def restart(self) -> None:
        """Begin a window."""
        self.waited = 0.0
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

    def rates(self) -> dict[str, float]:
        """Return the window's speed; tokens only where the step function counts them."""
        busy = max(self._busy, 1e-9)
        steps = max(self.counters.step - self._step, 1)
        rates = {
            "samples_per_second": (self.counters.samples - self._samples) / busy,
            "step_seconds": self._busy / steps,
            "data_seconds": self.waited / steps,
            "seconds": self.counters.seconds,
        }
        tokens = self.counters.tokens - self._tokens
        return {**rates, "tokens_per_second": tokens / busy} if tokens else rates
