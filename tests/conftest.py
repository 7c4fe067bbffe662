"""Options that the whole suite shares."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--parity-dir",
        action="append",
        default=[],
        metavar="DIR",
        help="folder with stored reference cases: one folder a package, or one package's cases; "
        "may be given several times; default tests/parity",
    )
    parser.addoption(
        "--fuzz",
        type=int,
        default=2000,
        metavar="N",
        help="how many damaged files each fuzz test tries (default 2000)",
    )
    parser.addoption(
        "--kills",
        type=int,
        default=20,
        metavar="N",
        help="how often a training run is killed while it saves, and resumed (default 20)",
    )


@pytest.fixture
def fuzz_count(request: pytest.FixtureRequest) -> int:
    """How many damaged files a fuzz test tries."""
    return request.config.getoption("--fuzz")
