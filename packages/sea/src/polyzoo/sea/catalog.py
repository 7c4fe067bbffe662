"""What an index knows besides vectors: files, units and their words, in SQLite. Torch-free."""

from __future__ import annotations

import json
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from polyzoo.core.errors import DataError, PolyzooError
from polyzoo.core.io import atomic_path
from polyzoo.sea import lexical
from polyzoo.sea.stores.base import Filter

T = TypeVar("T")

_BUSY_SECONDS = 30
_DISK = {
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_READONLY,
}

SCHEMA = f"""
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE files (
    id INTEGER PRIMARY KEY, path TEXT NOT NULL UNIQUE, language TEXT NOT NULL,
    size INTEGER NOT NULL, mtime_ns INTEGER NOT NULL, read_ns INTEGER NOT NULL, hash TEXT NOT NULL,
    skip TEXT, problem TEXT
);
CREATE TABLE units (
    id INTEGER PRIMARY KEY, live INTEGER NOT NULL, file INTEGER NOT NULL, language TEXT NOT NULL,
    kind TEXT NOT NULL, symbol TEXT NOT NULL, first_line INTEGER NOT NULL,
    last_line INTEGER NOT NULL, signature TEXT NOT NULL, docstring TEXT, text TEXT NOT NULL,
    gaps TEXT NOT NULL, hash TEXT NOT NULL, embedded INTEGER NOT NULL DEFAULT 0, blocks TEXT,
    sketch BLOB
);
CREATE INDEX units_by_file ON units (file);
CREATE INDEX units_by_hash ON units (hash);
CREATE INDEX units_waiting ON units (id) WHERE embedded = 0;
CREATE INDEX units_staged ON units (id) WHERE live = 0;
CREATE INDEX units_state ON units (live, embedded);
CREATE TABLE staged_files (
    path TEXT PRIMARY KEY, file INTEGER NOT NULL, language TEXT NOT NULL, size INTEGER NOT NULL,
    mtime_ns INTEGER NOT NULL, read_ns INTEGER NOT NULL, hash TEXT NOT NULL, skip TEXT, problem TEXT
);
CREATE TABLE moved_units (
    id INTEGER PRIMARY KEY, file INTEGER NOT NULL, symbol TEXT NOT NULL,
    first_line INTEGER NOT NULL, last_line INTEGER NOT NULL, signature TEXT NOT NULL,
    docstring TEXT, gaps TEXT NOT NULL
);
CREATE TABLE dead_units (id INTEGER PRIMARY KEY);
CREATE VIRTUAL TABLE lexicon USING fts5 (
    symbol, path, docstring, body, tokenize = "{lexical.TOKENIZER}"
);
"""
"""`live` units are what readers see. Units of changed files wait with live = 0, together with
staged_files and moved_units (unchanged functions whose lines or names moved), until one transaction
makes them live. dead_units are numbers whose vectors are still to be removed from the store.
`embedded` is 0 while a vector is missing, 1 when the store has it, 2 when the model has none."""

CLOCK_STEP_NS = 2_000_000_000
"""The coarsest clock of a file system in use."""

MATCHES_SCORED = 8_000
"""About how many units a search by words scores: all that hold one of its rarest words. Scoring
costs microseconds a unit, so a word that occurs everywhere must not decide which units are looked at."""

FIELD_WEIGHTS = (4.0, 1.5, 2.0, 1.0)
"""BM25 weights of symbol, path, docstring and body."""


@dataclass(frozen=True, slots=True)
class FileRow:
    """A file as it was when it was read."""

    id: int
    path: str
    language: str
    size: int
    mtime_ns: int
    read_ns: int
    """When it was read: a file written at about that moment may have changed unseen since."""
    hash: str
    skip: str | None
    """Why its content is not indexed."""
    problem: str | None
    """What was wrong although it is indexed."""

    def looks_like(self, size: int, mtime_ns: int) -> bool:
        """Whether size and time prove that the file is the one that was read."""
        settled = self.mtime_ns < self.read_ns - CLOCK_STEP_NS
        return settled and (size, mtime_ns) == (self.size, self.mtime_ns)


@dataclass(frozen=True, slots=True)
class UnitRow:
    """A unit as a search shows it."""

    id: int
    file: int
    path: str
    language: str
    kind: str
    symbol: str
    first_line: int
    last_line: int
    signature: str
    docstring: str | None
    text: str
    """What is embedded: the source, without the lines that are units of their own."""
    gaps: tuple[tuple[int, int], ...]
    """(line of `text`, lines left out before it), both counted from 0."""
    hash: str
    embedded: bool
    blocks: tuple[tuple[int, int], ...]
    """First and last line of each block, as lines of `text`; empty before it is embedded."""
    sketch: bytes | None
    """The blocks' vectors in 8 bits, see `sketch`; None where there is only one block."""

    def file_line(self, line: int) -> int:
        """Return the line of the file, counted from 1, that a line of `text` stands on."""
        return self.first_line + line + sum(count for place, count in self.gaps if place <= line)


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
        found = self.rows(
            """SELECT u.id, u.file, f.path, u.language, u.kind, u.symbol, u.first_line, u.last_line,
                      u.signature, u.docstring, u.text, u.gaps, u.hash, u.embedded, u.blocks,
                      u.sketch
               FROM units u JOIN files f ON f.id = u.file
               WHERE u.live = 1 AND u.id IN (SELECT value FROM json_each(?))""",
            (json.dumps([int(number) for number in ids]),),
        )
        return {row[0]: _unit(row) for row in found}

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
    sql, values = "", []
    for column, names in allowed.items():
        if names or (column == "u.file" and names is not None):
            sql += f" AND {column} IN (SELECT value FROM json_each(?))"
            values.append(json.dumps(list(names)))
    return sql, values


def _unit(row: tuple[Any, ...]) -> UnitRow:
    return UnitRow(
        id=row[0],
        file=row[1],
        path=row[2],
        language=row[3],
        kind=row[4],
        symbol=row[5],
        first_line=row[6],
        last_line=row[7],
        signature=row[8],
        docstring=row[9],
        text=row[10],
        gaps=_pairs(row[11]),
        hash=row[12],
        embedded=row[13] == 1,
        blocks=_pairs(row[14] or "[]"),
        sketch=row[15],
    )


def _pairs(text: str) -> tuple[tuple[int, int], ...]:
    return tuple((int(first), int(second)) for first, second in json.loads(text))
