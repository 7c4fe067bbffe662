"""Vector engines behind one interface; only the one asked for is imported."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from polyzoo.core.errors import ConfigError
from polyzoo.sea.search.stores.base import Filter, Ids, Points, Vectors, VectorStore

__all__ = [
    "Filter",
    "Ids",
    "Points",
    "StoreKind",
    "StorePlace",
    "VectorStore",
    "Vectors",
    "open_store",
]

StoreKind = Literal["local", "qdrant", "lancedb"]


@dataclass(frozen=True, kw_only=True, slots=True)
class StorePlace:
    """Where the vectors of one generation of an index are."""

    kind: StoreKind
    location: str
    """Folder of a local store; address or folder of Qdrant; folder or bucket of LanceDB."""
    name: str
    """What the engine calls this index."""
    generation: int
    dim: int
    dtype: Literal["float32", "float16"]
    model_id: str


def open_store(
    place: StorePlace, *, create: bool = False, beside: VectorStore | None = None
) -> VectorStore:
    """Open a store, or make it if `create` and it is not there.

    Args:
        place: Where it is.
        create: Make it if need be.
        beside: A store of the same index, closed after this one; its connection is shared.

    Raises:
        DataError: it is not there, is damaged, or holds vectors of another size.
        MissingExtraError: its engine is not installed.
    """
    if place.kind == "local":
        from polyzoo.sea.search.stores.local import LocalStore

        folder = Path(place.location, f"{place.name}-{place.generation}")
        return LocalStore(folder, dim=place.dim, dtype=place.dtype, create=create)
    if place.kind == "qdrant":
        from polyzoo.sea.search.stores.qdrant import QdrantStore

        return QdrantStore(
            place.location,
            name=place.name,
            generation=place.generation,
            dim=place.dim,
            model_id=place.model_id,
            create=create,
            beside=beside if isinstance(beside, QdrantStore) else None,
        )
    if place.kind == "lancedb":
        from polyzoo.sea.search.stores.lancedb import LanceStore

        return LanceStore(
            place.location,
            name=place.name,
            generation=place.generation,
            dim=place.dim,
            create=create,
        )
    raise ConfigError(f"store={place.kind!r} is not known; choose local, qdrant or lancedb")
