"""An index on disk: where it is, how it was made, how complete and how fresh it is. Torch-free."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from polyzoo.core.assets.cache import cache_home
from polyzoo.core.config import dump, load
from polyzoo.core.errors import ConfigError, DataError
from polyzoo.core.io import atomic_write
from polyzoo.sea import lexical
from polyzoo.sea.catalog import Catalog
from polyzoo.sea.config import SeaConfig
from polyzoo.sea.embedder import Embedder
from polyzoo.sea.stores import StoreKind, StorePlace, VectorStore, open_store
from polyzoo.sea.walk import Skipped, WalkRules, walk

FORMAT = 1
POINTER = "index.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexSettings:
    """How an index was made; stored in it, and compared before anything is added or asked."""

    repo: str
    model: str
    """Name or path the model was loaded by."""
    model_id: str
    """What the model is: configuration and weights."""
    sea: SeaConfig
    """Splitter, pooling and aggregation at that time."""
    dim: int
    dtype: Literal["float32", "float16"] = "float32"
    store: StoreKind = "local"
    store_location: str = ""
    """Address or folder of the engine; inside the index when empty, so that the folder may move."""
    store_name: str
    keep_blocks: bool = False
    rules: WalkRules = field(default_factory=WalkRules)
    lexical_version: int = lexical.VERSION

    def place(self, folder: Path, generation: int, *, blocks: bool = False) -> StorePlace:
        """Say where the vectors of units, or of blocks, are, for the index in `folder`."""
        inside = folder if self.store == "local" else folder / self.store
        return StorePlace(
            kind=self.store,
            location=self.store_location or str(inside),
            name=f"{self.store_name}-blocks" if blocks else self.store_name,
            generation=generation,
            dim=self.dim,
            dtype=self.dtype,
            model_id=self.model_id,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Freshness:
    """Files that differ from what is indexed."""

    changed: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()

    @property
    def count(self) -> int:
        """How many files differ."""
        return len(self.changed) + len(self.added) + len(self.removed)


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexState:
    """What a reader must know before it trusts an answer."""

    units: int
    embedded: int
    complete: bool
    """Whether the first indexing got through all files."""
    interrupted: bool
    """Whether the last indexing ended before its time."""
    writer: int | None
    """Process that is indexing now."""
    rebuilding: bool
    """Whether a new generation has been begun beside this one."""
    last_indexed: str | None

    @property
    def coverage(self) -> float:
        """Share of units that have a vector."""
        return self.embedded / self.units if self.units else 1.0


class CodeIndex:
    """Read access to the current generation of an index.

    Example:
        >>> index = CodeIndex.open(default_folder(Path(".")))
        >>> index.state().coverage
        1.0
    """

    def __init__(self, folder: Path, generation: int, catalog: Catalog) -> None:
        self.folder, self.generation, self.catalog = folder, generation, catalog
        self.settings = read_settings(catalog)
        self._stores: dict[bool, VectorStore] = {}

    @classmethod
    def open(cls, folder: Path) -> CodeIndex:
        """Open the index in a folder.

        Raises:
            DataError: there is none, or it is damaged, or of another format; says what to run.
        """
        generation = current_generation(folder)
        if generation is None:
            raise DataError(
                f"{folder} holds no index; make one with: polyzoo sea index REPO --out {folder}"
            )
        path = catalog_path(folder, generation)
        if not path.exists():
            raise DataError(f"{path} is missing; build the index again with --rebuild")
        return cls(folder, generation, Catalog(path))

    def is_current(self) -> bool:
        """Whether no newer generation has replaced this one."""
        return current_generation(self.folder) == self.generation

    def store(self, *, blocks: bool = False) -> VectorStore:
        """Return the vectors of units, or of blocks, opened on first use."""
        if blocks not in self._stores:
            place = self.settings.place(self.folder, self.generation, blocks=blocks)
            # Units first, as the connection that blocks share is theirs.
            beside = self.store() if blocks else None
            self._stores[blocks] = open_store(place, beside=beside)
        return self._stores[blocks]

    def check_model(self, embedder: Embedder) -> None:
        """Refuse a model other than the one the index was made with.

        Raises:
            ConfigError: names both and the command that rebuilds.
        """
        check_model(self.settings, embedder, folder=self.folder)

    def state(self) -> IndexState:
        """Say how complete the index is."""
        units, embedded = self.catalog.cached("coverage", self.catalog.coverage)
        writer = lock_holder(self.folder)
        return IndexState(
            units=units,
            embedded=embedded,
            complete=bool(self.catalog.get_meta("complete", False)),
            interrupted=writer is None and self.catalog.get_meta("started") is not None,
            writer=writer,
            rebuilding=catalog_path(self.folder, self.generation + 1).exists(),
            last_indexed=self.catalog.get_meta("last_indexed"),
        )

    def freshness(self) -> Freshness:
        """Compare the repository with the index by names, sizes and times, reading almost nothing.

        Raises:
            DataError: the repository is gone.
        """
        known = self.catalog.files()
        root = Path(self.settings.repo)
        changed, added = [], []
        for file in walk(root, self.settings.rules, Skipped()):
            row = known.pop(file.path, None)
            if row is None:
                added.append(file.path)
            elif not row.looks_like(file.size, file.mtime_ns) and (
                file.size != row.size or file_hash(root / file.path) != row.hash
            ):
                changed.append(file.path)
        return Freshness(changed=tuple(changed), added=tuple(added), removed=tuple(sorted(known)))

    def close(self) -> None:
        """Release files and connections."""
        self.catalog.close()
        for store in reversed(self._stores.values()):
            store.close()
        self._stores = {}


def default_folder(repo: Path) -> Path:
    """Return where the index of a repository goes unless the caller says otherwise.

    A cache folder keyed by the repository's path, so that nothing is written into the repository
    and read-only ones can be indexed: $POLYZOO_HOME, or ~/.cache/polyzoo, then sea/index/NAME-HASH.
    """
    repo = repo.resolve()
    return cache_home() / "sea" / "index" / _slug(repo)


def find_folder(start: Path) -> Path:
    """Return the index of a repository, or of the nearest folder above that has one.

    Raises:
        DataError: none of them has.
    """
    start = start.resolve()
    for repo in (start, *start.parents):
        folder = default_folder(repo)
        if current_generation(folder) is not None:
            return folder
    raise DataError(f"{start} is not indexed; make an index with: polyzoo sea index {start}")


def disk_bytes(folder: Path) -> int:
    """Return the size of everything in an index's folder."""
    sizes = 0
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):  # a writer may be at work
            sizes += path.stat().st_size if path.is_file() else 0
    return sizes


def store_name(folder: Path) -> str:
    """Name an index on a server that may hold many."""
    return f"polyzoo-{_slug(folder.resolve())}"


def current_generation(folder: Path) -> int | None:
    """Return the generation readers use, None where there is no index.

    Raises:
        DataError: the pointer is damaged or of another format.
    """
    path = folder / POINTER
    try:
        pointer = json.loads(path.read_bytes())
        number, written = int(pointer["generation"]), pointer["format"]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} is damaged ({error}); remove the folder and build the index again"
        ) from None
    if written != FORMAT:
        raise DataError(
            f"{path} is of format {written}, this version reads {FORMAT}; remove the folder and "
            "build the index again"
        )
    return number


def switch_generation(folder: Path, generation: int) -> None:
    """Make readers use another generation, at one instant."""
    with atomic_write(folder / POINTER, "w") as file:
        json.dump({"format": FORMAT, "generation": generation}, file)


def catalog_path(folder: Path, generation: int) -> Path:
    """Return the file of a generation's catalog."""
    return folder / f"catalog-{generation}.sqlite"


def read_settings(catalog: Catalog) -> IndexSettings:
    """Return how an index was made."""
    stored = catalog.get_meta("settings")
    if stored is None:
        raise DataError(f"{catalog.path} holds no settings; build the index again with --rebuild")
    return load(IndexSettings, stored)


def write_settings(catalog: Catalog, settings: IndexSettings) -> None:
    """Store how an index is made."""
    catalog.set_meta(settings=dump(settings))


def check_model(settings: IndexSettings, embedder: Embedder, *, folder: Path) -> None:
    """Refuse a model other than the one an index was made with.

    Raises:
        ConfigError: names what differs and the command that rebuilds.
    """
    differences = [
        f"{name} {now!r} instead of {then!r}"
        for name, then, now in (
            ("model", settings.model_id, embedder.model_id),
            ("dim", settings.dim, embedder.dim),
            ("pooling", settings.sea.pooling, embedder.config.pooling),
            ("aggregator", settings.sea.aggregator, embedder.config.aggregator),
            ("splitter", _fields(settings.sea.split), _fields(embedder.config.split)),
        )
        if then != now
    ]
    if differences:
        raise ConfigError(
            f"{folder} was built with model {settings.model!r}, and this one has "
            f"{'; '.join(differences)}: their vectors cannot be compared. Build it again with: "
            f"polyzoo sea index {settings.repo} --out {folder} --rebuild --model MODEL"
        )


def lock_holder(folder: Path) -> int | None:
    """Return the process that writes an index, if one does.

    Reads what the lock file says instead of trying the lock, which would turn a writer away.
    """
    try:
        found = re.match(r"process (\d+)", (folder / ".lock").read_text())
    except OSError:
        return None
    if not found:
        return None
    process = int(found.group(1))
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return None
    except PermissionError:  # alive, and somebody else's
        pass
    return process


def file_hash(path: Path) -> str:
    """Return a hash of a file's bytes, "" where it cannot be read."""
    try:
        return content_hash(path.read_bytes())
    except OSError:
        return ""


def content_hash(data: bytes) -> str:
    """Return a hash of bytes."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _slug(path: Path) -> str:
    name = re.sub(r"[^A-Za-z0-9_]+", "-", path.name).strip("-")[:40] or "root"
    return f"{name}-{hashlib.blake2b(os.fsencode(path), digest_size=6).hexdigest()}"


def _fields(config: Any) -> dict[str, Any]:
    return dataclasses.asdict(config)
