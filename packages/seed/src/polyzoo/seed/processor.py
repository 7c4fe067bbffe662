"""Text and images together as a language model's ids, and back: for any transformers tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from polyzoo.core.errors import DataError
from polyzoo.seed.pipeline import SeedPipeline
from polyzoo.seed.samples import ASSISTANT, USER
from polyzoo.seed.vocabulary import ImageVocabulary

Template = Literal["plain", "vicuna", "llama2"]
Segment = str | Path | Image.Image | Sequence[int]
"""Text; a picture (path or image) to be tokenised; or an image's codes."""


class SeedProcessor:
    """Joins a tokenizer of words with a tokenizer of images.

    Example:
        >>> processor = SeedProcessor.extend(AutoTokenizer.from_pretrained("..."), pipeline)
        >>> batch = processor([["What is this?", Path("cat.png")]])
        >>> model.resize_token_embeddings(len(processor.tokenizer))
        >>> processor.decode(model.generate(**batch)[0].tolist())
    """

    def __init__(
        self, tokenizer: Any, vocabulary: ImageVocabulary, pipeline: SeedPipeline | None = None
    ) -> None:
        vocabulary.check(tokenizer)
        self.tokenizer, self.vocabulary, self.pipeline = tokenizer, vocabulary, pipeline

    @classmethod
    def extend(cls, tokenizer: Any, pipeline: SeedPipeline) -> Self:
        """Add the pipeline's image words to a tokenizer, in place."""
        shape = pipeline.config
        vocabulary = ImageVocabulary.extend(
            tokenizer, codes=shape.codes, tokens_per_image=shape.tokens_per_image
        )
        return cls(tokenizer, vocabulary, pipeline)

    @classmethod
    def of(cls, pipeline: SeedPipeline) -> Self:
        """Return the processor of a pipeline's own language model."""
        return cls(pipeline.language.tokenizer, pipeline.language.vocabulary, pipeline)

    @classmethod
    def from_pretrained(cls, folder: str | Path, pipeline: SeedPipeline | None = None) -> Self:
        """Read the tokenizer and the image vocabulary beside a language model or adapters."""
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        return cls(tokenizer, ImageVocabulary.load(folder), pipeline)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write both."""
        self.tokenizer.save_pretrained(str(folder))
        self.vocabulary.save(folder)

    def ids(self, segments: Segment | Sequence[Segment], *, bos: bool = True) -> list[int]:
        """Return the ids of text and images in order.

        Raises:
            DataError: A picture is given and there is no image tokenizer; or codes are malformed.
        """
        if isinstance(segments, str | Path | Image.Image):
            segments = [segments]
        own = self.tokenizer.bos_token_id
        found = [own] if bos and own is not None else []
        for segment in segments:
            if isinstance(segment, str):
                found += self.tokenizer(segment, add_special_tokens=False).input_ids
            else:
                found += self.vocabulary.to_ids(self._codes(segment))  # pyright: ignore[reportArgumentType]
        return found

    def __call__(
        self, batch: Sequence[Segment | Sequence[Segment]], *, labels: bool = False
    ) -> dict[str, Tensor]:
        """Return padded ids and masks (b, n), on the left, as generation wants them.

        Args:
            batch: One list of segments each.
            labels: Also return labels: the ids, with padding left out; padded on the right then.
        """
        if not batch:
            raise DataError("the batch is empty; give at least one list of segments")
        rows = [self.ids(segments) for segments in batch]  # pyright: ignore[reportArgumentType]
        longest = max(map(len, rows))
        pad = self.tokenizer.pad_token_id
        pad = self.tokenizer.eos_token_id if pad is None else pad
        ids = torch.full((len(rows), longest), pad)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            place = slice(0, len(row)) if labels else slice(longest - len(row), longest)
            ids[i, place] = torch.tensor(row)
            mask[i, place] = 1
        found = {"input_ids": ids, "attention_mask": mask}
        return {**found, "labels": ids.masked_fill(mask == 0, -100)} if labels else found

    def turn(
        self, segments: Sequence[Segment], *, template: Template = "plain", first: bool = True
    ) -> list[int]:
        """Return the ids of a user's turn, up to where the model answers.

        Args:
            segments: What the user says and shows.
            template: plain (pretraining), vicuna (SEED-LLaMA-8B), llama2 (14B).
            first: Whether the conversation begins.
        """
        if template == "plain":
            return self.ids(segments, bos=first)
        said = "".join(
            part if isinstance(part, str) else self.vocabulary.text_of(self._codes(part))
            for part in segments
        )
        if template == "vicuna":
            text = f"{'' if first else chr(10)}{USER}{said}{ASSISTANT}"
        else:
            text = f"{'' if first else chr(10)}[INST] {said} [/INST]\n"
        return self.ids([text], bos=first)

    def decode(self, ids: Sequence[int]) -> list[str | tuple[int, ...]]:
        """Return text and images (their codes) in order.

        Raises:
            DataError: An image is malformed.
        """
        return [
            self.tokenizer.decode(list(span.ids), skip_special_tokens=True).strip()
            if span.kind == "text"
            else span.ids
            for span in self.vocabulary.parse(ids)
        ]

    def _codes(self, segment: Any) -> Sequence[int]:
        if isinstance(segment, str | Path | Image.Image):
            if self.pipeline is None:
                raise DataError(
                    "a picture was given and this processor has no image tokenizer; give its codes "
                    "or make it with a SeedPipeline"
                )
            return self.pipeline.encode(segment)[0].tolist()
        return np.asarray(segment).ravel().tolist()
