"""Text for SceneSpot without a text network: a table of word vectors, and how words combine."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from polyzoo.core.errors import DataError, WeightsError
from polyzoo.core.log import get_logger
from polyzoo.core.weights import read_metadata, read_weights, write_weights
from polyzoo.regionspot.four_bits import cosine_basis, pack, unpack
from polyzoo.regionspot.names import check_names, clean_name
from polyzoo.regionspot.text import TextClassifier

_log = get_logger(__name__)
FILE_NAME = "words.safetensors"
STOP = frozenset((
    "a", "an", "the", "of", "and", "in", "on", "with", "at", "by", "to", "for", "from", "as",
    "is", "are", "or", "its", "it", "this", "that", "photo", "picture", "image", "no", "not",
    "up", "out", "over", "some", "any",
))  # fmt: skip
_LEAST_PART = 3


class TextSide(Protocol):
    """What turns names into vectors for SceneSpot."""

    source: str
    """Shown in results."""
    composed: bool
    """Whether names are put together from words."""

    def classifier(
        self, names: str | Sequence[str], *, scale: float, bias: float = 0.0
    ) -> TextClassifier:
        """Turn names into class vectors."""
        ...


class SentenceText:
    """all-MiniLM-L6-v2 itself, its vectors brought into the table's space."""

    source = "all-MiniLM-L6-v2"
    composed = False

    def __init__(self, basis: Tensor) -> None:
        """Read the asset.

        Args:
            basis: `(384, t)`.

        Raises:
            AssetError: The asset minilm has not been fetched.
        """
        from polyzoo.towers import load_text_tower

        self._text = load_text_tower("minilm")
        self._basis = basis.float()

    def classifier(
        self, names: str | Sequence[str], *, scale: float, bias: float = 0.0
    ) -> TextClassifier:
        """Turn names into class vectors."""
        checked = check_names(names)
        found = self._text.encode([clean_name(name) for name in checked]).float().cpu()
        vectors = F.normalize(found @ self._basis, dim=-1)
        return TextClassifier(checked, vectors, scale, self.source, bias)


class WordTable:
    """A vector for each of some thousand words, in the space of MiniLM's sentence vectors.

    A name is the weighted mean of its words. The table was fitted so that this is near what MiniLM
    says about the whole name.

    Example:
        >>> table.encode(["coffee cup", "red apple"]).shape
        torch.Size([2, 192])
    """

    composed = True

    def __init__(self, words: Sequence[str], vectors: Tensor, weights: Tensor, last: float) -> None:
        """Build it.

        Args:
            words: Lower case, distinct.
            vectors: `(n, t)`, unit length.
            weights: `(n,)` logarithms of how much each word counts in a name.
            last: Added to the weight of a name's last word, which mostly is the noun.
        """
        self.words = tuple(words)
        self.rows = {word: row for row, word in enumerate(self.words)}
        self.vectors = F.normalize(vectors.float(), dim=-1)
        self.weights = weights.float()
        self.last = last
        digest = hashlib.sha256("\n".join(self.words).encode())
        digest.update(self.vectors.half().numpy().tobytes())
        self.source = f"words-{digest.hexdigest()[:16]}"

    def __len__(self) -> int:
        return len(self.words)

    @classmethod
    def load(cls, folder: str | Path) -> WordTable:
        """Read what `save` wrote.

        Raises:
            WeightsError: The file is missing or damaged.
        """
        path = Path(folder) / FILE_NAME
        tensors, about = read_weights(path), read_metadata(path)
        try:
            words = bytes(tensors["words"].numpy().tobytes()).decode("utf-8").split("\n")
            vectors = unpack(tensors["vectors"], tensors["scales"])
            vectors = vectors @ cosine_basis(vectors.shape[1])
            return cls(words, vectors, tensors["weights"], float(about["last"]))
        except (KeyError, UnicodeDecodeError, ValueError) as error:
            raise WeightsError(f"{path}: is no table of words: {error!r}") from error

    def save(self, folder: str | Path) -> None:
        """Write four bits an entry."""
        packed, scales = pack(self.vectors @ cosine_basis(self.vectors.shape[1]).T)
        text = "\n".join(self.words).encode()
        tensors = {
            "words": torch.frombuffer(bytearray(text), dtype=torch.uint8),
            "vectors": packed,
            "scales": scales,
            "weights": self.weights.half(),
        }
        write_weights(Path(folder) / FILE_NAME, tensors, metadata={"last": repr(self.last)})

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Return unit `(n, t)` float32 vectors.

        Raises:
            DataError: A text has no word that the table knows.
        """
        return torch.stack([self._encode(text) for text in texts])

    def classifier(
        self, names: str | Sequence[str], *, scale: float, bias: float = 0.0
    ) -> TextClassifier:
        """Turn names into class vectors."""
        checked = check_names(names)
        vectors = self.encode([clean_name(name) for name in checked])
        return TextClassifier(checked, vectors, scale, self.source, bias)

    def find(self, word: str) -> list[int]:
        """Return the rows a word stands on: its own, its singular's, or its two parts'."""
        for form in _forms(word):
            if form in self.rows:
                return [self.rows[form]]
        for cut in range(len(word) - _LEAST_PART, _LEAST_PART - 1, -1):
            head, tail = word[:cut], word[cut:]
            tails = [form for form in _forms(tail) if form in self.rows]
            if head in self.rows and tails:
                return [self.rows[head], self.rows[tails[0]]]
        return []

    def _encode(self, text: str) -> Tensor:
        every = split_words(text)
        meant = [word for word in every if word not in STOP] or every
        rows: list[int] = []
        unknown: list[str] = []
        for word in meant:
            found = self.find(word)
            rows += found
            if not found:
                unknown.append(word)
        if not rows:
            raise DataError(
                f"names: {text!r} has no word among the {len(self):,} this model knows; use "
                "another word for it, or a model with a text network"
            )
        if unknown:
            _log.warning("names: %r is read without %s", text, ", ".join(map(repr, unknown)))
        chosen = torch.tensor(rows)
        weights = self.weights[chosen].clone()
        weights[-1] += self.last
        mean = (self.vectors[chosen] * weights.exp()[:, None]).sum(0)
        return F.normalize(mean, dim=-1)


def split_words(text: str) -> list[str]:
    """Return a text's words: lower case, without accents, digits and signs."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    return re.findall(r"[a-z]+", plain.replace("'s", "").replace("'", ""))


def _forms(word: str) -> list[str]:
    """The word, and what it may be the plural or the participle of."""
    forms = [word]
    if word.endswith("ies") and len(word) > 4:
        forms.append(word[:-3] + "y")
    if word.endswith("es") and len(word) > 4:
        forms.append(word[:-2])
    if word.endswith("s") and len(word) > 3:
        forms.append(word[:-1])
    if word.endswith("ing") and len(word) > 5:
        forms += [word[:-3], word[:-3] + "e"]
    if word.endswith("ed") and len(word) > 4:
        forms += [word[:-2], word[:-1]]
    return forms
