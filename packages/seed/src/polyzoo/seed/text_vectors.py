"""A frozen sentence encoder's vectors of the texts a tokenizer is trained with."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from polyzoo.core.errors import DataError
from polyzoo.core.weights import read_metadata, read_weights, write_weights

FILE_NAME = "text_vectors.safetensors"


class TextVectors:
    """Texts with a unit vector each.

    Example:
        >>> TextVectors.load("prepared").of(["red apple"]).shape
        torch.Size([1, 384])
    """

    def __init__(self, places: Mapping[str, int], vectors: Tensor) -> None:
        self.places = dict(places)
        self.vectors = vectors
        """(k, d) fp32, on the CPU."""

    @classmethod
    def load(cls, path: str | Path) -> TextVectors:
        """Read the file, or the one in a folder."""
        path = Path(path)
        path = path / FILE_NAME if path.is_dir() else path
        vectors = read_weights(path)["vectors"].float()
        try:
            texts = json.loads(read_metadata(path)["texts"])
        except (KeyError, ValueError) as error:
            raise DataError(f"{path}: holds no list of texts; write it again") from error
        unit = torch.nn.functional.normalize(vectors, dim=1)
        return cls({text: i for i, text in enumerate(texts)}, unit)

    def save(self, path: str | Path) -> None:
        """Write the vectors as int8 rows, with their texts in the header."""
        texts = json.dumps(list(self.places), ensure_ascii=False)
        write_weights(path, {"vectors": self.vectors}, metadata={"texts": texts},
                      int8_rows=["vectors"])  # fmt: skip

    @property
    def dim(self) -> int:
        """Channels of a vector."""
        return self.vectors.shape[1]

    def of(self, texts: Sequence[str]) -> Tensor:
        """Return (b, d).

        Raises:
            DataError: A text was not prepared.
        """
        missing = [text for text in texts if text not in self.places]
        if missing:
            raise DataError(
                f"{len(missing)} texts have no vector, first {missing[0]!r}; run "
                "`polyzoo seed prepare` on the same data"
            )
        return self.vectors[torch.tensor([self.places[text] for text in texts])]
