# ruff: noqa: D102 - the interface documents what its methods do
"""The default store: an append-only matrix and an append-only log beside it, searched exactly."""

from __future__ import annotations

import errno
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

import numpy as np
import numpy.typing as npt

from polyzoo.core.errors import DataError, PolyzooError
from polyzoo.core.io import atomic_write, fsync_folder
from polyzoo.sea.search.stores.base import Filter, Ids, Points, Vectors, VectorStore, ordered
from polyzoo.sea.search.stores.scoring import allowed_rows, inner_products

_ENTRY = np.dtype([("id", "<i8"), ("file", "<i8"), ("language", "S16"), ("kind", "S8")])
"""A positive number says that the next matrix row is its vector, a negative one that it is gone."""

_CHUNK_ROWS = 16_384
_MIN_DEAD_ROWS = 4_096


@dataclass(frozen=True, slots=True)
class _Snapshot:
    """What the files said at one moment; later appends do not touch it."""

    epoch: int
    log_bytes: int
    rows: npt.NDArray[np.int64]
    """(n,) matrix row of each live point, ascending."""
    entries: npt.NDArray[np.void]
    """(n,) log entry of each live point."""
    matrix: npt.NDArray[np.floating]
    """(all rows, dim), mapped from the file."""
    by_id: npt.NDArray[np.int64]
    """(n,) positions in `rows`, ordered by number."""


class LocalStore(VectorStore):
    """Vectors in one memory-mapped matrix.

    Nothing that was written is ever changed: rows and log entries are appended, the row reaching
    the disk before the entry that names it, so a process killed at any instant leaves a valid
    store, at most with a torn tail that the next writer cuts off. When most rows are dead, the live
    ones are copied to new files and a pointer file is switched.

    Example:
        >>> store = LocalStore(Path("vectors"), dim=384, create=True)
    """

    def __init__(
        self,
        folder: Path,
        *,
        dim: int,
        dtype: Literal["float32", "float16"] = "float32",
        create: bool = False,
    ) -> None:
        self.folder, self.dim = folder, dim
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._files: tuple[IO[bytes], IO[bytes]] | None = None
        self._snapshot: _Snapshot | None = None
        if create and not self._pointer.exists():
            folder.mkdir(parents=True, exist_ok=True)
            self._start_epoch(1)
        self._check_pointer()

    def upsert(self, points: Points) -> None:
        self.check_points(points)
        if not len(points.ids):
            return
        rows = points.vectors.astype(self._dtype)
        if not np.isfinite(rows).all():
            raise DataError(f"a vector holds values too large for {self._dtype.name}")
        entries = np.zeros(len(points.ids), _ENTRY)
        entries["id"], entries["file"] = points.ids, points.files
        entries["language"] = _short(points.languages, 16)
        entries["kind"] = _short(points.kinds, 8)
        self._append(np.ascontiguousarray(rows), entries)

    def delete(self, ids: Ids) -> None:
        snapshot = self._read()
        known = np.intersect1d(ids, snapshot.entries["id"])
        if not len(known):
            return
        entries = np.zeros(len(known), _ENTRY)
        entries["id"] = -known
        self._append(None, entries)
        snapshot = self._read()
        dead = len(snapshot.matrix) - len(snapshot.rows)
        if dead > max(_MIN_DEAD_ROWS, len(snapshot.rows)):
            self._compact(snapshot)

    def get(self, ids: Ids) -> tuple[Ids, Vectors]:
        snapshot = self._read()
        known = snapshot.entries["id"][snapshot.by_id]
        places = np.searchsorted(known, ids)
        places[places == len(known)] = 0
        found = known[places] == ids if len(known) else np.zeros(len(ids), bool)
        rows = snapshot.rows[snapshot.by_id[places[found]]]
        return ids[found], np.asarray(snapshot.matrix[rows], np.float32)

    def search(
        self, query: Vectors, *, limit: int, where: Filter | None = None
    ) -> tuple[Ids, Vectors]:
        self.check_query(query, limit)
        snapshot = self._read()
        rows, ids = snapshot.rows, snapshot.entries["id"]
        if where is not None and not where.is_empty:
            allowed = allowed_rows(snapshot.entries, where)
            rows, ids = rows[allowed], ids[allowed]
        if not len(rows):
            return np.empty(0, np.int64), np.empty(0, np.float32)
        scores = inner_products(snapshot.matrix, rows, np.asarray(query, np.float32))
        if limit < len(scores):
            # Ties at the border are all kept, so that their order does not depend on the partition.
            border = np.partition(scores, -limit)[-limit]
            best = np.flatnonzero(scores >= border)
            ids, scores = ids[best], scores[best]
        return ordered(ids, scores, limit)

    def ids(self) -> Ids:
        snapshot = self._read()
        return snapshot.entries["id"][snapshot.by_id]

    def close(self) -> None:
        if self._files:
            for file in self._files:
                file.close()
        self._files = self._snapshot = None

    def drop(self) -> None:
        self.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def disk_bytes(self) -> int:
        return sum(file.stat().st_size for file in self.folder.glob("*") if file.is_file())

    @property
    def _pointer(self) -> Path:
        return self.folder / "current.json"

    def _paths(self, epoch: int) -> tuple[Path, Path]:
        return self.folder / f"matrix-{epoch:06}.bin", self.folder / f"log-{epoch:06}.bin"

    def _check_pointer(self) -> int:
        try:
            pointer = json.loads(self._pointer.read_bytes())
            epoch, dim, dtype = int(pointer["epoch"]), pointer["dim"], pointer["dtype"]
        except FileNotFoundError:
            raise DataError(f"{self.folder}: no vectors here; build the index again") from None
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{self._pointer} is damaged ({error}); build the index again"
            ) from None
        if dim != self.dim or dtype != self._dtype.name:
            raise DataError(
                f"{self.folder} holds {dtype} vectors of {dim} channels, not {self._dtype.name} of "
                f"{self.dim}; build the index again"
            )
        return epoch

    def _start_epoch(self, epoch: int) -> None:
        """Switch to files that are already in place, or to none yet."""
        for path in self._paths(epoch):
            path.touch()
        fsync_folder(self.folder)
        with atomic_write(self._pointer, "w") as file:
            json.dump({"epoch": epoch, "dim": self.dim, "dtype": self._dtype.name}, file)

    def _read(self) -> _Snapshot:
        for attempt in range(3):
            epoch = self._check_pointer()
            matrix_path, log_path = self._paths(epoch)
            try:
                log_bytes = log_path.stat().st_size // _ENTRY.itemsize * _ENTRY.itemsize
                known = self._snapshot
                if known is None or (known.epoch, known.log_bytes) != (epoch, log_bytes):
                    known = self._load(epoch, log_bytes, matrix_path, log_path)
                    self._snapshot = known
                return known
            except FileNotFoundError:
                if attempt == 2:  # a compaction in between explains one or two misses, not three
                    raise DataError(
                        f"{matrix_path} or {log_path} is missing; build the index again"
                    ) from None
        raise AssertionError("unreachable")

    def _load(self, epoch: int, log_bytes: int, matrix_path: Path, log_path: Path) -> _Snapshot:
        log = np.fromfile(log_path, _ENTRY, count=log_bytes // _ENTRY.itemsize)
        adds = log["id"] > 0
        total = int(adds.sum())
        if matrix_path.stat().st_size < total * self.dim * self._dtype.itemsize:
            raise DataError(f"{matrix_path} is shorter than its log says; build the index again")
        shape = (total, self.dim)
        matrix = (
            np.memmap(matrix_path, self._dtype, "r", shape=shape)
            if total
            else np.empty(shape, self._dtype)
        )
        row_of_entry = np.cumsum(adds) - 1
        # The last entry about a number decides.
        numbers, back = np.unique(np.abs(log["id"])[::-1], return_index=True)
        last = len(log) - 1 - back
        alive = (log["id"][last] > 0) & (numbers > 0)
        entries = np.sort(last[alive])
        kept = log[entries]
        return _Snapshot(
            epoch, log_bytes, row_of_entry[entries], kept, matrix, np.argsort(kept["id"])
        )

    def _append(self, rows: npt.NDArray[np.floating] | None, entries: npt.NDArray[np.void]) -> None:
        matrix, log = self._open_for_writing()
        sizes = matrix.seek(0, os.SEEK_END), log.seek(0, os.SEEK_END)
        try:
            if rows is not None:
                _write_through(matrix, rows.tobytes())
            _write_through(log, entries.tobytes())
        except OSError as error:
            for file, size in zip((matrix, log), sizes, strict=True):
                os.ftruncate(file.fileno(), size)
            raise self._write_error(error) from error

    def _open_for_writing(self) -> tuple[IO[bytes], IO[bytes]]:
        if self._files is None:
            epoch = self._check_pointer()
            for stale in self.folder.glob("*-*.bin"):
                if stale not in self._paths(epoch):
                    stale.unlink(missing_ok=True)
            matrix, log = (path.open("r+b", buffering=0) for path in self._paths(epoch))
            # Cut what a killed writer left half written.
            snapshot = self._read()
            os.ftruncate(log.fileno(), snapshot.log_bytes)
            os.ftruncate(matrix.fileno(), len(snapshot.matrix) * self.dim * self._dtype.itemsize)
            self._files = matrix, log
        return self._files

    def _compact(self, snapshot: _Snapshot) -> None:
        epoch = snapshot.epoch + 1
        try:
            for path in self._paths(epoch):
                path.unlink(missing_ok=True)
            matrix_path, log_path = self._paths(epoch)
            with matrix_path.open("wb", buffering=0) as matrix:
                for start in range(0, len(snapshot.rows), _CHUNK_ROWS):
                    rows = snapshot.rows[start : start + _CHUNK_ROWS]
                    _write_all(matrix, snapshot.matrix[rows].tobytes())
                os.fsync(matrix.fileno())
            with log_path.open("wb", buffering=0) as log:
                _write_through(log, snapshot.entries.tobytes())
            self._start_epoch(epoch)
        except OSError as error:
            raise self._write_error(error) from error
        self.close()
        for path in self._paths(snapshot.epoch):  # readers that have it open keep it
            path.unlink(missing_ok=True)

    def _write_error(self, error: OSError) -> PolyzooError:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        free = shutil.disk_usage(self.folder).free
        what = f"the disk is full ({free:,} bytes are free)" if full else error.strerror
        return PolyzooError(
            f"{self.folder} cannot be written: {what}; what was indexed so far is kept: free some "
            "space, then run the same command again"
        )


def _write_all(file: IO[bytes], data: bytes) -> None:
    view = memoryview(data)
    while view:  # a raw file may write less than asked before it reports that the disk is full
        view = view[file.write(view) :]


def _write_through(file: IO[bytes], data: bytes) -> None:
    _write_all(file, data)
    os.fsync(file.fileno())


def _short(values: object, width: int) -> npt.NDArray[np.bytes_]:
    encoded = np.char.encode(np.asarray(values, dtype=np.str_), "utf-8")
    if encoded.size and encoded.dtype.itemsize > width:
        longest = max(encoded.tolist(), key=len)
        raise DataError(f"{longest!r} is longer than the {width} bytes a payload field may have")
    return encoded
