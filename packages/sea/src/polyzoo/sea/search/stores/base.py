"""What an index asks of a vector engine: points with a payload, exact search under a filter."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from polyzoo.core.errors import DataError

Ids = npt.NDArray[np.int64]
Vectors = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, slots=True)
class Points:
    """Vectors to store, one row each in every field."""

    ids: Ids
    """(n,), positive, chosen by the caller and never given to other content."""
    vectors: Vectors
    """(n, dim)."""
    files: Ids
    """(n,) number of the source file."""
    languages: Sequence[str]
    kinds: Sequence[str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Filter:
    """Which points a search may return; an empty field lets everything through."""

    languages: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()
    files: tuple[int, ...] | None = None
    """Numbers of the allowed source files; None allows all, an empty tuple none."""

    @property
    def is_empty(self) -> bool:
        """Whether it lets everything through."""
        return not self.languages and not self.kinds and self.files is None


class VectorStore(ABC):
    """Vectors by number, searched by inner product.

    `upsert` and `delete` are durable when they return. Every search is exact. One writer at a time,
    any number of readers where the engine allows it; a reader sees what was written before its
    call.
    """

    dim: int
    """Channels of every vector."""

    @abstractmethod
    def upsert(self, points: Points) -> None:
        """Add points, replacing those with the same number."""

    @abstractmethod
    def delete(self, ids: Ids) -> None:
        """Remove points; unknown numbers are ignored."""

    @abstractmethod
    def get(self, ids: Ids) -> tuple[Ids, Vectors]:
        """Return the numbers that are stored, in the order asked for, and their vectors."""

    @abstractmethod
    def search(
        self, query: Vectors, *, limit: int, where: Filter | None = None
    ) -> tuple[Ids, Vectors]:
        """Return the numbers and scores of the best points, best first, equal scores by number."""

    @abstractmethod
    def ids(self) -> Ids:
        """Return all stored numbers, ascending."""

    @abstractmethod
    def close(self) -> None:
        """Release files and connections; the store is not used afterwards."""

    @abstractmethod
    def drop(self) -> None:
        """Remove everything this store holds, then close it."""

    @abstractmethod
    def disk_bytes(self) -> int | None:
        """Return the size on this machine's disk; None where the vectors live elsewhere."""

    def publish(self) -> None:  # noqa: B027 - only engines with public names need it
        """Make this store the one that other tools find under the index's name."""

    def check_points(self, points: Points) -> None:
        """Refuse points that no engine should hold.

        Raises:
            DataError: names the number and the rule.
        """
        count = len(points.ids)
        if points.vectors.shape != (count, self.dim):
            raise DataError(
                f"vectors of shape {points.vectors.shape} do not fit a store of {self.dim} "
                f"channels and {count} numbers; was the index built with another model?"
            )
        if count and points.ids.min() <= 0:
            raise DataError(f"id {points.ids.min()} must be positive")
        if not (len(points.files) == len(points.languages) == len(points.kinds) == count):
            raise DataError("files, languages and kinds need one entry per vector")
        finite = np.isfinite(points.vectors).all(axis=1)
        if not finite.all():
            raise DataError(f"the vector of id {points.ids[~finite][0]} holds NaN or infinity")

    def check_query(self, query: Vectors, limit: int) -> None:
        """Refuse a query no engine can answer.

        Raises:
            DataError: names the value and the rule.
        """
        if query.shape != (self.dim,):
            raise DataError(
                f"query vector of shape {query.shape} does not fit a store of {self.dim} channels; "
                "was the index built with another model?"
            )
        if not np.isfinite(query).all():
            raise DataError("the query vector holds NaN or infinity")
        if limit < 1:
            raise DataError(f"limit={limit} must be at least 1")


def ordered(ids: Ids, scores: Vectors, limit: int) -> tuple[Ids, Vectors]:
    """Sort by falling score, equal scores by rising number, and cut."""
    order = np.lexsort((ids, -scores))[:limit]
    return ids[order], scores[order]
