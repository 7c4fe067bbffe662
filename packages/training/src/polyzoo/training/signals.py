"""Signals ask the run to stop; the loop finishes its step, saves, and says so."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Self

ASKING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """Notes the first SIGTERM, SIGINT or SIGUSR1; a second SIGINT aborts at once.

    Outside the main thread Python delivers no signals, and nothing is installed. Former handlers
    come back at the end of the block.

    Example:
        >>> with StopRequest() as stop:
        ...     while not stop.requested:
        ...         step()
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._former: dict[signal.Signals, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether a signal has come."""
        return self.name is not None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in ASKING:
                self._former[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)
        self._former.clear()

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        if number == signal.SIGINT and self.name == signal.SIGINT.name:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name


@contextmanager
def held_back() -> Iterator[None]:
    """Let the asking signals wait until the end of the block; processes it starts keep waiting.

    Example:
        >>> with held_back():
        ...     process.start()
    """
    former = signal.pthread_sigmask(signal.SIG_BLOCK, ASKING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, former)
