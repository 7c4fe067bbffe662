"""The `chat` command: text and pictures in turn; a path in brackets shows a picture."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path

from polyzoo.core.errors import DataError
from polyzoo.seed.commands import save_pictures
from polyzoo.seed.options import ChatConfig
from polyzoo.seed.pipeline import SeedPipeline
from polyzoo.seed.processor import SeedProcessor, Template

_SHOWN = re.compile(r"\[image:\s*([^\]]+)\]")


@dataclass(frozen=True)
class Turn:
    """One question and its answer."""

    question: str
    answer: str
    pictures: list[str]
    """Files drawn in the answer."""


@dataclass(frozen=True)
class Conversation:
    """All turns."""

    turns: list[Turn]


def main(config: ChatConfig) -> Conversation | None:
    """Run the command: a line of stdin is a turn, `[image: FILE]` in it shows a picture."""
    pipeline = SeedPipeline.from_pretrained(config.model, device=config.device)
    if config.language is not None:
        pipeline.use_language(config.language, base=config.base)
    processor = SeedProcessor.of(pipeline)
    ids: list[int] = []
    turns: list[Turn] = []
    for line in sys.stdin:
        if not line.strip():
            continue
        turn, ids = _answer(pipeline, processor, config, line.strip(), ids, len(turns))
        turns.append(turn)
        sys.stdout.write(f"{turn.answer}\n" + "".join(f"{f}\n" for f in turn.pictures))
        sys.stdout.flush()
    return Conversation(turns)


def _answer(
    pipeline: SeedPipeline,
    processor: SeedProcessor,
    config: ChatConfig,
    line: str,
    before: list[int],
    number: int,
) -> tuple[Turn, list[int]]:
    template: Template = config.template
    ids = [*before, *processor.turn(_segments(line), template=template, first=not before)]
    said = pipeline.language.generate(
        [ids],
        new_tokens=config.new_tokens,
        temperature=config.temperature,
        top_p=config.top_p,
        seed=config.seed + number,
    )[0]
    spans = processor.vocabulary.parse(said)
    words = " ".join(
        pipeline.language.words(span.ids) if span.kind == "text" else "<image>" for span in spans
    )
    images = [span.ids for span in spans if span.kind == "image"]
    files: list[str] = []
    if images:
        pictures = pipeline.decode(list(images), seed=config.seed)
        names = [f"turn-{number}" for _ in pictures]
        files = save_pictures(pictures, config.out, names)
    return Turn(line, words.strip(), files), [*ids, *said]


def _segments(line: str) -> list[str | Path]:
    parts: list[str | Path] = []
    for place, part in enumerate(_SHOWN.split(line)):
        if place % 2:
            path = Path(part.strip())
            if not path.is_file():
                raise DataError(f"{path}: no such file; [image: FILE] shows a picture")
            parts.append(path)
        elif part.strip():
            parts.append(part.strip())
    return parts
