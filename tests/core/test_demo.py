"""`make demo`: every package's section on one page, and a failed expectation ends with status 1."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from support.cli import child_environment
from support.workspace import ROOT

SAMPLE = """
from polyzoo.core.demo import DemoSection

def good(folder):
    (folder / "a.png").write_bytes(b"picture")
    return DemoSection(title="Good <things>", summary="All went well & fast.",
                       body='<img src="good/a.png" alt="a">', checks=[("one is one", True)])

def bad(folder):
    return DemoSection(title="Bad", summary="Not so.", body="<p>oh</p>",
                       checks=[("two is <three>", False), ("four is four", True)])
"""


@pytest.fixture
def sample(tmp_path: Path) -> Path:
    folder = tmp_path / "packages"
    info = folder / "sample-1.0.dist-info"
    info.mkdir(parents=True)
    (folder / "sample_demo.py").write_text(SAMPLE)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: sample\nVersion: 1.0\n")
    points = "[polyzoo.demos]\nzz_good = sample_demo:good\nzz_bad = sample_demo:bad\n"
    (info / "entry_points.txt").write_text(points)
    return folder


def demo(sample: Path, *names: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "demo.py"), "--out", "out/demo", *names],
        cwd=sample.parent,
        env=child_environment(sample),
        capture_output=True,
        text=True,
        check=False,
    )


def test_sections_and_pictures_make_a_page(sample: Path) -> None:
    done = demo(sample, "zz_good")
    assert done.returncode == 0, done.stderr
    page = (sample.parent / "out" / "demo" / "index.html").read_text()
    assert "Good &lt;things&gt;" in page
    assert "All went well &amp; fast." in page
    assert '<img src="good/a.png" alt="a">' in page
    assert (sample.parent / "out" / "demo" / "zz_good" / "a.png").exists()
    assert "Open out/demo/index.html" in done.stdout


def test_a_failed_expectation_is_told_and_counts(sample: Path) -> None:
    done = demo(sample, "zz_good", "zz_bad")
    assert done.returncode == 1
    assert "not as expected: two is <three>" in done.stderr
    assert "four is four" not in done.stderr
    page = (sample.parent / "out" / "demo" / "index.html").read_text()
    assert "two is &lt;three&gt;" in page


def test_an_unknown_demo_is_wrong_usage(sample: Path) -> None:
    done = demo(sample, "nope")
    assert done.returncode == 2
    assert "nope" in done.stderr
