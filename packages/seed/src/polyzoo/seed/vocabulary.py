"""Images as words: which ids of a language model are codes, and what a well-formed image is."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

from polyzoo.core import config as configs
from polyzoo.core.errors import ConfigError, DataError
from polyzoo.core.io import atomic_write

BEGIN, END = "<img>", "</img>"
FILE_NAME = "image_vocabulary.json"


class Span(NamedTuple):
    """A stretch of a model's ids: text, or one image's codes."""

    kind: str
    """text or image."""
    ids: tuple[int, ...]
    """Ids of text, or codes of an image (the shift taken off)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageVocabulary:
    """The part of a vocabulary that stands for images. Torch-free.

    Codes come behind the base vocabulary and the two brackets behind them: with LLaMA's 32,000
    pieces and 8,192 codes, code k is 32000 + k, `<img>` 40192 and `</img>` 40193.

    Example:
        >>> vocabulary = ImageVocabulary.extend(tokenizer, codes=8192, tokens_per_image=32)
        >>> vocabulary.to_ids(range(32))[0] == vocabulary.begin
        True
    """

    shift: int
    """Id of code 0: the length of the vocabulary that was extended."""
    codes: int
    """Entries of the codebook."""
    tokens_per_image: int
    """Codes of an image."""
    begin: int
    """Id of `<img>`."""
    end: int
    """Id of `</img>`."""
    fingerprint: str = ""
    """SHA-256 of the whole vocabulary; empty leaves it unchecked."""

    @classmethod
    def extend(cls, tokenizer: Any, *, codes: int, tokens_per_image: int) -> Self:
        """Add codes and brackets to a Hugging Face tokenizer, in place.

        White space beside an image is dropped, as the published tokenizer does.

        Raises:
            ConfigError: Some of these words are there already, but not all, or in another order.
        """
        words = [*(code_word(code) for code in range(codes)), BEGIN, END]
        known = tokenizer.get_vocab()
        present = [word for word in words if word in known]
        if present and len(present) < len(words):
            raise ConfigError(
                f"the tokenizer has {len(present)} of {len(words)} image words, {present[0]} "
                "among them: it was extended for another codebook; start from the plain one"
            )
        shift = known[words[0]] if present else len(tokenizer)
        if not present:
            from transformers import AddedToken

            side = {"lstrip": True, "rstrip": True, "normalized": False}
            tokenizer.add_tokens([AddedToken(word, **side) for word in words[:-2]])
            tokenizer.add_tokens(
                [AddedToken(word, special=True, **side) for word in words[-2:]],
                special_tokens=True,
            )
            known = tokenizer.get_vocab()
        wrong = next((w for i, w in enumerate(words) if known.get(w) != shift + i), None)
        if wrong is not None and (wrong not in (BEGIN, END) or wrong not in known):
            raise ConfigError(
                f"{wrong} has id {known.get(wrong)}; codes must follow one another from {shift}"
            )
        return cls(
            shift=shift,
            codes=codes,
            tokens_per_image=tokens_per_image,
            begin=known[BEGIN],
            end=known[END],
            fingerprint=fingerprint(tokenizer),
        )

    @classmethod
    def load(cls, folder: str | Path) -> ImageVocabulary:
        """Read the vocabulary stored beside a language model."""
        path = Path(folder) / FILE_NAME
        if not path.is_file():
            raise DataError(
                f"{path}: no such file; this language model has not learned images (train-lm)"
            )
        return configs.load(cls, path)

    def save(self, folder: str | Path) -> None:
        """Write it beside a language model."""
        with atomic_write(Path(folder) / FILE_NAME, "w") as file:
            file.write(json.dumps(asdict(self), indent=2) + "\n")

    def check(self, tokenizer: Any, *, rows: int | None = None) -> None:
        """Refuse a tokenizer or a model that this vocabulary does not belong to.

        Args:
            tokenizer: The extended one.
            rows: Rows of the model's embedding.

        Raises:
            ConfigError: The tokenizer was changed, or the model is smaller than it.
        """
        if self.fingerprint and fingerprint(tokenizer) != self.fingerprint:
            raise ConfigError(
                f"the tokenizer was changed after training: its {len(tokenizer)} pieces are not "
                "those the image ids were given for; use the one saved beside the model"
            )
        if rows is not None and rows < len(tokenizer):
            raise ConfigError(
                f"the language model has {rows} embeddings and the tokenizer {len(tokenizer)} "
                "pieces: resize the model (train-lm does) before loading adapters"
            )

    def to_ids(self, codes: Iterable[int]) -> list[int]:
        """Return the ids of one image, brackets included.

        Raises:
            DataError: Not as many codes as an image has, or one outside the codebook.
        """
        values = [int(code) for code in codes]
        if len(values) != self.tokens_per_image:
            raise DataError(f"an image has {self.tokens_per_image} codes, not {len(values)}")
        bad = next((code for code in values if not 0 <= code < self.codes), None)
        if bad is not None:
            hint = (
                f"; this looks like a language model's id: subtract the shift {self.shift}"
                if bad >= self.shift > 0
                else ""
            )
            raise DataError(f"code {bad} lies outside 0 to {self.codes - 1}{hint}")
        return [self.begin, *(self.shift + code for code in values), self.end]

    def text_of(self, codes: Iterable[int]) -> str:
        """Return one image as words."""
        ids = self.to_ids(codes)
        return BEGIN + "".join(code_word(i - self.shift) for i in ids[1:-1]) + END

    def is_code(self, token: int) -> bool:
        """Tell whether an id is a code."""
        return self.shift <= token < self.shift + self.codes

    def parse(self, ids: Sequence[int]) -> list[Span]:
        """Split a model's ids into text and images, in order.

        Raises:
            DataError: An image is malformed; says where and how.
        """
        spans: list[Span] = []
        text: list[int] = []
        place = 0
        while place < len(ids):
            token = int(ids[place])
            if token == self.begin:
                if text:
                    spans.append(Span("text", tuple(text)))
                    text = []
                stop = place + 1 + self.tokens_per_image
                codes = [int(i) for i in ids[place + 1 : stop]]
                found = next((k for k, i in enumerate(codes) if not self.is_code(i)), len(codes))
                closed = stop < len(ids) and int(ids[stop]) == self.end
                if found < self.tokens_per_image or not closed:
                    after = place + 1 + found
                    what = "the end" if after >= len(ids) else f"id {int(ids[after])}"
                    raise DataError(
                        f"the image at position {place} has {found} codes and then {what}; it must "
                        f"have {self.tokens_per_image} and then {END}"
                    )
                spans.append(Span("image", tuple(i - self.shift for i in codes)))
                place = stop + 1
                continue
            if token == self.end or self.is_code(token):
                word = END if token == self.end else code_word(token - self.shift)
                raise DataError(f"{word} at position {place} stands outside an image")
            text.append(token)
            place += 1
        if text:
            spans.append(Span("text", tuple(text)))
        return spans

    def images(self, ids: Sequence[int]) -> list[tuple[int, ...]]:
        """Return the codes of every image in a model's ids."""
        return [span.ids for span in self.parse(ids) if span.kind == "image"]


def code_word(code: int) -> str:
    """Return the word of a code: five digits, as published."""
    return f"<img_{code:05d}>"


def fingerprint(tokenizer: Any) -> str:
    """Return the SHA-256 of a tokenizer's vocabulary."""
    words = json.dumps(sorted(tokenizer.get_vocab().items()), ensure_ascii=False)
    return hashlib.sha256(words.encode()).hexdigest()
