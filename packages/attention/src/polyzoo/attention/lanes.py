"""Copies beside the computation: a CUDA stream of its own, or nothing on a CPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class Mark:
    """A point in a stream's work; on a CPU everything before it is done already."""

    def __init__(self, event: torch.Event | None) -> None:
        self.event = event

    def wait(self) -> None:
        """Let the current stream wait for it."""
        if self.event is not None:
            torch.cuda.current_stream().wait_event(self.event)

    def synchronize(self) -> None:
        """Let the host wait for it."""
        if self.event is not None:
            self.event.synchronize()


class Lane:
    """Where copies in one direction are queued."""

    def __init__(self, device: torch.device) -> None:
        """Make a stream if the device has streams."""
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def mark(self) -> Mark:
        """Mark the end of what is queued here."""
        return Mark(None if self._stream is None else self._stream.record_event())

    def mark_current(self) -> Mark:
        """Mark the end of what is queued in the current stream."""
        if self._stream is None:
            return Mark(None)
        return Mark(torch.cuda.current_stream(self._stream.device).record_event())

    def uses(self, *tensors: Tensor) -> None:
        """Keep the memory of tensors from being given away while something here may use it."""
        if self._stream is not None:
            for tensor in tensors:
                tensor.record_stream(self._stream)

    def timed(self, copy: Callable[[], None]) -> Callable[[], float]:
        """Queue copies; returns what waits for them and tells their seconds."""
        if self._stream is None:
            before = time.perf_counter()
            copy()
            seconds = time.perf_counter() - before
            return lambda: seconds
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record(self._stream)
        copy()
        stop.record(self._stream)

        def wait() -> float:
            stop.synchronize()
            return start.elapsed_time(stop) / 1e3

        return wait

    @contextmanager
    def after(self, *marks: Mark | None) -> Iterator[None]:
        """Queue what is done inside here, behind the marks."""
        if self._stream is None:
            yield
            return
        for mark in marks:
            if mark is not None and mark.event is not None:
                self._stream.wait_event(mark.event)
        with torch.cuda.stream(self._stream):
            yield

    def copy_out(self, target: Tensor, source: Tensor) -> None:
        """Copy what the current stream has made into host memory; the source may change at once."""
        if self._stream is None:
            target.copy_(source)
            return
        kept = source.contiguous() if not source.is_contiguous() else source.clone()
        ready = self.mark_current()
        with self.after(ready):
            if target.is_contiguous():
                target.copy_(kept, non_blocking=True)
            else:  # part of a block: head by head, each dense
                for pair in range(target.shape[0] * target.shape[1]):
                    item, head = divmod(pair, target.shape[1])
                    target[item, head].copy_(kept[item, head], non_blocking=True)
        self.uses(kept)
