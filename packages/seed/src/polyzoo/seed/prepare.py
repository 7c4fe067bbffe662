"""The `prepare` command: word pieces for the text branch, and a sentence encoder's vectors."""

from __future__ import annotations

import json
from dataclasses import dataclass

import torch

from polyzoo.core.assets import asset_folder
from polyzoo.core.errors import UsageError
from polyzoo.core.io import atomic_write
from polyzoo.seed.bank import ImageBank
from polyzoo.seed.options import PrepareConfig
from polyzoo.seed.text_pieces import FILE_NAME as PIECES
from polyzoo.seed.text_pieces import TextPieces, cut_vocabulary, whole_words
from polyzoo.seed.text_vectors import FILE_NAME as VECTORS
from polyzoo.seed.text_vectors import TextVectors


@dataclass(frozen=True)
class PrepareReport:
    """What was written."""

    out: str
    pieces: int
    texts: int
    """Texts with a vector."""
    megabytes: float


def main(config: PrepareConfig) -> PrepareReport:
    """Run the command."""
    if (config.pack is None) == (config.pairs is None):
        raise UsageError("prepare: give either --pack or --pairs (with --images)")
    bank = _bank(config)
    source = json.loads((asset_folder("minilm") / "tokenizer.json").read_text(encoding="utf-8"))
    cut = cut_vocabulary(source, [*bank.texts(), *bank.meaning_texts], size=config.vocabulary)
    with atomic_write(config.out / PIECES, "w") as file:
        json.dump(cut, file, ensure_ascii=False, separators=(",", ":"))
    texts = list(dict.fromkeys((*bank.meaning_texts, *_parts(bank))))
    words = whole_words(TextPieces.load(config.out).tokenizer)
    texts = list(dict.fromkeys((*texts, *words)))
    from polyzoo.towers.text import load_text_tower

    with torch.no_grad():
        vectors = load_text_tower(config.teacher).encode(texts)
    TextVectors({text: i for i, text in enumerate(texts)}, vectors).save(config.out / VECTORS)
    size = sum(file.stat().st_size for file in config.out.iterdir() if file.is_file())
    return PrepareReport(str(config.out), len(cut["model"]["vocab"]), len(texts),
                         round(size / 2**20, 2))  # fmt: skip


def _bank(config: PrepareConfig) -> ImageBank:
    # The pictures themselves are not needed: keep them as small as can be.
    if config.pack is not None:
        return ImageBank.from_pack(config.pack, size=8, split=("train", "val"))
    assert config.pairs is not None  # noqa: S101 - just checked
    if config.images is None:
        raise UsageError("prepare --pairs needs --images, the folder of the files it names")
    return ImageBank.from_pairs(config.pairs, config.images, size=8)


def _parts(bank: ImageBank) -> list[str]:
    """Names and keywords on their own."""
    return [part.strip() for text in bank.meaning_texts for part in text.split(",") if part.strip()]
