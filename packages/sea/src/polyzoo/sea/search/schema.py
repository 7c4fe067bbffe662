"""The tables of a catalog, and their rows as readers get them. Torch-free."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from polyzoo.sea.search import lexical

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


def unit_row(row: tuple[Any, ...]) -> UnitRow:
    """Return a unit from the columns in the order of `UnitRow`."""
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
