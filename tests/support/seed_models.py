"""A tiny SEED tokenizer with everything in its folder, for tests."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from polyzoo.seed.config import HeadConfig, QFormerConfig, SeedConfig, VisionConfig
from polyzoo.seed.decoder import PixelDecoder
from polyzoo.seed.decoder_config import DecoderConfig
from polyzoo.seed.folders import save_parts
from polyzoo.seed.model import SeedModel

WORDS = [
    *("[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "red", "green", "blue", "circle", "square"),
    *("picture", "of", "in", ",", "the", "style", "flat"),
]
COLOURS = {"red": (220, 30, 30), "green": (30, 180, 60), "blue": (30, 60, 220)}


def tiny_config(**changes: Any) -> SeedConfig:
    """Four codes of 16 an image of 32 pixels."""
    config = SeedConfig(
        vision=VisionConfig(image_size=32, patch_size=8, width=32, depth=2, heads=2, mlp_hidden=64),
        qformer=QFormerConfig(
            width=32, layers=2, heads=2, ffn=64, dropout=0.0, vocabulary=len(WORDS), max_text=16
        ),
        head=HeadConfig(dim=24, mlp=(16, 16, 8)),
        tokens_per_image=4,
        codes=16,
        code_dim=8,
        decode_depth=1,
        decode_heads=2,
        contrast_dim=16,
    )
    return replace(config, **changes)


def tiny_model(seed: int = 0, **changes: Any) -> SeedModel:
    """An untrained tokenizer whose codes differ between pictures."""
    torch.manual_seed(seed)
    model = SeedModel(tiny_config(**changes)).eval()
    with torch.no_grad():
        for parameter in (*model.vision.parameters(), *model.qformer.parameters()):  # pyright: ignore[reportOptionalMemberAccess]
            if parameter.ndim >= 2:
                parameter.normal_(std=0.3)
        model.queries.normal_()
        model.quantizer.codebook.normal_(std=0.5)
    return model


def tokenizer_json() -> str:
    """A word-level tokenizer in the form of a tokenizer.json."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from tokenizers.processors import TemplateProcessing

    table = {word: i for i, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(table, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.post_processor = TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return tokenizer.to_str()


def write_folder(folder: Path, *, decoder: bool = True, **changes: Any) -> Path:
    """Write a tiny tokenizer's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    pieces = folder / "tokenizer.json"
    pieces.write_text(tokenizer_json(), encoding="utf-8")
    torch.manual_seed(1)
    shape = DecoderConfig(size=16, widths=(16, 32, 32), context_width=32, embedding=16, steps=2)
    save_parts(
        folder,
        tiny_model(**changes),
        pieces=pieces,
        decoder=PixelDecoder(shape) if decoder else None,
    )
    return folder


@cache
def shapes() -> tuple[tuple[str, Image.Image], ...]:
    """Twelve little pictures, each with a caption."""
    made = []
    for name, colour in COLOURS.items():
        for kind in ("circle", "square"):
            for shift in (0, 6):
                pixels = np.full((32, 32, 3), 255, np.uint8)
                rows, columns = np.mgrid[:32, :32]
                if kind == "circle":
                    inside = (rows - 13 - shift) ** 2 + (columns - 13) ** 2 < 64
                else:
                    inside = (abs(rows - 13 - shift) < 7) & (abs(columns - 13) < 7)
                pixels[inside] = colour
                made.append((f"{name} {kind}", Image.fromarray(pixels)))
    return tuple(made)


def write_pairs(folder: Path, *, broken: bool = False) -> tuple[Path, Path]:
    """Write the pictures and pairs.jsonl; return the file and the folder of pictures."""
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    rows = []
    for number, (caption, picture) in enumerate(shapes()):
        picture.save(images / f"{number:02d}.png")
        rows.append({"image": f"{number:02d}.png", "caption": caption, "label": caption})
    if broken:
        (images / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
        rows.append({"image": "broken.png", "caption": "nothing"})
    pairs = folder / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return pairs, images
