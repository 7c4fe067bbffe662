"""What PIXART-delta shows in `make demo`: prompts and outlines to pictures, in four steps."""

from __future__ import annotations

import html
import time
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from polyzoo.core.demo import DemoSection
from polyzoo.pixart_delta.edges import edge_agreement, edge_maps
from polyzoo.pixart_delta.pictures import to_tensor
from polyzoo.pixart_delta.pipeline import PixArtDeltaPipeline, PixArtOutput
from polyzoo.pixart_delta.record import RunRecord, save_png

STEPS = 4
PROMPTS = (
    ("red apple, noto style", 8),
    ("cat face, twemoji style", 15),
    ("grinning face, noto style", 1),
    ("guitar, 3d render style", 8),
    ("tomato, flat style", 8),
    ("hamburger, noto style", 15),
    ("blue heart, 3d render style", 8),
    ("crab, 3d render style", 15),
    ("smiling face, 3d render style", 15),
    ("fox, flat style", 15),
    ("orange heart, flat style", 1),
    ("full moon, noto style", 8),
)
"""What to draw, and the seed."""
CONTROLLED = ("red heart, 3d render style", "cat face, noto style")
SHOWN = 192
"""Side at which the 64 pixel pictures are shown."""
LEAST_AGREEMENT = 0.35


def run(out: Path) -> DemoSection:
    """Draw the prompts, then two pictures along given outlines."""
    pipe = PixArtDeltaPipeline.from_pretrained("embedded")
    start = time.perf_counter()
    prompts = [prompt for prompt, _ in PROMPTS]
    plain = pipe(prompts, seed=[seed for _, seed in PROMPTS], num_inference_steps=STEPS)
    drawn = time.perf_counter() - start
    outlines = (_heart(), _cat())
    start = time.perf_counter()
    steered = pipe(
        list(CONTROLLED), seed=[1, 1], num_inference_steps=STEPS, control_image=list(outlines),
        control_type="edges",
    )  # fmt: skip
    controlled = time.perf_counter() - start
    agreement = edge_agreement(
        edge_maps(to_tensor(_pictures(steered))), edge_maps(to_tensor(list(outlines)))
    ).tolist()
    cells = [
        _cell(out, f"{index:02d}.png", made, text, plain.records[index])
        for index, (made, text) in enumerate(zip(_pictures(plain), prompts, strict=True))
    ]
    pairs = []
    for index, (outline, made, text) in enumerate(
        zip(outlines, _pictures(steered), CONTROLLED, strict=True)
    ):
        pairs.append(_cell(out, f"outline-{index}.png", outline, "outline given", None))
        pairs.append(_cell(out, f"controlled-{index}.png", made, text, steered.records[index]))
    return DemoSection(
        title="PIXART-δ: pictures from words in four steps",
        summary=(
            f"Drew {len(PROMPTS)} prompts in {drawn:.1f} s and {len(CONTROLLED)} along outlines in "
            f"{controlled:.1f} s on the CPU, {STEPS} network evaluations each, with the model in "
            "this repository (64 pixels, shown larger; prompts and seeds chosen among the better)."
        ),
        body=f'<div style="{_FLEX}">{"".join(cells)}</div><h3>Along an outline</h3>'
        f'<div style="{_FLEX}">{"".join(pairs)}</div>',
        checks=[
            *(
                (f"“{text}” is a picture, not an empty sheet", _has_content(made))
                for text, made in zip(prompts, _pictures(plain), strict=True)
            ),
            *(
                (f"“{text}” follows its outline (edge F1 {value:.2f})", value > LEAST_AGREEMENT)
                for text, value in zip(CONTROLLED, agreement, strict=True)
            ),
        ],
    )


_FLEX = "display:flex;flex-wrap:wrap;gap:12px"


def _pictures(made: PixArtOutput) -> list[Image.Image]:
    assert isinstance(made.images, list)  # noqa: S101 - output_type is pil
    return made.images


def _cell(out: Path, name: str, picture: Image.Image, text: str, record: RunRecord | None) -> str:
    shown = picture.resize((SHOWN, SHOWN), Image.Resampling.LANCZOS)
    out.mkdir(parents=True, exist_ok=True)
    save_png(shown, out / name, record)
    label = html.escape(text)
    return (
        f'<figure style="margin:0;text-align:center"><img src="{out.name}/{name}" width="{SHOWN}" '
        f'height="{SHOWN}" alt="{label}"><figcaption>{label}</figcaption></figure>'
    )


def _has_content(picture: Image.Image) -> bool:
    """Whether at least a tenth of the picture is not white, and more than one colour is in it."""
    values = to_tensor([picture])[0]
    inked = (values.amin(dim=0) < 0.85).float().mean()
    return bool(inked > 0.1) and bool(values.std() > 0.05)


def _heart() -> Image.Image:
    side = 256
    picture = Image.new("RGB", (side, side), "white")
    draw = ImageDraw.Draw(picture)
    draw.ellipse((32, 48, 136, 152), fill="black")
    draw.ellipse((120, 48, 224, 152), fill="black")
    draw.polygon(_scaled([(38, 120), (218, 120), (128, 226)]), fill="black")
    return picture.resize((64, 64), Image.Resampling.LANCZOS)


def _cat() -> Image.Image:
    picture = Image.new("RGB", (256, 256), "white")
    draw = ImageDraw.Draw(picture)
    draw.polygon(_scaled([(44, 150), (52, 28), (128, 88)]), fill="black")
    draw.polygon(_scaled([(212, 150), (204, 28), (128, 88)]), fill="black")
    draw.ellipse((30, 66, 226, 232), fill="black")
    return picture.resize((64, 64), Image.Resampling.LANCZOS)


def _scaled(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in points]
