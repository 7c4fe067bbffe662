# ruff: noqa: D102 - the interface documents what its methods do
"""Vectors in Qdrant: a server or cluster by address, or its local mode in a folder or in memory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from polyzoo.core.errors import DataError, LockedError, PolyzooError
from polyzoo.core.lazy import import_extra
from polyzoo.sea.search.stores.base import Filter, Ids, Points, Vectors, VectorStore, ordered

_BATCH = 256
_SCROLL = 4_096
_TIMEOUT_SECONDS = 60
_ALIAS_SEPARATOR = "-g"


class QdrantStore(VectorStore):
    """One collection per generation of an index; `publish` moves the index's alias to this one.

    On a server, language, kind and file get payload indexes, and searches ask for exact results.
    The key comes from the environment variable QDRANT_API_KEY, so that no process list shows it.
    Local mode keeps its folder to one process: no search while another process indexes.

    Example:
        >>> store = QdrantStore(":memory:", name="demo", generation=1, dim=384, create=True)
    """

    def __init__(
        self,
        location: str,
        *,
        name: str,
        generation: int,
        dim: int,
        model_id: str = "",
        create: bool = False,
        beside: QdrantStore | None = None,
    ) -> None:
        self.dim, self.location, self.alias = dim, location, name
        self.collection = f"{name}{_ALIAS_SEPARATOR}{generation}"
        self._models = import_extra("qdrant_client.models", install="polyzoo-sea[qdrant]")
        self._is_server = location.startswith(("http://", "https://"))
        self._owns_client = beside is None
        with self._explained():
            self._client = beside._client if beside else self._connect()
        try:
            with self._explained():
                if create and not self._client.collection_exists(self.collection):
                    self._create(model_id)
                self._check()
        except BaseException:
            self.close()
            raise

    def upsert(self, points: Points) -> None:
        self.check_points(points)
        for start in range(0, len(points.ids), _BATCH):
            part = slice(start, start + _BATCH)
            columns = points.files[part], points.languages[part], points.kinds[part]
            batch = self._models.Batch(
                ids=points.ids[part].tolist(),
                vectors=points.vectors[part].tolist(),
                payloads=[
                    {"file": int(file), "language": language, "kind": kind}
                    for file, language, kind in zip(*columns, strict=True)
                ],
            )
            with self._explained():
                self._client.upsert(self.collection, batch, wait=True)

    def delete(self, ids: Ids) -> None:
        for start in range(0, len(ids), _SCROLL):
            chosen = self._models.PointIdsList(points=ids[start : start + _SCROLL].tolist())
            with self._explained():
                self._client.delete(self.collection, chosen, wait=True)

    def get(self, ids: Ids) -> tuple[Ids, Vectors]:
        found: dict[int, Any] = {}
        for start in range(0, len(ids), _SCROLL):
            with self._explained():
                records = self._client.retrieve(
                    self.collection,
                    ids[start : start + _SCROLL].tolist(),
                    with_payload=False,
                    with_vectors=True,
                )
            found |= {int(record.id): record.vector for record in records}
        kept = [number for number in ids.tolist() if number in found]
        vectors = [found[number] for number in kept]
        return np.array(kept, np.int64), np.array(vectors, np.float32).reshape(-1, self.dim)

    def search(
        self, query: Vectors, *, limit: int, where: Filter | None = None
    ) -> tuple[Ids, Vectors]:
        self.check_query(query, limit)
        if where is not None and where.files == ():
            return np.empty(0, np.int64), np.empty(0, np.float32)
        # Local mode is always exact and warns about being asked.
        exact = self._models.SearchParams(exact=True) if self._is_server else None
        with self._explained():
            answer = self._client.query_points(
                self.collection,
                query=np.asarray(query, np.float32).tolist(),
                query_filter=self._condition(where),
                search_params=exact,
                limit=limit,
                with_payload=False,
            )
        ids = np.array([point.id for point in answer.points], np.int64)
        scores = np.array([point.score for point in answer.points], np.float32)
        return ordered(ids, scores, limit)

    def ids(self) -> Ids:
        numbers: list[int] = []
        offset: Any = None
        while True:
            with self._explained():
                records, offset = self._client.scroll(
                    self.collection,
                    limit=_SCROLL,
                    offset=offset,
                    with_payload=False,
                    with_vectors=False,
                )
            numbers += [int(record.id) for record in records]
            if offset is None:
                return np.array(sorted(numbers), np.int64)

    def close(self) -> None:
        if self._owns_client:
            self._client.close()

    def drop(self) -> None:
        with self._explained():
            self._client.delete_collection(self.collection)
        self.close()

    def disk_bytes(self) -> int | None:
        if self._is_server or self.location == ":memory:":
            return None
        folder = Path(self.location)
        return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())

    def publish(self) -> None:
        models = self._models
        operations: list[Any] = []
        with self._explained():
            aliases = self._client.get_aliases().aliases
            if any(alias.alias_name == self.alias for alias in aliases):
                old = models.DeleteAlias(alias_name=self.alias)
                operations.append(models.DeleteAliasOperation(delete_alias=old))
            new = models.CreateAlias(collection_name=self.collection, alias_name=self.alias)
            operations.append(models.CreateAliasOperation(create_alias=new))
            # One request: the server applies both or neither, so the name never leads nowhere.
            self._client.update_collection_aliases(operations)

    def _connect(self) -> Any:
        client = import_extra("qdrant_client", install="polyzoo-sea[qdrant]").QdrantClient
        if self._is_server:
            key = os.environ.get("QDRANT_API_KEY")
            # The check is a request of its own that only warns; a failing call says more.
            return client(
                url=self.location, api_key=key, timeout=_TIMEOUT_SECONDS, check_compatibility=False
            )
        if self.location == ":memory:":
            return client(":memory:")
        Path(self.location).mkdir(parents=True, exist_ok=True)
        return client(path=self.location)

    def _create(self, model_id: str) -> None:
        models = self._models
        self._client.create_collection(
            self.collection,
            vectors_config=models.VectorParams(size=self.dim, distance=models.Distance.DOT),
            metadata={"model_id": model_id},
        )
        if self._is_server:
            for field, schema in (
                ("file", models.PayloadSchemaType.INTEGER),
                ("language", models.PayloadSchemaType.KEYWORD),
                ("kind", models.PayloadSchemaType.KEYWORD),
            ):
                self._client.create_payload_index(self.collection, field, schema, wait=True)

    def _check(self) -> None:
        if not self._client.collection_exists(self.collection):
            raise DataError(
                f"Qdrant at {self.location} has no collection {self.collection}; "
                "build the index again"
            )
        size = self._client.get_collection(self.collection).config.params.vectors.size
        if size != self.dim:
            raise DataError(
                f"Qdrant collection {self.collection} holds vectors of {size} channels, not "
                f"{self.dim}; build the index again"
            )

    def _condition(self, where: Filter | None) -> Any:
        if where is None or where.is_empty:
            return None
        models = self._models
        fields = {"language": where.languages, "kind": where.kinds, "file": where.files}
        return models.Filter(
            must=[
                models.FieldCondition(key=key, match=models.MatchAny(any=list(values)))
                for key, values in fields.items()
                if values
            ]
        )

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn the client's errors into ones that name the place and the way out."""
        exceptions = import_extra("qdrant_client.http.exceptions", install="polyzoo-sea[qdrant]")
        try:
            yield
        except exceptions.ResponseHandlingException as error:
            raise PolyzooError(
                f"Qdrant at {self.location} does not answer ({error}); start it, or correct the "
                "address"
            ) from error
        except exceptions.UnexpectedResponse as error:
            raise PolyzooError(f"Qdrant at {self.location} refused a request: {error}") from error
        except RuntimeError as error:
            if "already accessed" not in str(error):
                raise
            raise LockedError(
                f"{self.location} is in use by another process, and Qdrant's local mode allows "
                "one; wait for it, or use a Qdrant server (--store-location http://HOST:6333)"
            ) from error
