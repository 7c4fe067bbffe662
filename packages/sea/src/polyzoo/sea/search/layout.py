"""Where an index is on disk: its folder, its pointer, its files, its lock. Torch-free."""

from __future__ import annotations

import hashlib
import json
import os
import re
from contextlib import suppress
from pathlib import Path

from polyzoo.core.assets.cache import cache_home
from polyzoo.core.errors import DataError
from polyzoo.core.io import atomic_write

FORMAT = 1
POINTER = "index.json"


def default_folder(repo: Path) -> Path:
    """Return where the index of a repository goes unless the caller says otherwise.

    A cache folder keyed by the repository's path, so that nothing is written into the repository
    and read-only ones can be indexed: $POLYZOO_HOME, or ~/.cache/polyzoo, then sea/index/NAME-HASH.
    """
    repo = repo.resolve()
    return cache_home() / "sea" / "index" / _slug(repo)


def find_folder(start: Path) -> Path:
    """Return the index of a repository, or of the nearest folder above that has one.

    Raises:
        DataError: none of them has.
    """
    start = start.resolve()
    for repo in (start, *start.parents):
        folder = default_folder(repo)
        if current_generation(folder) is not None:
            return folder
    raise DataError(f"{start} is not indexed; make an index with: polyzoo sea index {start}")


def disk_bytes(folder: Path) -> int:
    """Return the size of everything in an index's folder."""
    sizes = 0
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):  # a writer may be at work
            sizes += path.stat().st_size if path.is_file() else 0
    return sizes


def store_name(folder: Path) -> str:
    """Name an index on a server that may hold many."""
    return f"polyzoo-{_slug(folder.resolve())}"


def current_generation(folder: Path) -> int | None:
    """Return the generation readers use, None where there is no index.

    Raises:
        DataError: the pointer is damaged or of another format.
    """
    path = folder / POINTER
    try:
        pointer = json.loads(path.read_bytes())
        number, written = int(pointer["generation"]), pointer["format"]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} is damaged ({error}); remove the folder and build the index again"
        ) from None
    if written != FORMAT:
        raise DataError(
            f"{path} is of format {written}, this version reads {FORMAT}; remove the folder and "
            "build the index again"
        )
    return number


def switch_generation(folder: Path, generation: int) -> None:
    """Make readers use another generation, at one instant."""
    with atomic_write(folder / POINTER, "w") as file:
        json.dump({"format": FORMAT, "generation": generation}, file)


def catalog_path(folder: Path, generation: int) -> Path:
    """Return the file of a generation's catalog."""
    return folder / f"catalog-{generation}.sqlite"


def lock_holder(folder: Path) -> int | None:
    """Return the process that writes an index, if one does.

    Reads what the lock file says instead of trying the lock, which would turn a writer away.
    """
    try:
        found = re.match(r"process (\d+)", (folder / ".lock").read_text())
    except OSError:
        return None
    if not found:
        return None
    process = int(found.group(1))
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return None
    except PermissionError:  # alive, and somebody else's
        pass
    return process


def file_hash(path: Path) -> str:
    """Return a hash of a file's bytes, "" where it cannot be read."""
    try:
        return content_hash(path.read_bytes())
    except OSError:
        return ""


def content_hash(data: bytes) -> str:
    """Return a hash of bytes."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _slug(path: Path) -> str:
    name = re.sub(r"[^A-Za-z0-9_]+", "-", path.name).strip("-")[:40] or "root"
    return f"{name}-{hashlib.blake2b(os.fsencode(path), digest_size=6).hexdigest()}"
