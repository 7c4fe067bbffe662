"""Source files, read into units or into a reason why not. Torch-free."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from polyzoo.core.errors import DataError, MissingExtraError
from polyzoo.sea.search.layout import content_hash
from polyzoo.sea.search.units import Unit, extract_units
from polyzoo.sea.search.walk import SourceFile, reason_to_skip
from polyzoo.sea.splitting.languages import decode_source

Task = tuple[SourceFile, str | None]
"""A file, and the hash of the content that is known already."""

_FILES_PER_TASK = 16
_TASKS_AHEAD = 8
_MIN_FILES = 200


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadFile:
    """What a file held at the moment it was read."""

    source: SourceFile
    read_ns: int
    """When; 0 where the reason to skip it may go away although the file stays the same."""
    hash: str
    size: int
    units: tuple[Unit, ...] = ()
    skip: str | None = None
    """Why its content is not indexed."""
    problem: str | None = None
    """What was wrong although it is indexed."""


def read_file(root: Path, source: SourceFile, *, known_hash: str | None = None) -> ReadFile | None:
    """Read a file of a repository and cut it into units; None if it has vanished.

    With `known_hash`, a file that still has that content comes back without units, unparsed.
    """
    read_ns = time.time_ns()
    try:
        data = (root / source.path).read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        skip = f"unreadable file ({error.strerror})"
        return ReadFile(source=source, read_ns=0, hash="", size=source.size, skip=skip)
    content, size = content_hash(data), len(data)
    if content == known_hash:
        return ReadFile(source=source, read_ns=read_ns, hash=content, size=size)
    skip, problem, units = reason_to_skip(data, source.path), None, ()
    if skip is None:
        try:
            text = decode_source(data, path=source.path)
        except DataError as error:
            # One odd byte in a comment is no reason to lose the file; saying so is enough.
            text = data.decode("utf-8-sig", "replace")
            problem = f"{error}; indexed with replacement characters"
        try:
            units = tuple(extract_units(text, language=source.language, path=source.path))
        except MissingExtraError as error:
            skip, read_ns = f"grammar missing ({error})", 0
        except DataError as error:
            skip = str(error)
    return ReadFile(
        source=source,
        read_ns=read_ns,
        hash=content,
        size=size,
        units=units,
        skip=skip,
        problem=problem,
    )


def read_files(root: Path, tasks: Sequence[Task], *, jobs: int) -> Iterator[ReadFile | None]:
    """Read many files, in order, in `jobs` processes where there are enough of them.

    Only a bounded number of results waits to be taken.
    """
    if jobs == 1 or len(tasks) < _MIN_FILES:
        for source, known_hash in tasks:
            yield read_file(root, source, known_hash=known_hash)
        return
    starts = deque(range(0, len(tasks), _FILES_PER_TASK))
    # Not forked: this process has threads (a model may be loading), whose locks would be copied.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_begin_worker) as pool:
        waiting: deque[Future[list[ReadFile | None]]] = deque()
        try:
            while starts or waiting:
                while starts and len(waiting) < jobs * _TASKS_AHEAD:
                    start = starts.popleft()
                    some = tasks[start : start + _FILES_PER_TASK]
                    waiting.append(pool.submit(partial(_read_some, root, some)))
                yield from waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def _read_some(root: Path, tasks: Sequence[Task]) -> list[ReadFile | None]:
    return [read_file(root, source, known_hash=known_hash) for source, known_hash in tasks]


def _begin_worker() -> None:
    """Leave Ctrl-C to the parent, and end with it, however it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
