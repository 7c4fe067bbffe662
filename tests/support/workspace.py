"""Where the packages lie, and what their pyprojects declare."""

from __future__ import annotations

import tomllib
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = sorted(path.parent for path in (ROOT / "packages").glob("*/pyproject.toml"))
SOURCES = [package / "src" for package in PACKAGES]


@cache
def project(package: Path) -> dict[str, Any]:
    """The [project] table of a package's pyproject.toml."""
    return tomllib.loads((package / "pyproject.toml").read_text())["project"]
