"""Files that are either wholly written or not there: atomic files and folders, locks, hashes."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from polyzoo.core.errors import LockedError, PolyzooError

_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Give a temporary path beside `path`, to be written by name; move it into place on success.

    On any error the old file stays and the temporary one is removed. Missing parent folders are
    made. A symbolic link at `path` is replaced, never written through.
    """
    path = Path(path)
    temporary = _temporary_beside(path)
    try:
        with _explaining(path, temporary):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            _fsync(temporary)
            temporary.replace(path)
            fsync_folder(path.parent)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_write(
    path: str | Path, mode: str = "wb", *, encoding: str | None = None
) -> Iterator[IO[Any]]:
    """Open a file that appears at `path` only once it is complete and on disk.

    Args:
        path: Where the file goes.
        mode: "wb" or "w".
        encoding: Of a text file; UTF-8 where not given.

    Example:
        >>> with atomic_write("out/report.json", "w") as file:
        ...     file.write("{}")
    """
    if mode not in ("w", "wb"):
        raise ValueError(f"mode={mode!r} must be 'w' or 'wb': an atomic file is written anew")
    if mode == "w":
        encoding = encoding or "utf-8"
    with atomic_path(path) as temporary, temporary.open(mode, encoding=encoding) as file:
        yield file


@contextmanager
def atomic_folder(path: str | Path, *, replace: bool = False) -> Iterator[Path]:
    """Give an empty temporary folder; rename it to `path` on success, remove it on error.

    Args:
        path: Where the folder goes.
        replace: Whether a folder already there gives way. It stays until the new one is complete.
    """
    path = Path(path)
    if not replace and path.exists():
        raise PolyzooError(f"{path} already exists; remove it or choose another folder")
    temporary = _temporary_beside(path)
    try:
        with _explaining(path, temporary):
            temporary.mkdir(parents=True)
            yield temporary
            for parent, _, names in os.walk(temporary):
                for name in names:
                    _fsync(Path(parent, name))
                fsync_folder(Path(parent))
            if path.exists():
                _exchange(temporary, path)  # the old one now has the temporary name, and goes
            else:
                temporary.rename(path)
            fsync_folder(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _explaining(path: Path, temporary: Path | None = None) -> Iterator[None]:
    """Turn what the operating system refuses about `path` into an error that says what to do."""
    ours = {str(place) for place in (path, *path.parents)} | {str(temporary)}
    try:
        yield
    except OSError as error:
        # A body may fail on files of its own, such as a missing input: not ours to reword.
        if error.errno in _DISK_FULL or error.filename in ours:
            raise _write_error(path, temporary, error) from error
        raise


class FolderLock:
    """Keep a folder to one process at a time; the kernel frees it when the process dies.

    Raises LockedError naming the process that holds it. Threads of one process exclude each other.

    Example:
        >>> with FolderLock(index_folder, purpose="indexing"):
        ...     update(index_folder)
    """

    def __init__(self, path: str | Path, *, purpose: str) -> None:
        self.path = Path(path)
        self.purpose = purpose
        self._file: IO[str] | None = None

    def __enter__(self) -> Self:
        with _explaining(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            file = (self.path / ".lock").open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read(300).strip() or "another process"
            file.close()
            raise LockedError(
                f"{self.path} is in use by {holder}; wait for it, or stop it, then try again"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} ({self.purpose})")
        file.flush()
        self._file = file
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file is not None:
            self._file.truncate(0)
            # Unlock explicitly: a forked child shares the open file and would keep the lock alive.
            fcntl.flock(self._file, fcntl.LOCK_UN)
            self._file.close()
            self._file = None


def sha256_file(path: str | Path) -> str:
    """Return the SHA-256 of a file's bytes in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync_folder(path: str | Path) -> None:
    """Make renames inside a folder survive a power cut."""
    _fsync(Path(path))


def remove_stale(path: str | Path) -> None:
    """Remove what a killed process left of unfinished writes of `path`; hold a lock meanwhile."""
    path = Path(path)
    for stale in path.parent.glob(f".{path.name}.*.tmp"):
        if stale.is_dir() and not stale.is_symlink():
            shutil.rmtree(stale, ignore_errors=True)
        else:
            stale.unlink(missing_ok=True)


def _temporary_beside(path: Path) -> Path:
    return path.parent / f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp"


def _exchange(first: Path, second: Path) -> None:
    """Swap two folders; in one step where the system can, so that a reader always finds one."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if rename and rename(here, os.fsencode(first), here, os.fsencode(second), exchange) == 0:
        return
    aside = _temporary_beside(second)
    second.rename(aside)
    first.rename(second)
    aside.rename(first)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_error(path: Path, temporary: Path | None, error: OSError) -> PolyzooError:
    if error.errno not in _DISK_FULL:
        return PolyzooError(f"{path} cannot be written: {error.strerror or error}")
    written = _size(temporary) if temporary is not None else 0
    existing = next(folder for folder in (path, *path.resolve().parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    limit = "the file size limit was reached" if error.errno == errno.EFBIG else "the disk is full"
    return PolyzooError(
        f"{path} cannot be written: {limit} after {written:,} bytes ({free:,} bytes are free); "
        "free some space or choose another folder"
    )


def _size(path: Path) -> int:
    with suppress(OSError):
        if path.is_dir():
            return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        return path.stat().st_size
    return 0
