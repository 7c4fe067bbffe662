"""What RegionSpot shows in `make demo`: things found in photographs, and named."""

from __future__ import annotations

import html
import time
from dataclasses import dataclass
from pathlib import Path

from polyzoo.core.demo import DemoSection
from polyzoo.core.io import atomic_write
from polyzoo.regionspot.overlay import draw
from polyzoo.regionspot.pipeline import RegionSpotPipeline
from polyzoo.regionspot.results import RegionResult

_ASSETS = Path(__file__).parent / "assets" / "demo"


@dataclass(frozen=True)
class Photograph:
    """A picture, the names it may get, and those that are on it."""

    file: str
    credit: str
    names: tuple[str, ...]
    present: frozenset[str]


PHOTOGRAPHS = (
    Photograph(
        "astronaut.jpg",
        "NASA, public domain",
        ("astronaut", "space shuttle", "helmet", "flag", "guitar", "pizza", "horse", "bicycle"),
        frozenset({"astronaut", "space shuttle", "helmet", "flag"}),
    ),
    Photograph(
        "coffee.jpg",
        "Rachel Michetti, CC0",
        ("coffee cup", "spoon", "plate", "table", "dog", "car", "laptop", "bicycle"),
        frozenset({"coffee cup", "spoon", "plate", "table"}),
    ),
    Photograph(
        "chelsea.jpg",
        "Stefan van der Walt, CC0",
        ("cat", "dog", "rabbit", "teapot", "airplane", "tree", "shoe", "clock"),
        frozenset({"cat"}),
    ),
    Photograph(
        "rocket.jpg",
        "SpaceX, CC0",
        ("rocket", "tower", "street light", "cow", "sofa", "bird", "cake", "umbrella"),
        frozenset({"rocket", "tower", "street light"}),
    ),
)
MOST = 4


def run(out: Path) -> DemoSection:
    """Find and name things in every photograph; pictures go to `out`."""
    start = time.perf_counter()
    pipeline = RegionSpotPipeline.from_pretrained(device="cpu")
    loading = time.perf_counter() - start
    body: list[str] = []
    checks: list[tuple[str, bool]] = []
    milliseconds: list[float] = []
    for photograph in PHOTOGRAPHS:
        begin = time.perf_counter()
        session = pipeline.open(_ASSETS / photograph.file)
        result = session.predict(names=photograph.names, auto=True, limit=MOST, masks=False)
        milliseconds.append((time.perf_counter() - begin) * 1e3)
        name = Path(photograph.file).stem
        with atomic_write(out / f"{name}.png") as file:
            draw(session.image, result).save(file, "PNG")
        right = sum(label in photograph.present for label in result.labels)
        checks.append(
            (
                f"{name}: {right} of {len(result)} regions get a name of something in the picture",
                len(result) > 0 and right * 2 > len(result),
            )
        )
        body.append(_figure(out.name, photograph, result, name))
    middle = sorted(milliseconds)[len(milliseconds) // 2]
    return DemoSection(
        title="RegionSpot: things found in photographs, and named in free text",
        summary=(
            "Nobody drew a box here: the model in this repository proposes the regions and "
            "chooses among eight names each. Half of the names are wrong on purpose. "
            f"Loading took {loading:.1f} s, a photograph {middle:.0f} ms."
        ),
        body=f'<div style="display:flex;flex-wrap:wrap;gap:1rem">{"".join(body)}</div>',
        checks=checks,
    )


def _figure(folder: str, photograph: Photograph, result: RegionResult, name: str) -> str:
    asked = ", ".join(html.escape(label) for label in photograph.names)
    found = ", ".join(
        f"{html.escape(region.name)} {region.score:.2f}" for region in result.regions(top=1)
    )
    return (
        '<figure style="margin:0;flex:1 1 18rem;max-width:29rem">'
        f'<img src="{html.escape(folder)}/{name}.png" alt="{html.escape(name)}" '
        'style="width:100%;border-radius:8px">'
        f'<figcaption style="font-size:.85rem">Asked: {asked}.<br>Found: {found}.<br>'
        f"Photograph: {html.escape(photograph.credit)}.</figcaption></figure>"
    )
