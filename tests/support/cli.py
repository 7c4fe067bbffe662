"""Run the real `polyzoo` command in a process of its own."""

from __future__ import annotations

import atexit
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from support.workspace import PACKAGES, SOURCES, project


def run_cli(
    *arguments: str | Path,
    env: Mapping[str, str] | None = None,
    cwd: str | Path | None = None,
    stdin: str | None = None,
    timeout: float = 120,
    path: str | Path | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run `polyzoo ARGUMENTS`, with `path` importable too; return status, stdout and stderr.

    Works from the sources too: where the packages are not installed, their entry points are
    written to a folder that only the child sees.
    """
    return subprocess.run(
        [sys.executable, "-m", "polyzoo.core", *map(str, arguments)],
        env={**child_environment(path), **(env or {})},
        cwd=cwd,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def run_python(
    code: str, *arguments: str, env: Mapping[str, str] | None = None, timeout: float = 120
) -> subprocess.CompletedProcess[str]:
    """Run Python code in a fresh process that sees the same packages as this one."""
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**child_environment(), **(env or {})},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def child_environment(path: str | Path | None = None) -> dict[str, str]:
    """The environment in which a child process finds the packages and their commands."""
    paths = [*([str(path)] if path else []), *(str(source) for source in SOURCES)]
    extra = _entry_point_folder()
    inherited = os.environ.get("PYTHONPATH", "")
    joined = os.pathsep.join(
        [*paths, *([extra] if extra else []), *([inherited] if inherited else [])]
    )
    return {**os.environ, "PYTHONPATH": joined, "COLUMNS": "100", "NO_COLOR": "1"}


@cache
def _entry_point_folder() -> str | None:
    try:
        distribution("polyzoo-core")
    except PackageNotFoundError:
        pass
    else:
        return None
    folder = Path(tempfile.mkdtemp(prefix="polyzoo-entry-points-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for package in PACKAGES:
        about = project(package)
        info = folder / f"{about['name'].replace('-', '_')}-{about['version']}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.4\nName: {about['name']}\nVersion: {about['version']}\n"
        )
        sections = [
            "\n".join([f"[{group}]", *(f"{name} = {target}" for name, target in points.items())])
            for group, points in about.get("entry-points", {}).items()
        ]
        (info / "entry_points.txt").write_text("\n".join(sections) + "\n")
    return str(folder)
