"""A small repository that tests edit, index and search."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np

from polyzoo.sea.search.config import IndexConfig, SearchRequest
from polyzoo.sea.search.index import CodeIndex
from polyzoo.sea.search.index_report import IndexReport
from polyzoo.sea.search.results import Hit, SearchResult
from polyzoo.sea.search.searcher import Searcher
from polyzoo.sea.search.update import build_index
from support.identifier_encoder import IdentifierEncoder


class IndexedRepo:
    """A repository, the folder of its index, and the encoder both are used with."""

    def __init__(self, folder: Path, *, encoder: IdentifierEncoder | None = None) -> None:
        self.root = folder / "repo"
        self.out = folder / "index"
        self.root.mkdir(parents=True, exist_ok=True)
        self.encoder = encoder or IdentifierEncoder()

    def write(self, path: str, text: str | bytes) -> Path:
        """Write a file, dated back: a fresh file is always read again, which hides bugs."""
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(text if isinstance(text, bytes) else text.encode())
        self.age(path)
        return target

    def age(self, path: str, seconds: float | None = None) -> None:
        """Date a file back, each time to another moment."""
        self._ages = getattr(self, "_ages", 1000) - 1
        moment = time.time() - (self._ages if seconds is None else seconds)
        os.utime(self.root / path, (moment, moment))

    def config(self, **settings: object) -> IndexConfig:
        return IndexConfig(
            **{"repo": self.root, "out": self.out, "model": "identifiers", **settings}
        )

    def index(self, **settings: object) -> IndexReport:
        return build_index(self.config(**settings), embedder=self.encoder)

    def ask(self, query: str, **settings: object) -> SearchResult:
        with Searcher(self.out, embedder=self.encoder) as searcher:
            request = SearchRequest(query=query, **settings)
            return searcher.search(request, freshness=searcher.freshness())

    def find(self, query: str, **settings: object) -> list[str]:
        """The symbols found, best first."""
        return [hit.symbol for hit in self.ask(query, **settings).hits]

    def hit(self, query: str, symbol: str, **settings: object) -> Hit:
        """The hit with this symbol."""
        return next(hit for hit in self.ask(query, **settings).hits if hit.symbol == symbol)


SHAPES = '''"""Areas of plane figures."""

import math


class Circle:
    """A round figure."""

    def __init__(self, radius):
        self.radius = radius

    def area(self):
        """Surface inside the circle."""
        return math.pi * self.radius ** 2


def triangle_area(base, height):
    """Half of base times height."""
    return base * height / 2
'''

NETWORK = '''import socket


def open_connection(host, port, timeout=10):
    """Connect to a server over TCP."""
    connection = socket.create_connection((host, port), timeout)
    return connection


def read_all_bytes(connection):
    """Receive until the peer closes."""
    chunks = []
    while chunk := connection.recv(65536):
        chunks.append(chunk)
    return b"".join(chunks)
'''

QUEUE_JS = """
class Queue {
  // Add an item at the end.
  push(item) { this.items.push(item); return this.items.length; }
}

export function debounceCallback(callback, delay) {
  let timer = null;
  return (...args) => { clearTimeout(timer); timer = setTimeout(() => callback(...args), delay); };
}
"""


def small_repo(folder: Path, **settings: object) -> IndexedRepo:
    """A repository with three files in two languages, not indexed yet."""
    repo = IndexedRepo(folder, **settings)
    repo.write("shapes.py", SHAPES)
    repo.write("net/network.py", NETWORK)
    repo.write("web/queue.js", QUEUE_JS)
    return repo


def contents(repo: IndexedRepo):
    """Everything a reader can see: units with their places, words and vectors."""
    index = CodeIndex.open(repo.out)
    try:
        ids = [row[0] for row in index.catalog.rows("SELECT id FROM units WHERE live = 1")]
        units = index.catalog.units(ids)
        found, vectors = index.store().get(np.array(sorted(ids), np.int64))
        by_id = dict(zip(found.tolist(), vectors, strict=True))
        words = {
            row[0]: row[1:]
            for row in index.catalog.rows(
                "SELECT rowid, symbol, path, docstring, body FROM lexicon ORDER BY rowid"
            )
        }
        assert sorted(words) == sorted(ids)
        assert sorted(by_id) == sorted(number for number in ids if units[number].embedded)
        return sorted(
            (
                (
                    unit.path, unit.symbol, unit.kind, unit.first_line, unit.last_line, unit.text,
                    unit.docstring or "", unit.gaps, unit.blocks, words[number],
                    tuple(by_id[number].tolist()) if number in by_id else None,
                )
                for number, unit in units.items()
            ),
        )  # fmt: skip
    finally:
        index.close()


def assert_as_made_anew(repo: IndexedRepo, tmp_path: Path) -> None:
    """Oracle: an index of the same files that was never updated."""
    folder = tmp_path / f"fresh-{os.urandom(4).hex()}"
    fresh = IndexedRepo(folder, encoder=repo.encoder)
    fresh.root.rmdir()
    fresh.root.symlink_to(repo.root)
    fresh.index()
    assert contents(repo) == contents(fresh)
