"""An index on disk: where it is, how it was made, how complete and how fresh it is. Torch-free."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from polyzoo.core.config import dump, load
from polyzoo.core.errors import ConfigError, DataError
from polyzoo.sea.config import SeaConfig
from polyzoo.sea.search import lexical
from polyzoo.sea.search.catalog import Catalog
from polyzoo.sea.search.embedder import Embedder
from polyzoo.sea.search.layout import catalog_path, current_generation, file_hash, lock_holder
from polyzoo.sea.search.stores import StoreKind, StorePlace, VectorStore, open_store
from polyzoo.sea.search.walk import Skipped, WalkRules, walk


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


def _fields(config: Any) -> dict[str, Any]:
    return dataclasses.asdict(config)
