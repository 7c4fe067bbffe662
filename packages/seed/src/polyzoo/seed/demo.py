"""What SEED shows in `make demo`: pictures with their codes, captions and drawings; texts drawn."""

from __future__ import annotations

import html
import json
import time
from pathlib import Path

import numpy as np
from PIL import Image

from polyzoo.core.demo import DemoSection
from polyzoo.core.images import open_image
from polyzoo.seed.metrics import named
from polyzoo.seed.pipeline import SeedPipeline

_PICTURES = Path(__file__).parent / "weights" / "demo"
_SHOWN = 144
"""Side of a picture on the page, in pixels."""
PROMPTS = ("red heart, flat style", "blue circle, flat style", "smiling face, noto style")


def run(out: Path) -> DemoSection:
    """Tokenise, caption and redraw eight pictures, and draw three texts; files go to `out`."""
    start = time.perf_counter()
    seed = SeedPipeline.from_pretrained("embedded", device="cpu")
    about = json.loads((_PICTURES / "about.json").read_text(encoding="utf-8"))
    pictures = [open_image(_PICTURES / row["file"]) for row in about]
    codes = seed.encode(list(pictures))
    captions = seed.caption_codes(codes, new_tokens=16)
    again = seed.decode(codes)
    drawn_codes = seed.write_codes(PROMPTS, seed=3, temperature=0.3)
    drawn = seed.decode(drawn_codes)
    seconds = time.perf_counter() - start
    cards = []
    for number, row in enumerate(about):
        first = _save(pictures[number], out / f"picture-{number}.png")
        second = _save(again[number], out / f"again-{number}.png")
        cards.append(
            f'<figure class="seed"><div>{_img(first)}{_img(second)}</div>'
            f"<figcaption>says: <b>{html.escape(captions[number])}</b><br>"
            f"{html.escape(row['label'])}, {row['seen']}"
            f"<code>{_sentence(codes[number])}</code></figcaption></figure>"
        )
    prompts = []
    for number, prompt in enumerate(PROMPTS):
        file = _save(drawn[number], out / f"drawn-{number}.png")
        prompts.append(
            f'<figure class="seed"><div>{_img(file)}</div><figcaption><b>{html.escape(prompt)}</b>'
            f"<code>{_sentence(drawn_codes[number])}</code></figcaption></figure>"
        )
    shape = seed.config
    known = [i for i, row in enumerate(about) if row["seen"] == "seen in training"]
    right = sum(named(captions[i]) == named(about[i]["label"]) for i in known)
    distinct = len({tuple(row) for row in codes.tolist()})
    colours = [np.asarray(picture, float).mean((0, 1)) for picture in drawn]
    return DemoSection(
        title="SEED: pictures as sentences of codes",
        summary=(
            f"Each picture became {shape.tokens_per_image} codes out of {shape.codes}. From the "
            "codes alone came its caption and, on the right of each pair, its picture: rough "
            "meaning, colour and outline, not the pixels. The model is small and was trained for "
            "minutes; these pictures were chosen among the better ones, and most that it has not "
            "seen are named wrongly (see the README). Below, a language model wrote codes for "
            f"texts. {seconds:.0f} s for all of it."
        ),
        body=f"{_STYLE}<div class='row'>{''.join(cards)}</div><h3>Drawn from text</h3>"
        f"<div class='row'>{''.join(prompts)}</div>",
        checks=[
            (f"{distinct} of {len(about)} pictures have codes of their own",
             distinct == len(about)),
            (f"{right} of {len(known)} pictures seen in training are named rightly",
             right * 2 >= len(known)),
            ("all written images are well formed",
             drawn_codes.shape == (len(PROMPTS), shape.tokens_per_image)),
            ("the drawn heart is red, the circle blue and the face yellow",
             bool(_more(colours[0], 0, 2) and _more(colours[1], 2, 0) and _more(colours[2], 0, 2))),
        ],
    )  # fmt: skip


def _more(colour: np.ndarray, first: int, second: int) -> bool:
    return colour[first] > colour[second] + 5


def _save(picture: Image.Image, path: Path) -> str:
    picture.resize((_SHOWN, _SHOWN), Image.Resampling.BICUBIC).save(path)
    return f"{path.parent.name}/{path.name}"


def _img(source: str) -> str:
    return f'<img src="{html.escape(source)}" width="{_SHOWN}" height="{_SHOWN}" alt="">'


def _sentence(codes: np.ndarray) -> str:
    return " ".join(str(code) for code in codes.tolist())


_STYLE = """<style>
.row { display: flex; flex-wrap: wrap; gap: 1rem }
figure.seed { margin: 0; padding: .6rem; border: 1px solid var(--line); border-radius: 10px }
figure.seed div { display: flex; gap: .4rem }
figure.seed img { background: #fff; border-radius: 6px }
figure.seed figcaption { font-size: .85rem; max-width: 18.5rem; margin-top: .4rem;
  overflow-wrap: anywhere }
figure.seed code { display: block; color: var(--soft); font-size: .72rem; margin-top: .2rem }
</style>"""
