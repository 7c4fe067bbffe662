"""Unpack archives of strangers: no path leaves the folder, no bomb goes off, no link is made."""

from __future__ import annotations

import errno
import lzma
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO

from polyzoo.core.errors import DataError
from polyzoo.core.io import atomic_folder

_CHUNK = 2**20
_ZIP_SUFFIXES = (".zip", ".whl")


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What an archive may hold; every limit is counted on the bytes that really come out."""

    total_bytes: int = 2 * 2**30
    """Size of everything unpacked."""
    files: int = 100_000
    """Number of entries."""
    ratio: float = 200.0
    """Unpacked size over the archive's own size (1 MiB is always allowed)."""


DEFAULT_LIMITS = Limits()


@dataclass(frozen=True, slots=True)
class _Entry:
    name: str
    is_file: bool
    is_folder: bool
    offset: int
    """Unpacked bytes that had to be read to get here."""
    open: Callable[[], IO[bytes] | None]


def extract(
    archive: str | Path,
    target: str | Path,
    *,
    limits: Limits = DEFAULT_LIMITS,
    only: Collection[str] | None = None,
) -> Path:
    """Unpack a .zip, .whl or .tar(.gz, .bz2, .xz) into a new folder, all of it or nothing.

    Permissions, owners and dates are not taken over.

    Args:
        archive: The file.
        target: A folder that does not exist yet.
        limits: What is too much.
        only: Names of the files wanted, as in the archive; all where not given.

    Returns:
        The folder.

    Raises:
        DataError: The archive is damaged, exceeds a limit, or holds a link, a device, an absolute
            path, or a path that climbs out of the folder.
    """
    archive, target = Path(archive), Path(target)
    allowed = min(limits.total_bytes, max(2**20, int(_size(archive) * limits.ratio)))
    wanted = set(only) if only is not None else None
    seen: set[str] = set()
    found: set[str] = set()
    written = 0
    with atomic_folder(target) as folder, _opened(archive) as opened:
        for count, entry in enumerate(_entries(opened), start=1):
            if count > limits.files:
                raise DataError(f"{archive}: more than {limits.files:,} entries")
            if entry.offset > 2 * allowed:
                raise DataError(f"{archive}: unpacks to more than {allowed:,} bytes")
            if wanted is not None and entry.name not in wanted:
                continue
            found.add(entry.name)
            path = folder / _safe(archive, entry, seen)
            if entry.is_folder:
                path.mkdir(parents=True, exist_ok=True)
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as out, _stream(entry) as source:
                while chunk := source.read(_CHUNK):
                    written += len(chunk)
                    if written > allowed:
                        raise DataError(f"{archive}: unpacks to more than {allowed:,} bytes")
                    out.write(chunk)
        missing = sorted((wanted or set()) - found)
        if missing:
            raise DataError(f"{archive}: holds no file {missing[0]!r}")
    return target


def list_files(archive: str | Path, *, limits: Limits = DEFAULT_LIMITS) -> list[str]:
    """Return the names of the regular files in an archive, as written there; links are left out.

    Raises:
        DataError: The archive is damaged or exceeds a limit.
    """
    archive = Path(archive)
    allowed = min(limits.total_bytes, max(2**20, int(_size(archive) * limits.ratio)))
    names: list[str] = []
    with _opened(archive) as opened:
        for count, entry in enumerate(_entries(opened), start=1):
            if count > limits.files:
                raise DataError(f"{archive}: more than {limits.files:,} entries")
            if entry.offset > 2 * allowed:
                raise DataError(f"{archive}: unpacks to more than {allowed:,} bytes")
            if entry.is_file:
                names.append(entry.name)
    return names


@contextmanager
def _opened(archive: Path) -> Iterator[zipfile.ZipFile | tarfile.TarFile]:
    try:
        if archive.name.endswith(_ZIP_SUFFIXES):
            with zipfile.ZipFile(archive) as opened:
                yield opened
        else:
            with tarfile.open(archive, "r:*") as opened:
                yield opened
    except (
        zipfile.BadZipFile,
        tarfile.TarError,
        EOFError,
        zlib.error,
        lzma.LZMAError,
        NotImplementedError,  # an unknown compression
        RuntimeError,  # a password
        UnicodeError,
        OverflowError,
    ) as error:
        raise DataError(f"{archive}: is damaged or of an unknown kind: {error}") from error
    except OSError as error:
        # gzip and bz2 report damage without a number; a wrong offset in a zip is EINVAL.
        if error.filename is not None or error.errno not in (None, errno.EINVAL):
            raise
        raise DataError(f"{archive}: is damaged: {error}") from error
    except ValueError as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{archive}: is damaged: {error}") from error


def _entries(opened: zipfile.ZipFile | tarfile.TarFile) -> Iterator[_Entry]:
    if isinstance(opened, zipfile.ZipFile):
        for info in opened.infolist():
            kind = stat.S_IFMT(info.external_attr >> 16)
            regular = kind in (0, stat.S_IFREG)
            is_file = regular and not info.is_dir()
            yield _Entry(info.filename, is_file, info.is_dir(), 0, partial(opened.open, info))
    else:
        for member in opened:
            reader = partial(opened.extractfile, member)
            yield _Entry(member.name, member.isreg(), member.isdir(), member.offset_data, reader)


@contextmanager
def _stream(entry: _Entry) -> Iterator[IO[bytes]]:
    source = entry.open()
    if source is None:
        raise DataError(f"{entry.name!r} in the archive has no content")
    with source:
        yield source


def _safe(archive: Path, entry: _Entry, seen: set[str]) -> PurePosixPath:
    name = entry.name
    path = PurePosixPath(name)
    if not (entry.is_file or entry.is_folder):
        raise DataError(f"{archive}: {name!r} is a link or a device; only files are unpacked")
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise DataError(f"{archive}: {name!r} leads out of the folder it is unpacked into")
    if "\\" in name or "\0" in name or ":" in path.parts[0] or len(name) > 1000:
        raise DataError(f"{archive}: {name!r} is not a portable file name")
    if entry.is_file and str(path) in seen:
        raise DataError(f"{archive}: {name!r} is there twice")
    if entry.is_file:
        seen.add(str(path))
    return path


def _size(archive: Path) -> int:
    try:
        return archive.stat().st_size
    except FileNotFoundError:
        raise DataError(f"{archive}: no such file") from None
