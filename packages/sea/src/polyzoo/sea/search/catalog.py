"""What an index knows besides vectors: files, units and their words, in SQLite. Torch-free."""

from __future__ import annotations

import json
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from polyzoo.core.errors import DataError, PolyzooError
from polyzoo.core.io import atomic_path
from polyzoo.sea.search import lexical
from polyzoo.sea.search.schema import SCHEMA, FileRow, UnitRow, unit_row
from polyzoo.sea.search.stores.base import Filter

T = TypeVar("T")

_BUSY_SECONDS = 30
_DISK = {
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_READONLY,
}

MATCHES_SCORED = 8_000
"""About how many units a search by words scores: all that hold one of its rarest words. Scoring
costs microseconds a unit, so a word that occurs everywhere must not decide what is looked at."""

FIELD_WEIGHTS = (4.0, 1.5, 2.0, 1.0)
"""BM25 weights of symbol, path, docstring and body."""


class Catalog:
    """Read access to one index; each call sees what was committed before it.

    Example:
        >>> Catalog(Path("catalog-1.sqlite")).counts()
    """

    def __init__(self, path: Path, *, write: bool = False, create: bool = False) -> None:
        self.path = path
        self._cache: dict[str, Any] = {}
        self._cache_version = -1
        with self.explained():
            self._db = _connect(path, write=write, create=create)
            if create:  # without a log beside it, as the file is about to be renamed
                self._db.executescript(f"BEGIN; {SCHEMA} COMMIT;")
            self._db.execute("SELECT value FROM meta LIMIT 1")

    @classmethod
    def create(cls, path: Path, **meta: Any) -> Catalog:
        """Make a catalog that holds nothing but these values; it appears whole or not at all."""
        for suffix in ("-wal", "-shm", ""):
            Path(f"{path}{suffix}").unlink(missing_ok=True)
        with atomic_path(path) as temporary:
            catalog = cls(temporary, create=True)
            catalog.set_meta(**meta)
            catalog.close()
        return cls(path, write=True)

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def execute(self, sql: str, values: Sequence[Any] | dict[str, Any] = ()) -> sqlite3.Cursor:
        """Run one statement, with errors a person can act on."""
        with self.explained():
            return self._db.execute(sql, values)

    def rows(self, sql: str, values: Sequence[Any] | dict[str, Any] = ()) -> list[tuple[Any, ...]]:
        """Run one query and fetch everything."""
        with self.explained():
            return self._db.execute(sql, values).fetchall()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Commit everything inside, or nothing."""
        with self.explained():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    @contextmanager
    def snapshot(self) -> Iterator[None]:
        """Read one state inside, whatever is committed meanwhile."""
        with self.explained():
            self._db.execute("BEGIN")
            try:
                yield
            finally:
                self._db.execute("ROLLBACK")

    def get_meta(self, key: str, default: Any = None) -> Any:
        """Return a stored value."""
        found = self.rows("SELECT value FROM meta WHERE key = ?", (key,))
        return json.loads(found[0][0]) if found else default

    def set_meta(self, **values: Any) -> None:
        """Store values under their names; inside a transaction, with it."""
        for key, value in values.items():
            self.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, json.dumps(value)))

    def files(self) -> dict[str, FileRow]:
        """Return every indexed file by path."""
        found = self.rows(
            "SELECT id, path, language, size, mtime_ns, read_ns, hash, skip, problem FROM files"
        )
        return {row[1]: FileRow(*row) for row in found}

    def units(self, ids: Sequence[int]) -> dict[int, UnitRow]:
        """Return those of the numbers that are live, by number."""
        # The plus keeps SQLite from walking all live units instead of looking the numbers up.
        found = self.rows(
            """SELECT u.id, u.file, f.path, u.language, u.kind, u.symbol, u.first_line, u.last_line,
                      u.signature, u.docstring, u.text, u.gaps, u.hash, u.embedded, u.blocks,
                      u.sketch
               FROM units u JOIN files f ON f.id = u.file
               WHERE +u.live = 1 AND u.id IN (SELECT value FROM json_each(?))""",
            (json.dumps([int(number) for number in ids]),),
        )
        return {row[0]: unit_row(row) for row in found}

    def embedded(self, ids: Sequence[int]) -> set[int]:
        """Return those of the numbers that are live and have a vector."""
        found = self.rows(
            "SELECT id FROM units WHERE live = 1 AND embedded = 1 "
            "AND id IN (SELECT value FROM json_each(?))",
            (json.dumps([int(number) for number in ids]),),
        )
        return {row[0] for row in found}

    def match(
        self, terms: Sequence[str], *, limit: int, where: Filter | None = None
    ) -> list[tuple[int, float]]:
        """Return numbers and BM25 scores of the best live units, best first, ties by number.

        Units that hold any of the words, as far as that is not more than `MATCHES_SCORED`; beyond,
        those that hold one of the rarest words, which then count twice. All words are scored.
        """
        if not terms:
            return []
        expression = lexical.any_of(terms)
        rare = self._rarest(terms)
        if len(rare) < len(terms):
            expression = f"({lexical.any_of(rare)}) AND ({expression})"
        weights = ", ".join(map(str, FIELD_WEIGHTS))
        conditions, values = _conditions(where)
        # The score is lower for better matches in FTS5; turned round here.
        sql = f"""SELECT l.rowid, -bm25(lexicon, {weights}) AS score
                  FROM lexicon l {"JOIN units u ON u.id = l.rowid" if conditions else ""}
                  WHERE lexicon MATCH ? {conditions}
                  ORDER BY score DESC, l.rowid LIMIT ?"""  # noqa: S608 - only literals are put in
        return [(row[0], row[1]) for row in self.rows(sql, (expression, *values, limit))]

    def _rarest(self, terms: Sequence[str]) -> list[str]:
        counts = self.cached("terms", dict)
        for term in terms:
            if term not in counts:
                sql = "SELECT count(*) FROM lexicon WHERE lexicon MATCH ?"
                counts[term] = self.rows(sql, (lexical.any_of([term]),))[0][0]
        order = sorted((counts[term], place) for place, term in enumerate(terms))
        kept, total = [], 0
        for count, place in order:
            total += count
            if total > MATCHES_SCORED and any(counts[term] for term in kept):
                break
            kept.append(terms[place])
        return kept

    def cached(self, name: str, make: Callable[[], T]) -> T:
        """Return a value made once and kept until another process changes the catalog."""
        version = self.rows("PRAGMA data_version")[0][0]
        if self._cache_version != version:
            self._cache.clear()
            self._cache_version = version
        if name not in self._cache:
            self._cache[name] = make()
        return self._cache[name]

    def coverage(self) -> tuple[int, int]:
        """Return how many live units can have a vector, and how many have one."""
        total, embedded = self.rows(
            "SELECT count(*), coalesce(sum(embedded), 0) FROM units WHERE live = 1 AND embedded < 2"
        )[0]
        return int(total), int(embedded)

    def counts(self) -> dict[str, dict[str, int]]:
        """Return the number of live units by language and kind, and of files by language."""
        units = self.rows(
            "SELECT language, kind, count(*) FROM units WHERE live = 1 GROUP BY language, kind"
        )
        found: dict[str, Counter[str]] = {}
        for language, kind, count in units:
            found.setdefault(language, Counter())[kind] = count
        for language, count in self.rows(
            "SELECT language, count(*) FROM files WHERE skip IS NULL GROUP BY language"
        ):
            found.setdefault(language, Counter())["files"] = count
        return {language: dict(counts) for language, counts in sorted(found.items())}

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Turn what SQLite refuses into errors that name the file and the way out."""
        try:
            yield
        except sqlite3.OperationalError as error:
            code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # the rest says which kind of I/O
            if code in _DISK:
                raise PolyzooError(
                    f"{self.path} cannot be written or read ({error}); what was indexed so far is "
                    "kept: check the free space and permissions, then run the same command again"
                ) from error
            if code == sqlite3.SQLITE_BUSY:
                raise PolyzooError(f"{self.path} stayed busy for {_BUSY_SECONDS} s") from error
            raise self._damaged(error) from error
        except sqlite3.DatabaseError as error:
            raise self._damaged(error) from error

    def _damaged(self, error: sqlite3.Error) -> DataError:
        return DataError(f"{self.path} is damaged ({error}); build the index again with --rebuild")


def _connect(path: Path, *, write: bool, create: bool) -> sqlite3.Connection:
    uri = path.absolute().as_uri()
    mode = "rwc" if create else "rw" if write else "ro"
    # One thread at a time uses a connection, not always the one that opened it.
    options: dict[str, Any] = {
        "uri": True, "timeout": _BUSY_SECONDS, "isolation_level": None, "check_same_thread": False
    }  # fmt: skip
    database = sqlite3.connect(f"{uri}?mode={mode}", **options)
    try:
        database.execute("SELECT 1 FROM sqlite_master")
    except sqlite3.OperationalError:
        database.close()
        # A folder that may not be written cannot hold the shared memory that readers of a
        # write-ahead log need; without such a log nobody is writing and none is needed.
        if write or not path.exists() or Path(f"{path}-wal").exists():
            raise
        return sqlite3.connect(f"{uri}?mode=ro&immutable=1", **options)
    if write:
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = FULL")
    return database


def _conditions(where: Filter | None) -> tuple[str, list[Any]]:
    if where is None:
        return "", []
    allowed = {"u.language": where.languages, "u.kind": where.kinds, "u.file": where.files}
    sql = ""
    values: list[Any] = []
    for column, names in allowed.items():
        if names or (column == "u.file" and names is not None):
            sql += f" AND {column} IN (SELECT value FROM json_each(?))"  # noqa: S608 - as named above
            values.append(json.dumps(list(names)))
    return sql, values
