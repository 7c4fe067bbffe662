"""Find the stored reference cases of a package."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.workspace import ROOT


def case_folders(source: pytest.FixtureRequest | pytest.Config, package: str) -> list[Path]:
    """Folders that hold a package's cases, from every --parity-dir (default tests/parity).

    A DIR with a folder of the package's name gives that folder; any other DIR is taken to hold the
    package's cases itself. Use it in a fixture, or in `pytest_generate_tests(metafunc)` with
    `metafunc.config`.
    """
    config = source.config if isinstance(source, pytest.FixtureRequest) else source
    given = [config.invocation_params.dir / folder for folder in config.getoption("--parity-dir")]
    for folder in given:
        if not folder.is_dir():
            raise pytest.UsageError(f"--parity-dir {folder}: no such folder")
    if not given:
        default = ROOT / "tests" / "parity" / package
        return [default] if default.is_dir() else []
    return [folder / package if (folder / package).is_dir() else folder for folder in given]
