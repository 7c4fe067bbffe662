"""What any model must beat: TF-IDF over split identifiers. Torch-free."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

_WORD = re.compile(r"[A-Za-z]+|[0-9]+")
_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")


def terms(text: str) -> list[str]:
    """Lower-case words, identifiers cut at underscores, digits and camelCase borders."""
    return [
        part.lower() for word in _WORD.findall(text) for part in _CAMEL.split(word) if len(part) > 1
    ]


class TfIdf:
    """Cosine of tf-idf vectors, with logarithmic term counts and smoothed document frequencies.

    Example:
        >>> TfIdf(["def read_file(path): ...", "def add(a, b): ..."]).scores(["read a file"]).shape
        (1, 2)
    """

    def __init__(self, documents: Sequence[str]) -> None:
        """Count the terms of the pool; weights come from the pool alone."""
        self._size = len(documents)
        counts = [Counter(terms(document)) for document in documents]
        frequency = Counter(term for count in counts for term in count)
        self._idf = {
            term: float(np.log((1 + self._size) / (1 + n)) + 1) for term, n in frequency.items()
        }
        postings: dict[str, tuple[list[int], list[float]]] = {term: ([], []) for term in frequency}
        for document, count in enumerate(counts):
            for term, weight in self._weights(count).items():
                postings[term][0].append(document)
                postings[term][1].append(weight)
        self._postings = {
            term: (np.array(documents), np.array(weights, dtype=np.float32))
            for term, (documents, weights) in postings.items()
        }

    def scores(self, queries: Sequence[str]) -> np.ndarray:
        """(q, documents) cosines in float32; a query without known terms scores 0 everywhere."""
        scores = np.zeros((len(queries), self._size), dtype=np.float32)
        for line, query in zip(scores, queries, strict=True):
            for term, weight in self._weights(Counter(terms(query))).items():
                documents, weights = self._postings[term]
                line[documents] += weight * weights
        return scores

    def _weights(self, count: Counter[str]) -> dict[str, float]:
        """Terms of a text with their weights, of length 1; unknown terms are left out."""
        known = {
            term: (1 + float(np.log(n))) * self._idf[term]
            for term, n in count.items()
            if term in self._idf
        }
        length = float(np.sqrt(sum(weight * weight for weight in known.values())))
        return {term: weight / length for term, weight in known.items()} if length else {}
