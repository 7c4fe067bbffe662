"""One indexing run: compare, stage, embed, switch. Whatever kills it, the next run continues."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path

import numpy as np

from polyzoo.core.log import get_logger, progress
from polyzoo.sea.search.catalog import Catalog
from polyzoo.sea.search.embedding import PendingEmbedder, embed_waiting, unit_of_block
from polyzoo.sea.search.index import read_settings
from polyzoo.sea.search.layout import file_hash
from polyzoo.sea.search.reading import ReadFile, read_files
from polyzoo.sea.search.schema import FileRow
from polyzoo.sea.search.staging import Changes, Staging
from polyzoo.sea.search.stores import VectorStore, open_store
from polyzoo.sea.search.walk import Skipped, SourceFile, walk

logger = get_logger(__name__)

_FILES_PER_COMMIT = 200


class Indexer:
    """Brings one generation of an index up to date; made by the process that holds the lock.

    Changed files are read into staged units, staged units get vectors, and one transaction makes
    all of it visible: a reader sees the old state or the new. Only while the index has gaps anyway
    (in its first run, or one that continues it) does each batch become visible at once, so that
    words can be searched before the vectors are there. What is staged and every vector survive a
    kill.
    """

    def __init__(
        self,
        folder: Path,
        generation: int,
        catalog: Catalog,
        embedder: PendingEmbedder,
        *,
        jobs: int = 1,
    ) -> None:
        self.folder, self.generation, self.catalog = folder, generation, catalog
        self.settings = read_settings(catalog)
        self.root = Path(self.settings.repo)
        self.skipped = Skipped()
        self.counts: Counter[str] = Counter()
        """Files added, changed, removed, renamed, unchanged; units encoded, copied."""
        self._staging = Staging(catalog)
        self._embedder = embedder
        self._jobs = jobs
        self._changes = Changes()

    def run(self) -> None:
        """Do everything that is to be done."""
        stores = self._open_stores()
        try:
            self._recover(stores)
            todo = self._compare()
            total, embedded = self.catalog.coverage()
            at_once = embedded < total or not self.catalog.get_meta("complete", False)
            self._stage(todo, at_once=at_once)
            if at_once:
                self._apply(complete=True)
            encoded, copied = embed_waiting(self._staging, stores, self._embedder)
            self.counts.update(encoded=encoded, copied=copied)
            if not at_once:
                self._apply(complete=True)
            self._finish(stores)
        finally:
            for store in reversed(stores):
                store.close()

    def _open_stores(self) -> list[VectorStore]:
        # A store that a run has used before must be there: an empty one in its place would quietly
        # lose every vector.
        create = not self.catalog.get_meta("stores_made", False)
        stores: list[VectorStore] = []
        try:
            for blocks in (False, True)[: 2 if self.settings.keep_blocks else 1]:
                place = self.settings.place(self.folder, self.generation, blocks=blocks)
                beside = stores[0] if stores else None
                stores.append(open_store(place, create=create, beside=beside))
        except BaseException:
            for store in reversed(stores):
                store.close()
            raise
        self.catalog.set_meta(stores_made=True)
        return stores

    def _recover(self, stores: Sequence[VectorStore]) -> None:
        """After a run that did not finish, make flags and vectors agree again."""
        interrupted = self.catalog.get_meta("started") is not None
        self.catalog.set_meta(started=_now())
        if not interrupted:
            return
        logger.info("%s: continuing an indexing that was interrupted", self.folder)
        rows = self.catalog.rows("SELECT id FROM units WHERE embedded = 1")
        marked = np.array([row[0] for row in rows], np.int64)
        stored = stores[0].ids()
        stores[0].delete(np.setdiff1d(stored, marked))
        for store in stores[1:]:
            numbers = store.ids()
            store.delete(numbers[~np.isin(unit_of_block(numbers), marked)])
        with self.catalog.transaction():
            for number in np.setdiff1d(marked, stored).tolist():
                self.catalog.execute(
                    "UPDATE units SET embedded = 0, blocks = NULL WHERE id = ?", (number,)
                )

    def _compare(self) -> list[tuple[SourceFile, FileRow | None]]:
        """Walk the repository; return the files to read, and note deleted and renamed ones."""
        known, staged = self.catalog.files(), self._staging.staged()
        fresh: list[SourceFile] = []
        todo: list[tuple[SourceFile, FileRow | None]] = []
        prepared: set[str] = set()
        for file in walk(self.root, self.settings.rules, self.skipped):
            row, waiting = known.pop(file.path, None), staged.get(file.path)
            if waiting and waiting.looks_like(file.size, file.mtime_ns):
                prepared.add(file.path)
                self._count(waiting, is_new=row is None)
            elif row is None:
                fresh.append(file)
            elif row.looks_like(file.size, file.mtime_ns):
                self._count(row)
            else:
                todo.append((file, row))
        with self.catalog.transaction():
            self._staging.unstage(set(staged) - prepared)
        gone: defaultdict[tuple[str, str], list[FileRow]] = defaultdict(list)
        for row in known.values():
            gone[row.language, row.hash].append(row)
        read_ns = time.time_ns()
        for file in fresh:
            # Only where something was deleted can a new file be an old one with a new name.
            same = gone[file.language, file_hash(self.root / file.path)] if known else []
            if same:
                old = same.pop(0)
                new = replace(old, path=file.path, size=file.size, mtime_ns=file.mtime_ns)
                new = replace(new, read_ns=read_ns)
                self._changes.renamed.append((old, new))
                self.counts["renamed"] += 1
                self._note_skip(old)
            else:
                todo.append((file, None))
        self._changes.deleted = [row for rows in gone.values() for row in rows]
        self.counts["removed"] = len(self._changes.deleted)
        return todo

    def _stage(self, todo: Sequence[tuple[SourceFile, FileRow | None]], *, at_once: bool) -> None:
        if at_once:
            self._apply(complete=False)  # deletions, renames, and what a killed run had prepared
        tasks = [(source, row.hash if row else None) for source, row in todo]
        results = zip(todo, read_files(self.root, tasks, jobs=self._jobs), strict=True)
        with progress(total=len(todo), description="Reading", unit="file") as bar:
            while chunk := list(islice(results, _FILES_PER_COMMIT)):
                with self.catalog.transaction():
                    for (source, row), read in chunk:
                        self._stage_file(source, read, row)
                if at_once:
                    self._apply(complete=False)
                bar.update(len(chunk))

    def _stage_file(self, source: SourceFile, read: ReadFile | None, row: FileRow | None) -> None:
        if read is None:
            # The walk saw it, so it went away just now; a row of it stays until the next run.
            self.skipped.add("vanished while indexing", source.path)
            return
        new = FileRow(
            id=row.id if row else 0,
            path=source.path,
            language=source.language,
            size=read.size,
            mtime_ns=source.mtime_ns,
            read_ns=read.read_ns,
            hash=read.hash,
            skip=read.skip,
            problem=read.problem,
        )
        if row is not None and read.hash == row.hash and row.read_ns:
            self._changes.touched.append(new)
            self._count(row)
            return
        self._staging.stage(new, read.units)
        self._count(new, is_new=row is None)

    def _apply(self, *, complete: bool) -> None:
        # A wrong model is refused before anything becomes visible under the right one's name.
        self._embedder.check(self.settings, self.folder)
        with self.catalog.transaction():
            self._staging.apply(self._changes)
            if complete:
                self.catalog.set_meta(complete=True)
        self._changes = Changes()

    def _finish(self, stores: Sequence[VectorStore]) -> None:
        dead = np.array(self._staging.dead(), np.int64)
        if len(dead):
            stores[0].delete(dead)
            for store in stores[1:]:
                numbers = store.ids()
                store.delete(numbers[np.isin(unit_of_block(numbers), dead)])
        for store in stores:
            store.publish()
        with self.catalog.transaction():
            self._staging.bury()
            self.catalog.set_meta(
                started=None,
                last_indexed=_now(),
                skipped=dict(self.skipped.counts),
                skipped_examples=self.skipped.examples,
            )

    def _count(self, row: FileRow, *, is_new: bool | None = None) -> None:
        self.counts["unchanged" if is_new is None else "added" if is_new else "changed"] += 1
        self._note_skip(row)

    def _note_skip(self, row: FileRow) -> None:
        if row.skip:
            self.skipped.add(row.skip, row.path)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
