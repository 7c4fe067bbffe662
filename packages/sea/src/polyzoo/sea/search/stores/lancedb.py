# ruff: noqa: D102 - the interface documents what its methods do
"""Vectors in LanceDB: a versioned table in a folder or in object storage."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np

from polyzoo.core.errors import DataError, PolyzooError
from polyzoo.core.lazy import import_extra
from polyzoo.sea.search.stores.base import Filter, Ids, Points, Vectors, VectorStore, ordered

_BATCH = 4_096
_WRITES_PER_COMPACTION = 64


class LanceStore(VectorStore):
    """One table per generation of an index, searched without an approximate index, so exactly.

    Every write makes a version of the table; they are merged now and then, and on closing.

    Example:
        >>> store = LanceStore("vectors.lance", name="demo", generation=1, dim=384, create=True)
    """

    def __init__(
        self, location: str, *, name: str, generation: int, dim: int, create: bool = False
    ) -> None:
        self.dim, self.location = dim, location
        self.table_name = f"{name}-g{generation}"
        self._arrow = import_extra("pyarrow", install="polyzoo-sea[lancedb]")
        lancedb = import_extra("lancedb", install="polyzoo-sea[lancedb]")
        self._writes = 0
        with self._explained():
            # Readers look for a new version before every search.
            self._database = lancedb.connect(location, read_consistency_interval=timedelta(0))
            if create and self.table_name not in self._database.list_tables().tables:
                self._database.create_table(self.table_name, schema=self._schema())
            self._table = self._open()

    def upsert(self, points: Points) -> None:
        self.check_points(points)
        if not len(points.ids):
            return
        arrow = self._arrow
        flat = arrow.array(np.asarray(points.vectors, np.float32).ravel())
        columns = {
            "id": points.ids,
            "vector": arrow.FixedSizeListArray.from_arrays(flat, self.dim),
            "file": points.files,
            "language": list(points.languages),
            "kind": list(points.kinds),
        }
        with self._explained():
            merge = self._table.merge_insert("id").when_matched_update_all()
            merge.when_not_matched_insert_all().execute(arrow.table(columns, schema=self._schema()))
            self._writes += 1
            if self._writes % _WRITES_PER_COMPACTION == 0:
                self._table.optimize()

    def delete(self, ids: Ids) -> None:
        for start in range(0, len(ids), _BATCH):
            numbers = ", ".join(map(str, ids[start : start + _BATCH].tolist()))
            with self._explained():
                self._table.delete(f"id IN ({numbers})")
            self._writes += 1

    def get(self, ids: Ids) -> tuple[Ids, Vectors]:
        found: dict[int, Vectors] = {}
        for start in range(0, len(ids), _BATCH):
            numbers = ids[start : start + _BATCH].tolist()
            condition = f"id IN ({', '.join(map(str, numbers))})"
            with self._explained():
                query = self._table.search().where(condition).limit(len(numbers))
                rows = query.select(["id", "vector"]).to_arrow()
            vectors = rows["vector"].combine_chunks().flatten().to_numpy().reshape(-1, self.dim)
            found |= dict(zip(rows["id"].to_pylist(), vectors, strict=True))
        kept = [number for number in ids.tolist() if number in found]
        vectors = np.array([found[number] for number in kept], np.float32)
        return np.array(kept, np.int64), vectors.reshape(-1, self.dim)

    def search(
        self, query: Vectors, *, limit: int, where: Filter | None = None
    ) -> tuple[Ids, Vectors]:
        self.check_query(query, limit)
        if where is not None and where.files == ():
            return np.empty(0, np.int64), np.empty(0, np.float32)
        with self._explained():
            search = self._table.search(np.asarray(query, np.float32)).distance_type("dot")
            if where is not None and not where.is_empty:
                search = search.where(_condition(where), prefilter=True)
            rows = search.limit(limit).select(["id", "_distance"]).to_arrow()
        ids = rows["id"].to_numpy().astype(np.int64)
        scores = 1.0 - rows["_distance"].to_numpy()  # the engine's distance is 1 - inner product
        return ordered(ids, scores.astype(np.float32), limit)

    def ids(self) -> Ids:
        with self._explained():
            rows = self._table.search().select(["id"]).limit(self._table.count_rows() or 1)
            return np.sort(rows.to_arrow()["id"].to_numpy().astype(np.int64))

    def close(self) -> None:
        if self._writes:
            with self._explained():
                self._table.optimize()
            self._writes = 0

    def drop(self) -> None:
        with self._explained():
            self._database.drop_table(self.table_name)

    def disk_bytes(self) -> int | None:
        if "://" in self.location:
            return None
        files = Path(self.location).rglob("*")
        return sum(file.stat().st_size for file in files if file.is_file())

    def _schema(self) -> Any:
        arrow = self._arrow
        return arrow.schema(
            [
                ("id", arrow.int64()),
                ("vector", arrow.list_(arrow.float32(), self.dim)),
                ("file", arrow.int64()),
                ("language", arrow.string()),
                ("kind", arrow.string()),
            ]
        )

    def _open(self) -> Any:
        if self.table_name not in self._database.list_tables().tables:
            raise DataError(
                f"LanceDB at {self.location} has no table {self.table_name}; build the index again"
            )
        table = self._database.open_table(self.table_name)
        size = table.schema.field("vector").type.list_size
        if size != self.dim:
            raise DataError(
                f"LanceDB table {self.table_name} holds vectors of {size} channels, not "
                f"{self.dim}; build the index again"
            )
        return table

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except PolyzooError:
            raise
        except (OSError, RuntimeError, ValueError) as error:  # what the engine's binding raises
            raise PolyzooError(f"LanceDB at {self.location} failed: {error}") from error


def _condition(where: Filter) -> str:
    def quoted(values: tuple[str, ...]) -> str:
        return ", ".join("'" + value.replace("'", "''") + "'" for value in values)

    parts = []
    if where.languages:
        parts.append(f"language IN ({quoted(where.languages)})")
    if where.kinds:
        parts.append(f"kind IN ({quoted(where.kinds)})")
    if where.files is not None:
        parts.append(f"file IN ({', '.join(map(str, where.files))})")
    return " AND ".join(parts)
