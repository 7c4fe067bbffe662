"""Samples of the language model's training, as padded batches."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from polyzoo.core.errors import DataError
from polyzoo.seed.presets import LanguageDataConfig
from polyzoo.seed.samples import IGNORED, Sample, SampleBuilder


class CaptionSamples:
    """Pictures' codes with captions; each reading draws a caption and a direction."""

    def __init__(
        self,
        codes: NDArray[np.integer],
        captions: Sequence[Sequence[str]],
        builder: SampleBuilder,
        config: LanguageDataConfig,
        *,
        prompts: Sequence[Sequence[str]] = (),
    ) -> None:
        """Keep what samples are made of.

        Args:
            codes: (pictures, views, tokens); any view is told, the first is drawn.
            captions: Texts of each picture.
            builder: Makes the samples.
            config: Shares and limits.
            prompts: Further texts that pictures are drawn from, but not told with.
        """
        self.codes, self.captions, self.builder, self.config = codes, captions, builder, config
        self.prompts = prompts
        self.plain = _paragraphs(config.text) if config.text is not None else []
        # The same captions come again and again: tokenise each once.
        builder.text = lru_cache(maxsize=200_000)(builder.text)  # pyright: ignore[reportAttributeAccessIssue]

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, index: int) -> Sample:
        if self.plain and random.random() < self.config.text_share:  # noqa: S311
            return self.builder.plain(random.choice(self.plain))  # noqa: S311
        told = random.random() >= self.config.draw  # noqa: S311
        texts = list(self.captions[index])
        if not told and self.prompts:
            texts += self.prompts[index]
        views = self.codes[index]
        codes = random.choice(views) if told else views[0]  # noqa: S311
        return self.builder.caption(
            codes.tolist(),
            random.choice(texts),  # noqa: S311
            image_first=told,
            mask_left=self.config.mask_left,
        )


class RecordSamples:
    """Records of a .jsonl file, each a caption, document, question, edit or plain text."""

    def __init__(self, path: Path, builder: SampleBuilder, config: LanguageDataConfig) -> None:
        self.records = read_records(path)[: config.limit]
        self.builder, self.config = builder, config

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Sample:
        draws = random.Random(random.getrandbits(64))  # noqa: S311
        return self.builder.record(self.records[index], draw=self.config.draw, generator=draws)


def read_records(path: Path) -> list[dict[str, Any]]:
    """Read a .jsonl file of objects.

    Raises:
        DataError: Names the line.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}, line {number}: not JSON ({error})") from error
        if not isinstance(record, dict):
            raise DataError(f"{path}, line {number}: expected an object")
        records.append(record)
    if not records:
        raise DataError(f"{path}: holds no record")
    return records


class Padding:
    """Puts samples of different lengths into one batch; filtered and empty ones count nothing."""

    def __init__(self, pad: int) -> None:
        self.pad = pad

    def __call__(self, samples: list[Sample]) -> dict[str, Tensor]:
        """Return ids, attention mask and labels (b, n)."""
        length = max(len(sample.ids) for sample in samples)
        ids = torch.full((len(samples), length), self.pad)
        labels = torch.full((len(samples), length), IGNORED)
        mask = torch.zeros(len(samples), length, dtype=torch.int64)
        for row, sample in enumerate(samples):
            n = len(sample.ids)
            ids[row, :n] = torch.tensor(sample.ids)
            mask[row, :n] = 1
            if sample.keep:
                labels[row, :n] = torch.tensor(sample.labels)
        cut = torch.tensor(sum(sample.cut for sample in samples))
        filtered = torch.tensor(sum(not sample.keep for sample in samples))
        return {"input_ids": ids, "attention_mask": mask, "labels": labels, "cut": cut,
                "filtered": filtered}  # fmt: skip


def _paragraphs(path: Path) -> list[str]:
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    parts = path.read_text(encoding="utf-8").split("\n\n")
    return [part.strip() for part in parts if len(part.strip()) > 20]
