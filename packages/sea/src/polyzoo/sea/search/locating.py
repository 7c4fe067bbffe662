"""Where an indexed unit is now, when its file has changed since. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from polyzoo.sea.search.catalog import Catalog
from polyzoo.sea.search.layout import content_hash
from polyzoo.sea.search.reading import read_file
from polyzoo.sea.search.results import Drift
from polyzoo.sea.search.schema import FileRow, UnitRow
from polyzoo.sea.search.staging import compact, unit_hash
from polyzoo.sea.search.units import Unit
from polyzoo.sea.search.walk import SourceFile


@dataclass(frozen=True, slots=True)
class Location:
    """A unit as it is in the file of this moment."""

    unit: UnitRow
    """With the lines, and where they changed the text, of now."""
    drift: Drift | None


class Locator:
    """Compares hits with their files; reads only those whose size or time has changed."""

    def __init__(self, root: Path, catalog: Catalog) -> None:
        self.root, self.catalog = root, catalog
        self._now: dict[int, list[Unit] | None] = {}

    def locate(self, unit: UnitRow) -> Location:
        """Find a unit in its file."""
        if unit.file not in self._now:
            self._now[unit.file] = self._changed_units(unit)
        units = self._now[unit.file]
        if units is None:
            return Location(unit, None)
        for other in units:
            text, gaps = compact(other)
            if unit_hash(unit.language, other.kind, text) == unit.hash and (
                other.symbol == unit.symbol
            ):
                same_lines = (other.first_line, tuple(gaps)) == (unit.first_line, unit.gaps)
                return Location(_at(unit, other), None if same_lines else "moved")
        for other in units:
            if (other.symbol, other.kind) == (unit.symbol, unit.kind):
                text, gaps = compact(other)
                # Its blocks were cut in the old text.
                new = replace(_at(unit, other), text=text, blocks=(), sketch=None, embedded=False)
                return Location(new, "changed")
        return Location(unit, "gone")

    def _changed_units(self, unit: UnitRow) -> list[Unit] | None:
        """The units of the file as it is now; None when it is as it was."""
        row = self._row(unit.file)
        path = self.root / unit.path
        if row is None:
            return None
        try:
            status = path.lstat()
            if row.looks_like(status.st_size, status.st_mtime_ns):
                return None
            if content_hash(path.read_bytes()) == row.hash:
                return None
        except OSError:
            return []
        source = SourceFile(unit.path, unit.language, status.st_size, status.st_mtime_ns)
        read = read_file(self.root, source)
        return list(read.units) if read else []

    def _row(self, file: int) -> FileRow | None:
        found = self.catalog.rows(
            "SELECT id, path, language, size, mtime_ns, read_ns, hash, skip, problem FROM files "
            "WHERE id = ?",
            (file,),
        )
        return FileRow(*found[0]) if found else None


def _at(unit: UnitRow, other: Unit) -> UnitRow:
    _, gaps = compact(other)
    return replace(
        unit,
        first_line=other.first_line,
        last_line=other.last_line,
        signature=other.signature,
        docstring=other.docstring,
        gaps=tuple(gaps),
    )
