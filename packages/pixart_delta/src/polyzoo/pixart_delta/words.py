"""The small model's text encoder: one vector a word, from WordLlama, cut to a vocabulary."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from polyzoo.core.assets.cache import asset_folder, is_present
from polyzoo.core.errors import DataError, WeightsError
from polyzoo.core.io import atomic_write
from polyzoo.core.log import get_logger
from polyzoo.core.weights import read_weights, write_weights
from polyzoo.pixart_delta.captions import PackedCaptions

_log = get_logger(__name__)
_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)?")
ASSET = "wordllama"
ASSET_CHANNELS = 256
VECTORS, WORDS = "words.safetensors", "words.txt"


def split_words(text: str) -> list[str]:
    """Lower-case words of a text; punctuation goes."""
    return _WORD.findall(text.lower())


class WordEncoder(nn.Module):
    """Prompts to word vectors, with an end vector after the last word.

    Words outside the vocabulary are looked up in the WordLlama asset where it has been fetched,
    and left out with a warning where not.

    Example:
        >>> encoder = WordEncoder.from_folder("models/icons/text")
        >>> encoder.encode(["red apple, flat style"]).lengths
        (5,)
    """

    vectors: Tensor

    def __init__(self, words: Sequence[str], vectors: Tensor, *, length: int = 24) -> None:
        """Hold a vocabulary.

        Args:
            words: Lower-case, each once.
            vectors: `(len(words), c)`, of mean square 1.
            length: Most tokens of a caption, the end included.
        """
        super().__init__()
        if vectors.ndim != 2 or len(words) != len(vectors):
            raise WeightsError(
                f"{len(words)} words for vectors of shape {tuple(vectors.shape)}: give one each"
            )
        self.words = tuple(words)
        self.index = {word: row for row, word in enumerate(self.words)}
        self.length = length
        self.register_buffer("vectors", vectors.float(), persistent=False)
        self._fallback: WordLlama | None = None

    @classmethod
    def from_folder(cls, folder: str | Path, *, length: int = 24) -> WordEncoder:
        """Read words.txt and words.safetensors."""
        folder = Path(folder)
        try:
            words = (folder / WORDS).read_text(encoding="utf-8").split()
        except FileNotFoundError:
            raise WeightsError(f"{folder / WORDS}: no such file") from None
        return cls(words, read_weights(folder / VECTORS)["vectors"], length=length)

    def save(self, folder: str | Path) -> None:
        """Write the two files, vectors as int8."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_weights(folder / VECTORS, {"vectors": self.vectors}, int8_rows=["vectors"])
        with atomic_write(folder / WORDS, "w") as file:
            file.write("\n".join(self.words) + "\n")

    @property
    def channels(self) -> int:
        """Channels of a vector."""
        return self.vectors.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """Of the vectors."""
        return self.vectors.dtype

    @property
    def device(self) -> torch.device:
        """Where the vectors are."""
        return self.vectors.device

    @property
    def end(self) -> Tensor:
        """The vector after the last word; alone it is the empty caption."""
        return torch.ones(self.channels, device=self.vectors.device)

    def ids(self, text: str) -> list[int]:
        """Rows of the known words of a text, cut to the length; without the end."""
        rows = [self._row(word) for word in split_words(text)]
        return [row for row in rows if row is not None][: self.length - 1]

    def encode(self, texts: Sequence[str]) -> PackedCaptions:
        """Vectors of each text; at least the end vector.

        Warns where words are unknown or do not fit.
        """
        parts: list[Tensor] = []
        for text in texts:
            if not isinstance(text, str):
                raise DataError(f"a prompt is text, not {type(text).__name__}")
            rows = [self._vector(word, text) for word in split_words(text)]
            rows = [row for row in rows if row is not None]
            if len(rows) >= self.length:
                cut = " ".join(split_words(text)[self.length - 1 :])
                _log.warning(
                    "the prompt is longer than %d words; left out: %r", self.length - 1, cut
                )
                rows = rows[: self.length - 1]
            parts.append(torch.stack([*rows, self.end]))
        return PackedCaptions(torch.cat(parts), tuple(len(part) for part in parts))

    def _row(self, word: str) -> int | None:
        """Row of a word, or of its singular."""
        for form in (word, word.removesuffix("s"), word.removesuffix("es")):
            if form in self.index:
                return self.index[form]
        return None

    def _vector(self, word: str, text: str) -> Tensor | None:
        row = self._row(word)
        if row is not None:
            return self.vectors[row]
        fits = self.channels == ASSET_CHANNELS
        if self._fallback is None and fits and is_present(ASSET):
            self._fallback = WordLlama()
        if self._fallback is not None:
            return self._fallback.vector(word).to(self.vectors)
        _log.warning(
            "%r of the prompt %r is not among the %d words of this model and is left out; "
            "`polyzoo assets fetch %s` brings more words",
            word, text, len(self.words), ASSET,
        )  # fmt: skip
        return None


class WordLlama:
    """The whole table: any word, as the mean of its pieces' rows, scaled to mean square 1."""

    def __init__(self) -> None:
        from tokenizers import Tokenizer

        folder = asset_folder(ASSET)
        (self.table,) = read_weights(folder, dtype=torch.float32).values()
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))

    def vector(self, word: str) -> Tensor:
        """`(256,)` float32."""
        ids = self.tokenizer.encode(word, add_special_tokens=False).ids
        mean = self.table[ids].mean(dim=0)
        return mean / mean.square().mean().sqrt().clamp(min=1e-6)


def build_vocabulary(texts: Iterable[str]) -> WordEncoder:
    """Cut WordLlama to the words of some texts; needs the asset."""
    words = sorted({word for text in texts for word in split_words(text)})
    table = WordLlama()
    return WordEncoder(words, torch.stack([table.vector(word) for word in words]))
