"""One source file, read into units or into a reason why not. Torch-free."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from polyzoo.core.errors import DataError, MissingExtraError
from polyzoo.sea.index import content_hash
from polyzoo.sea.languages import decode_source
from polyzoo.sea.units import Unit, extract_units
from polyzoo.sea.walk import SourceFile, reason_to_skip


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
