"""A process that makes no progress says where it stands, and ends."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

EXIT_STUCK = 1


class Watchdog:
    """Ends the process when nobody has called `beat` for a while.

    Example:
        >>> with ending_when_stuck(30) as watchdog:
        ...     watchdog.beat("forward pass")
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.phase = "setup"
        self._last = time.monotonic()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        """Begin to watch."""
        self._thread.start()

    def stop(self) -> None:
        """Watch no longer."""
        self._over.set()

    def beat(self, phase: str) -> None:
        """Say that there is progress, and what comes next."""
        self.phase = phase
        self._last = time.monotonic()

    def _watch(self) -> None:
        while not self._over.wait(min(self.seconds / 4, 30.0)):
            idle = time.monotonic() - self._last
            if idle > self.seconds:
                self._end(idle)

    def _end(self, idle: float) -> None:
        rank = os.environ.get("RANK", "0")
        sys.stderr.write(
            f"E-HANG: process {rank} has made no progress for {idle:.0f} s in the {self.phase}\n"
            "  why: another process may be gone, a drive or a data source may not answer\n"
            "  fix: the stacks below say where it waits; the same command resumes from the last "
            "checkpoint; raise tier.timeout if a step takes that long\n"
        )
        faulthandler.dump_traceback(all_threads=True)
        sys.stderr.flush()
        os._exit(EXIT_STUCK)


@contextmanager
def ending_when_stuck(minutes: float) -> Iterator[Watchdog]:
    """Watch over the block; it must call `beat` more often than every so many minutes."""
    watchdog = Watchdog(minutes * 60)
    watchdog.start()
    try:
        yield watchdog
    finally:
        watchdog.stop()
