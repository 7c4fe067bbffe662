"""Changes of an index: prepared out of sight, made visible in one transaction. Torch-free."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath

from polyzoo.sea.search.catalog import Catalog
from polyzoo.sea.search.lexical import words
from polyzoo.sea.search.schema import FileRow
from polyzoo.sea.search.units import Unit

_FILE_COLUMNS = "path, file, language, size, mtime_ns, read_ns, hash, skip, problem"


@dataclass(frozen=True, slots=True)
class WaitingUnit:
    """A unit without a vector."""

    id: int
    file: int
    language: str
    kind: str
    symbol: str
    text: str
    hash: str


@dataclass(frozen=True, slots=True)
class BlockInfo:
    """The blocks of a unit."""

    lines: list[list[int]]
    """First and last line of each, as lines of the unit's text."""
    sketch: bytes | None
    """Their vectors in 8 bits; None where there is only one."""


@dataclass(slots=True)
class Changes:
    """What a walk found, apart from the files whose content has to be read into units."""

    deleted: list[FileRow] = field(default_factory=list)
    renamed: list[tuple[FileRow, FileRow]] = field(default_factory=list)
    """The file as it was, and as it is: same content, other path."""
    touched: list[FileRow] = field(default_factory=list)
    """Same path and content, other time."""


class Staging:
    """The writing half of a catalog; only the process that holds the index's lock makes one."""

    def __init__(self, catalog: Catalog) -> None:
        self.catalog = catalog

    def take_numbers(self, count: int) -> range:
        """Return numbers for files or units that were never used and never will be again."""
        first = int(self.catalog.get_meta("next_number", 1))
        self.catalog.set_meta(next_number=first + count)
        return range(first, first + count)

    def staged(self) -> dict[str, FileRow]:
        """Return the files that wait to become visible, by path."""
        found = self.catalog.rows(f"SELECT {_FILE_COLUMNS} FROM staged_files")  # noqa: S608 - a literal
        return {row[0]: FileRow(row[1], row[0], *row[2:]) for row in found}

    def unstage(self, paths: Iterable[str]) -> None:
        """Drop prepared changes that no longer match the files."""
        for path in paths:
            found = self.catalog.rows("SELECT file FROM staged_files WHERE path = ?", (path,))
            for (file,) in found:
                self._kill("live = 0 AND file = ?", (file,))
                self.catalog.execute("DELETE FROM moved_units WHERE file = ?", (file,))
            self.catalog.execute("DELETE FROM staged_files WHERE path = ?", (path,))

    def stage(self, file: FileRow, units: Sequence[Unit]) -> int:
        """Prepare a new or changed file, `file.id` being 0 for a new one; return the new units.

        A unit whose text the visible version of the file also has keeps its number, and with it its
        vector.
        """
        known: defaultdict[str, deque[int]] = defaultdict(deque)
        if file.id:
            for number, content in self.catalog.rows(
                "SELECT id, hash FROM units WHERE file = ? AND live = 1 ORDER BY id", (file.id,)
            ):
                known[content].append(number)
        number, *spare = self.take_numbers(len(units) + 1)
        file_number = file.id or number
        moved, fresh = [], []
        for unit in units:
            text, gaps = compact(unit)
            content = unit_hash(file.language, unit.kind, text)
            place = (unit.symbol, unit.first_line, unit.last_line, unit.signature, unit.docstring)
            if known[content]:
                moved.append((known[content].popleft(), file_number, *place, json.dumps(gaps)))
            else:
                row = (
                    file_number,
                    file.language,
                    unit.kind,
                    *place,
                    text,
                    json.dumps(gaps),
                    content,
                )
                fresh.append((spare[len(fresh)], *row))
        for values in moved:
            self.catalog.execute("INSERT INTO moved_units VALUES (?, ?, ?, ?, ?, ?, ?, ?)", values)
        for values in fresh:
            self.catalog.execute(
                """INSERT INTO units (id, live, file, language, kind, symbol, first_line, last_line,
                                      signature, docstring, text, gaps, hash)
                   VALUES (?, 0, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)""",
                values,
            )
        self.catalog.execute(
            f"INSERT INTO staged_files ({_FILE_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",  # noqa: S608
            (file.path, file_number, *_stat(file), file.skip, file.problem),
        )
        return len(fresh)

    def apply(self, changes: Changes) -> None:
        """Make everything that is prepared visible; call inside a transaction."""
        for file in changes.deleted:
            self._kill("file = ?", (file.id,))
            self.catalog.execute("DELETE FROM files WHERE id = ?", (file.id,))
        for old, new in changes.renamed:
            self._rename(old, new)
        for file in changes.touched:
            self.catalog.execute(
                "UPDATE files SET size = ?, mtime_ns = ?, read_ns = ? WHERE id = ?",
                (file.size, file.mtime_ns, file.read_ns, file.id),
            )
        for file in self.staged().values():
            self._apply_file(file)
        self.catalog.execute("DELETE FROM staged_files")
        self.catalog.execute("DELETE FROM moved_units")
        self.catalog.set_meta(revision=int(self.catalog.get_meta("revision", 0)) + 1)

    def waiting(self, limit: int) -> list[WaitingUnit]:
        """Return the next units without a vector, visible or prepared."""
        found = self.catalog.rows(
            "SELECT id, file, language, kind, symbol, text, hash FROM units "
            "WHERE embedded = 0 ORDER BY id LIMIT ?",
            (limit,),
        )
        return [WaitingUnit(*row) for row in found]

    def count_waiting(self) -> int:
        """Return how many units have no vector."""
        return int(self.catalog.rows("SELECT count(*) FROM units WHERE embedded = 0")[0][0])

    def twins(self, hashes: Iterable[str]) -> dict[str, tuple[int, BlockInfo]]:
        """Return, by content, a unit that has a vector already, and what is known of its blocks."""
        found = self.catalog.rows(
            "SELECT hash, id, blocks, sketch FROM units WHERE embedded = 1 "
            "AND hash IN (SELECT value FROM json_each(?))",
            (json.dumps(list(hashes)),),
        )
        return {
            content: (number, BlockInfo(json.loads(lines), sketch))
            for content, number, lines, sketch in found
        }

    def mark_embedded(self, blocks: Mapping[int, BlockInfo | None]) -> None:
        """Say that units have vectors, and where their blocks are.

        None in place of the blocks says that the model has no vector for the unit.
        """
        with self.catalog.transaction():
            for number, info in blocks.items():
                state = (
                    (2, None, None) if info is None else (1, json.dumps(info.lines), info.sketch)
                )
                self.catalog.execute(
                    "UPDATE units SET embedded = ?, blocks = ?, sketch = ? WHERE id = ?",
                    (*state, number),
                )

    def dead(self) -> list[int]:
        """Return the numbers whose vectors are to be removed."""
        return [row[0] for row in self.catalog.rows("SELECT id FROM dead_units")]

    def bury(self) -> None:
        """Forget the dead once the store has forgotten them."""
        self.catalog.execute("DELETE FROM dead_units")

    def _apply_file(self, file: FileRow) -> None:
        self.catalog.execute(
            """INSERT INTO files (id, path, language, size, mtime_ns, read_ns, hash, skip, problem)
               VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)
               ON CONFLICT (id) DO UPDATE SET size = excluded.size, mtime_ns = excluded.mtime_ns,
                   read_ns = excluded.read_ns, hash = excluded.hash, skip = excluded.skip,
                   problem = excluded.problem""",
            (file.id, file.path, *_stat(file), file.skip, file.problem),
        )
        moved = "SELECT id FROM moved_units"
        self._kill(f"live = 1 AND file = ? AND id NOT IN ({moved})", (file.id,))
        before = self.catalog.rows(
            "SELECT id, symbol, docstring FROM units WHERE live = 1 AND file = ?", (file.id,)
        )
        self.catalog.execute(
            """UPDATE units SET symbol = m.symbol, first_line = m.first_line,
                   last_line = m.last_line, signature = m.signature, docstring = m.docstring,
                   gaps = m.gaps
               FROM moved_units m WHERE units.id = m.id AND m.file = ?""",
            (file.id,),
        )
        after = self.catalog.rows(
            "SELECT id, symbol, docstring FROM units WHERE live = 1 AND file = ?", (file.id,)
        )
        self._relearn([row[0] for row in set(after) - set(before)])
        fresh = self.catalog.rows("SELECT id FROM units WHERE live = 0 AND file = ?", (file.id,))
        self.catalog.execute("UPDATE units SET live = 1 WHERE live = 0 AND file = ?", (file.id,))
        self._learn([row[0] for row in fresh])

    def _rename(self, old: FileRow, new: FileRow) -> None:
        self.catalog.execute(
            "UPDATE files SET path = ?, size = ?, mtime_ns = ?, read_ns = ? WHERE id = ?",
            (new.path, new.size, new.mtime_ns, new.read_ns, old.id),
        )
        self.catalog.execute(
            "UPDATE units SET symbol = ? WHERE file = ? AND kind = 'module'",
            (PurePath(new.path).stem, old.id),
        )
        found = self.catalog.rows("SELECT id FROM units WHERE file = ? AND live = 1", (old.id,))
        self._relearn([row[0] for row in found])

    def _kill(self, condition: str, values: Sequence[object]) -> None:
        """Remove units; the vectors of those that had one are removed later."""
        self.catalog.execute(
            f"INSERT OR IGNORE INTO dead_units SELECT id FROM units WHERE {condition}",  # noqa: S608
            values,
        )
        self.catalog.execute(
            f"DELETE FROM lexicon WHERE rowid IN (SELECT id FROM units WHERE {condition})",  # noqa: S608
            values,
        )
        self.catalog.execute(f"DELETE FROM units WHERE {condition}", values)  # noqa: S608

    def _relearn(self, ids: Sequence[int]) -> None:
        for number in ids:
            self.catalog.execute("DELETE FROM lexicon WHERE rowid = ?", (number,))
        self._learn(ids)

    def _learn(self, ids: Sequence[int]) -> None:
        for number in ids:
            symbol, path, docstring, text = self.catalog.rows(
                "SELECT u.symbol, f.path, u.docstring, u.text FROM units u "
                "JOIN files f ON f.id = u.file WHERE u.id = ?",
                (number,),
            )[0]
            self.catalog.execute(
                "INSERT INTO lexicon (rowid, symbol, path, docstring, body) VALUES (?, ?, ?, ?, ?)",
                (number, words(symbol), words(path), words(docstring or ""), words(text)),
            )


def _stat(file: FileRow) -> tuple[str, int, int, int, str]:
    return file.language, file.size, file.mtime_ns, file.read_ns, file.hash


def unit_hash(language: str, kind: str, text: str) -> str:
    """Return what units with the same vector have in common."""
    data = f"{language}\0{kind}\0{text}".encode()
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def compact(unit: Unit) -> tuple[str, list[tuple[int, int]]]:
    """Close the holes that a class's or module's own units leave in its text.

    So that editing a method, which changes the length of its hole, does not change its class.
    Returns the text and, as (line of the text, lines left out before it), what it takes to undo it.
    """
    if unit.kind not in ("class", "module"):
        return unit.text, []
    kept: list[str] = []
    gaps: list[tuple[int, int]] = []
    dropped = 0
    for line in unit.text.split("\n"):
        bare = line.rstrip()
        if not bare and kept and not kept[-1]:
            dropped += 1
            continue
        if dropped:
            gaps.append((len(kept), dropped))
            dropped = 0
        kept.append(bare)
    return "\n".join(kept), gaps
