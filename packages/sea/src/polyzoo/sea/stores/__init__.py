"""Vector engines behind one interface; only the one asked for is imported."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from polyzoo.core.errors import ConfigError
from polyzoo.sea.stores.base import Filter, Ids, Points, VectorStore, Vectors

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


def open_store(place: StorePlace, *, create: bool = False) -> VectorStore:
    """Open a store, or make it if `create` and it is not there.

    Raises:
        DataError: it is not there, is damaged, or holds vectors of another size.
        MissingExtraError: its engine is not installed.
    """
    if place.kind == "local":
        from polyzoo.sea.stores.local import LocalStore

        folder = Path(place.location, f"{place.name}-{place.generation}")
        return LocalStore(folder, dim=place.dim, dtype=place.dtype, create=create)
    if place.kind == "qdrant":
        from polyzoo.sea.stores.qdrant import QdrantStore

        return QdrantStore(
            place.location,
            name=place.name,
            generation=place.generation,
            dim=place.dim,
            model_id=place.model_id,
            create=create,
        )
    if place.kind == "lancedb":
        from polyzoo.sea.stores.lancedb import LanceStore

        return LanceStore(
            place.location,
            name=place.name,
            generation=place.generation,
            dim=place.dim,
            create=create,
        )
    raise ConfigError(f"store={place.kind!r} is not known; choose local, qdrant or lancedb")
