"""The `detokenize`, `caption` and `draw` commands."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from polyzoo.core.errors import DataError, UsageError
from polyzoo.core.io import atomic_path
from polyzoo.seed.options import CaptionConfig, DetokenizeConfig, DrawConfig
from polyzoo.seed.pipeline import SeedPipeline
from polyzoo.seed.shards import read_tokens


@dataclass(frozen=True)
class Written:
    """Pictures on disk."""

    files: list[str]
    codes: list[list[int]]
    """What each was drawn from."""


@dataclass(frozen=True)
class Captioned:
    """A picture and what is said of it."""

    image: str
    caption: str
    codes: list[int]


def detokenize(config: DetokenizeConfig) -> Written:
    """Run `detokenize`."""
    names, table = _read_codes(config.tokens)
    if config.limit is not None:
        names, table = names[: config.limit], table[: config.limit]
    pipeline = SeedPipeline.from_pretrained(config.model, device=config.device)
    use_detokenizer(pipeline, config.detokenizer)
    pictures = pipeline.decode(
        table, seed=config.seed, steps=config.steps, guidance=config.guidance
    )
    return Written(save_pictures(pictures, config.out, names), table.tolist())


def caption(config: CaptionConfig) -> list[Captioned]:
    """Run `caption`."""
    if not config.images:
        raise UsageError("caption: give at least one picture")
    pipeline = SeedPipeline.from_pretrained(config.model, device=config.device)
    if config.language is not None:
        pipeline.use_language(config.language, base=config.base)
    codes = pipeline.encode(list(config.images))
    captions = pipeline.caption_codes(codes, new_tokens=config.new_tokens)
    return [
        Captioned(str(image), text, row)
        for image, text, row in zip(config.images, captions, codes.tolist(), strict=True)
    ]


def draw(config: DrawConfig) -> Written:
    """Run `draw`."""
    if not config.prompts:
        raise UsageError("draw: give at least one text")
    pipeline = SeedPipeline.from_pretrained(config.model, device=config.device)
    if config.language is not None:
        pipeline.use_language(config.language, base=config.base)
    use_detokenizer(pipeline, config.detokenizer)
    codes = pipeline.write_codes(
        config.prompts, seed=config.seed, temperature=config.temperature, top_p=config.top_p
    )
    pictures = pipeline.decode(
        codes, seed=config.seed, steps=config.steps, guidance=config.guidance
    )
    return Written(save_pictures(pictures, config.out, config.prompts), codes.tolist())


def use_detokenizer(pipeline: SeedPipeline, name: str | None) -> None:
    """Give a pipeline a diffusers de-tokeniser, where one is named."""
    if name is not None:
        from polyzoo.seed.detokenizer import load_detokenizer

        pipeline.use_detokenizer(
            load_detokenizer(name, target=pipeline.config.head.target, device=pipeline.device)
        )


def save_pictures(pictures: Sequence[Image.Image], folder: Path, names: Sequence[str]) -> list[str]:
    """Write PNG files named by number and name; return their paths."""
    files = []
    for number, (picture, name) in enumerate(zip(pictures, names, strict=True)):
        stem = re.sub(r"[^\w-]+", "-", name).strip("-")[:60]
        path = folder / f"{number:04d}-{stem}.png"
        with atomic_path(path) as temporary:
            picture.save(temporary, format="PNG")
        files.append(str(path))
    return files


def render_captions(found: Sequence[Captioned]) -> str:
    """The captions for people."""
    return "\n".join(f"{row.image}: {row.caption}" for row in found)


def _read_codes(path: Path) -> tuple[list[str], np.ndarray]:
    if path.is_dir():
        found = read_tokens(path)
        if not found:
            raise DataError(f"{path}: holds no records")
        return list(found), np.stack(list(found.values())).astype(np.int64)
    try:
        values: Any = json.loads(path.read_text(encoding="utf-8"))
        table = np.array(values)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file or folder") from None
    except ValueError as error:
        raise DataError(
            f"{path}: must be a JSON list of codes, or of such lists: {error}"
        ) from None
    if table.dtype.kind not in "iu" or table.ndim not in (1, 2):
        raise DataError(f"{path}: must be a JSON list of codes, or of such lists of one length")
    table = table[None] if table.ndim == 1 else table
    return [str(i) for i in range(len(table))], table
