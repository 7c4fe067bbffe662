"""What a tokenizer is trained on, as batches: pictures, captions, sentence vectors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from polyzoo.core.errors import ConfigError
from polyzoo.seed.bank import ImageBank
from polyzoo.seed.presets import SeedDataConfig, TokenizerTrainConfig
from polyzoo.seed.text_pieces import TextPieces
from polyzoo.seed.text_vectors import TextVectors

MOST_PIECES = 32


@dataclass
class Material:
    """Training and validation pictures, and the text side where a stage needs it."""

    train: ImageBank
    valid: ImageBank | None
    pieces: TextPieces | None
    vectors: TextVectors | None


def gather(config: TokenizerTrainConfig) -> Material:
    """Read what the recipe names.

    Raises:
        ConfigError: It names no pictures, or two sources.
    """
    data = config.data
    size = data.size
    train = open_bank(data, size=size, split="train")
    valid = open_bank(data, size=size, split="val") if data.pack is not None else None
    if data.valid_pairs is not None:
        valid = ImageBank.from_pairs(data.valid_pairs, _folder(data), size=size)
    pieces = vectors = None
    if data.prepared is not None:
        pieces = TextPieces.load(data.prepared)
        if config.teacher_text:
            vectors = TextVectors.load(data.prepared)
    return Material(train, valid, pieces, vectors)


def open_bank(data: SeedDataConfig, *, size: int, split: str) -> ImageBank:
    """Open the pack or the pairs."""
    if (data.pack is None) == (data.pairs is None):
        raise ConfigError("data: set either pack (an icon pack) or pairs (a .jsonl file)")
    if data.pack is not None:
        return ImageBank.from_pack(data.pack, size=size, split=split, limit=data.limit)
    assert data.pairs is not None  # noqa: S101 - just checked
    return ImageBank.from_pairs(data.pairs, _folder(data), size=size, limit=data.limit)


def _folder(data: SeedDataConfig) -> Any:
    if data.images is None:
        raise ConfigError("data.pairs needs data.images, the folder of the files it names")
    return data.images


class PictureBatches:
    """A dataset of positions, and the collate function that fetches whole batches."""

    def __init__(self, material: Material, *, texts: bool) -> None:
        self.bank = material.train
        self.images = torch.from_numpy(self.bank.images)
        self.meanings = torch.from_numpy(self.bank.meanings)
        self.texts = texts
        self.vectors = material.vectors
        if texts:
            if material.pieces is None:
                raise ConfigError("stage1 needs data.prepared, for the text branch's pieces")
            flat = [text for row in self.bank.captions for text in row]
            counts = np.array([len(row) for row in self.bank.captions])
            self.first = torch.from_numpy(np.concatenate([[0], np.cumsum(counts)]))
            self.ids, self.mask = material.pieces.encode(flat, length=MOST_PIECES)
            if self.vectors is not None:
                self.meaning_vectors = self.vectors.of(self.bank.meaning_texts)
                self.words = material.pieces.encode(list(self.vectors.places), length=MOST_PIECES)

    def __len__(self) -> int:
        return len(self.bank)

    def __getitem__(self, index: int) -> int:
        return index

    def collate(self, indices: list[int]) -> dict[str, Tensor]:
        """Fetch pictures, and draw one caption for each."""
        rows = torch.tensor(indices)
        batch = {"images": self.images[rows], "meanings": self.meanings[rows]}
        if not self.texts:
            return batch
        low, high = self.first[rows], self.first[rows + 1]
        drawn = low + (torch.rand(len(rows)) * (high - low)).long()
        batch |= _trimmed(self.ids[drawn], self.mask[drawn], "ids", "mask")
        if self.vectors is not None:
            batch["vectors"] = self.meaning_vectors[rows]
            words = torch.randint(len(self.vectors.vectors), (len(rows),))
            ids, mask = self.words
            batch |= _trimmed(ids[words], mask[words], "word_ids", "word_mask")
            batch["word_vectors"] = self.vectors.vectors[words]
        return batch


def _trimmed(ids: Tensor, mask: Tensor, *names: str) -> dict[str, Tensor]:
    longest = int(mask.sum(1).max())
    return dict(zip(names, (ids[:, :longest], mask[:, :longest]), strict=True))
