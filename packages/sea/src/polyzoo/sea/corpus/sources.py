"""Where a corpus is mined: archives, folders, installed packages. No code runs. Torch-free."""

from __future__ import annotations

import json
import os
import re
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from email.parser import HeaderParser
from importlib import metadata
from pathlib import Path

from polyzoo.core.archives import extract
from polyzoo.core.errors import DataError
from polyzoo.sea.corpus import licences

_ARCHIVE_SUFFIXES = (".whl", ".zip", ".tar", ".tar.gz", ".tgz", ".tar.xz", ".tar.bz2")
_SKIPPED_FOLDERS = frozenset({".git", "__pycache__", "node_modules"})
_METADATA_NAMES = frozenset(
    {"METADATA", "PKG-INFO", "package.json", "composer.json", "control", "copyright"}
)
_METADATA_LIMIT = 4 * 1024 * 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class Package:
    """A package to mine: its identity, and the root folder of its files."""

    name: str
    """Normalised: lower case, runs of `-_.` as one `-`."""
    version: str
    licence: str
    """SPDX expression, or "unknown"."""
    root: Path
    files: tuple[str, ...]
    """Relative to root, with forward slashes, sorted."""


def normalise(name: str) -> str:
    """The form in which package names are compared."""
    return re.sub(r"[-_.]+", "-", name.strip()).lower()


def guessed_name(source: str) -> str:
    """The package name a source goes by before it is opened, for exclusion and for sorting."""
    path = Path(source)
    name = path.name or path.resolve().name
    for suffix in _ARCHIVE_SUFFIXES:
        if name.endswith(suffix):
            stem = name.removesuffix(suffix)
            if suffix == ".whl":
                return normalise(stem.split("-", 1)[0])
            return normalise(re.sub(r"-v?\d.*$", "", stem))
    return normalise(re.sub(r"[-_]\d+(?:\.\d+)+.*$", "", name))


@contextmanager
def open_package(source: str, *, suffixes: tuple[str, ...]) -> Iterator[Package]:
    """Give a package's files with one of the suffixes; an archive is unpacked meanwhile.

    Args:
        source: A wheel, zip or tar archive, a folder, or the name of an installed distribution.
        suffixes: Of the files wanted.

    Raises:
        DataError: nothing of that name, or a broken or unsafe archive.
    """
    path = Path(source)
    if path.is_dir():
        yield _folder(path, path, suffixes, fallback=guessed_name(source))
    elif path.is_file():
        if not path.name.endswith(_ARCHIVE_SUFFIXES):
            raise DataError(
                f"{source}: not an archive ({', '.join(_ARCHIVE_SUFFIXES)}); "
                "give the folder of a source file instead"
            )
        with tempfile.TemporaryDirectory(prefix="polyzoo-corpus-") as temporary:
            wanted = _wanted(path, suffixes)
            root = extract(path, Path(temporary, "package"), only=wanted)
            yield _folder(root, path, suffixes, fallback=guessed_name(source))
    else:
        yield _installed(source, suffixes)


def _wanted(path: Path, suffixes: tuple[str, ...]) -> list[str]:
    """Names of an archive's regular files with source, or with what the package says of itself."""
    try:
        if path.name.endswith((".whl", ".zip")):
            with zipfile.ZipFile(path) as archive:
                names = [info.filename for info in archive.infolist() if not info.is_dir()]
        else:
            with tarfile.open(path) as archive:
                names = [member.name for member in archive if member.isreg()]
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise DataError(f"{path}: is damaged or of an unknown kind: {error}") from error
    return [
        name
        for name in names
        if name.lower().endswith(suffixes) or name.rsplit("/", 1)[-1] in _METADATA_NAMES
    ]


def _folder(root: Path, source: Path, suffixes: tuple[str, ...], *, fallback: str) -> Package:
    name, version, licence = _identity(root, source)
    files = []
    for folder, folders, names in os.walk(root):
        folders[:] = [child for child in folders if child not in _SKIPPED_FOLDERS]
        paths = [Path(folder, child) for child in names if child.lower().endswith(suffixes)]
        files.extend(path.relative_to(root).as_posix() for path in paths if not path.is_symlink())
    return Package(
        name=normalise(name or fallback),
        version=version,
        licence=licence,
        root=root,
        files=tuple(sorted(files)),
    )


def _installed(name: str, suffixes: tuple[str, ...]) -> Package:
    try:
        found = metadata.distribution(name)
    except (metadata.PackageNotFoundError, ValueError):
        raise DataError(
            f"{name}: no such file or folder, and no installed package of that name"
        ) from None
    root = Path(str(found.locate_file(""))).resolve()
    files = sorted(
        str(file)
        for file in found.files or ()
        if str(file).lower().endswith(suffixes) and ".." not in file.parts
    )
    name, version, licence = _python_metadata(found.read_text("METADATA") or "")
    return Package(
        name=normalise(name), version=version, licence=licence, root=root, files=tuple(files)
    )


def _identity(root: Path, source: Path) -> tuple[str, str, str]:
    """Name, version and licence from whatever the package kind says about itself."""
    for pattern in ("*.dist-info/METADATA", "PKG-INFO", "*/PKG-INFO"):
        for path in sorted(root.glob(pattern)):
            return _python_metadata(_read(path))
    for pattern in ("package.json", "package/package.json", "*/package.json", "composer.json"):
        for path in sorted(root.glob(pattern)):
            return _json_metadata(_read(path))
    name, version, licence = "", "", licences.UNKNOWN
    for pattern in ("DEBIAN/control", "debian/control"):
        for path in sorted(root.glob(pattern)):
            header = HeaderParser().parsestr(_read(path))
            name = header.get("Package") or header.get("Source") or ""
            version = header.get("Version") or ""
            break
    for pattern in ("usr/share/doc/*/copyright", "debian/copyright"):
        for path in sorted(root.glob(pattern)):
            licence = _debian_licence(_read(path))
            name = name or (path.parent.name if "usr" in path.parts else "")
            break
    if not version:
        match = re.search(r"[-_](\d+(?:\.\d+)+[^/]*?)(?:_all|_amd64)?(?:\.deb)?$", source.name)
        version = match.group(1) if match else ""
    return name, version, licence


def _debian_licence(copyright_file: str) -> str:
    """All licences that the file names for upstream's files, but not for Debian's packaging."""
    found = set()
    for paragraph in re.split(r"\n\s*\n", copyright_file):
        header = HeaderParser().parsestr(paragraph.lstrip("\n") + "\n")
        patterns = (header.get("Files") or "").split()
        if all(pattern.startswith("debian/") for pattern in patterns):
            continue
        found.add(licences.from_statements(expression=None, text=header.get("License")))
    return " AND ".join(sorted(found)) or licences.UNKNOWN


def _python_metadata(text: str) -> tuple[str, str, str]:
    header = HeaderParser().parsestr(text)
    licence = licences.from_statements(
        expression=header.get("License-Expression"),
        classifiers=header.get_all("Classifier") or (),
        text=header.get("License"),
    )
    return header.get("Name") or "", header.get("Version") or "", licence


def _json_metadata(text: str) -> tuple[str, str, str]:
    try:
        data = json.loads(text)
    except ValueError:
        return "", "", licences.UNKNOWN
    if not isinstance(data, dict):
        return "", "", licences.UNKNOWN
    licence = data.get("license")
    if isinstance(licence, dict):
        licence = licence.get("type")
    if isinstance(licence, list):
        licence = " OR ".join(str(entry) for entry in licence)
    name, version = str(data.get("name") or ""), str(data.get("version") or "")
    return name, version, licence if isinstance(licence, str) and licence else licences.UNKNOWN


def _read(path: Path) -> str:
    with path.open("rb") as file:
        return file.read(_METADATA_LIMIT).decode("utf-8", "replace")
