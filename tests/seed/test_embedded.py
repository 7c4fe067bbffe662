"""The model in the package: what `make demo` shows, from a fresh clone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from polyzoo.seed.demo import run
from polyzoo.seed.folders import find_folder
from polyzoo.seed.pipeline import SeedPipeline


@pytest.fixture(scope="module")
def seed() -> SeedPipeline:
    return SeedPipeline.from_pretrained("embedded", device="cpu")


def test_it_is_small():
    files = [file for file in find_folder("embedded").rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 8 * 2**20
    assert not [file for file in files if file.suffix in (".pt", ".pth", ".bin", ".pkl")]


def test_colours_survive_the_codes(seed: SeedPipeline):
    """A red disc comes back redder than blue, and a blue one the other way round."""
    pictures = []
    rows, columns = np.mgrid[:64, :64]
    inside = (rows - 32) ** 2 + (columns - 32) ** 2 < 24**2
    for colour in ((220, 30, 40), (40, 70, 220)):
        pixels = np.full((64, 64, 3), 255, np.uint8)
        pixels[inside] = colour
        pictures.append(pixels)
    red, blue = (np.asarray(p, float)[20:44, 20:44].mean((0, 1)) for p in seed.decode(
        seed.encode(pictures)))  # fmt: skip
    assert red[0] > red[2] + 40
    assert blue[2] > blue[0] + 40


def test_everything_of_the_demo_comes(tmp_path: Path):
    section = run(tmp_path)
    assert all(passed for _, passed in section.checks), section.checks
    assert len(list(tmp_path.glob("picture-*.png"))) >= 6
    assert len(list(tmp_path.glob("drawn-*.png"))) == 3
