"""Loggers that stay silent until asked, and one progress bar for terminals and log files alike."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

from tqdm import tqdm

T = TypeVar("T")

_quiet: ContextVar[bool] = ContextVar("polyzoo_quiet", default=False)


def get_logger(name: str) -> logging.Logger:
    """Return a library logger; it prints nothing unless the application configures logging.

    Args:
        name: The module's `__name__`.
    """
    logger = logging.getLogger(name)
    package = logging.getLogger(".".join(name.split(".")[:2]))
    if not any(isinstance(handler, logging.NullHandler) for handler in package.handlers):
        package.addHandler(logging.NullHandler())
    return logger


@contextmanager
def quietly(quiet: bool = True) -> Iterator[None]:
    """Silence every progress display inside the block."""
    token = _quiet.set(quiet or _quiet.get())
    try:
        yield
    finally:
        _quiet.reset(token)


def is_quiet() -> bool:
    """Tell whether the caller asked for no progress."""
    return _quiet.get()


def progress(
    iterable: Iterable[T] | None = None,
    *,
    total: int | None = None,
    description: str,
    unit: str = "it",
    quiet: bool = False,
) -> tqdm[Any]:
    """Show on stderr how far the work is: a bar in a terminal, a line now and then elsewhere.

    Args:
        iterable: What to walk through; without it call `update(n)` yourself.
        total: Number of steps, where the iterable does not know.
        description: What is being done.
        unit: What one step is called.
        quiet: Show nothing; also so inside `quietly()`.

    Example:
        >>> for item in progress(items, description="Encoding"):
        ...     encode(item)
    """
    silent = quiet or _quiet.get()
    bar = tqdm if silent or sys.stderr.isatty() else _Lines
    return bar(
        iterable,
        total=total,
        desc=description,
        unit=unit,
        disable=silent,
        file=sys.stderr,
        dynamic_ncols=True,
    )


class _Lines(tqdm):  # not generic at run time
    """Writes whole lines, at most one in ten seconds and always the last: fit for a log file."""

    monitor_interval = 0  # no thread: lines need no refresh

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._next_line = time.monotonic() + 10.0
        self._shown = 0
        super().__init__(*args, **kwargs)

    def display(self, *args: Any, **kwargs: Any) -> None:  # noqa: ARG002 - tqdm's signature
        done = self.total is not None and self.n >= self.total
        if self.n != self._shown and (done or time.monotonic() >= self._next_line):
            self._write_line()

    def close(self) -> None:
        if not self.disable:
            self.disable = True
            if self.n != self._shown:
                self._write_line()

    def clear(self, *args: Any, **kwargs: Any) -> None:
        """There is no bar to clear."""

    def _write_line(self) -> None:
        self._next_line = time.monotonic() + 10.0
        self._shown = self.n
        values = {**self.format_dict, "ncols": None, "bar_format": _LINE}
        self.fp.write(f"{self.format_meter(**values)}\n")
        self.fp.flush()


_LINE = "{desc}: {n_fmt}/{total_fmt} {unit} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
