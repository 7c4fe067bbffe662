"""`polyzoo sea index`: make the index of a repository, or bring it up to date."""

from __future__ import annotations

import os
import shutil
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from polyzoo.core.config import dump
from polyzoo.core.errors import ConfigError, DataError
from polyzoo.core.io import FolderLock, remove_stale
from polyzoo.sea.search import lexical
from polyzoo.sea.search.catalog import Catalog
from polyzoo.sea.search.config import IndexConfig
from polyzoo.sea.search.embedder import Embedder, load_embedder, load_light
from polyzoo.sea.search.embedding import PendingEmbedder
from polyzoo.sea.search.ignores import compile_patterns
from polyzoo.sea.search.index import IndexSettings, read_settings, write_settings
from polyzoo.sea.search.index_report import IndexReport
from polyzoo.sea.search.indexer import Indexer
from polyzoo.sea.search.layout import (
    POINTER,
    catalog_path,
    current_generation,
    default_folder,
    disk_bytes,
    store_name,
    switch_generation,
)
from polyzoo.sea.search.stores import open_store
from polyzoo.sea.search.walk import Skipped, WalkRules, walk
from polyzoo.sea.splitting.languages import GRAMMARS

_PROBLEMS_SHOWN = 50


def main(config: IndexConfig) -> IndexReport:
    """Run the command."""
    return build_index(config)


def build_index(config: IndexConfig, *, embedder: Embedder | None = None) -> IndexReport:
    """Make the index of a repository, or bring it up to date.

    Args:
        config: What to index, and where to.
        embedder: A model that is loaded already; by default the one the config or the index names.

    Raises:
        DataError: the repository is missing or holds no source file; the index is damaged.
        ConfigError: the model or the store is not the one the index was made with.
        LockedError: another process is writing this index.
        PolyzooError: the disk is full; what was done is kept.

    Example:
        >>> build_index(IndexConfig(repo=Path("."))).units
    """
    job = _Job(config, config.repo.expanduser().resolve(), embedder, time.monotonic())
    rules = _rules(config)
    generation = current_generation(job.folder)
    if generation is None or config.rebuild:
        _check_has_source(job.repo, rules)
    elif not job.repo.is_dir():
        raise DataError(
            f"{job.repo} is not there; remove {job.folder} if its index is no longer wanted"
        )
    with FolderLock(job.folder, purpose="indexing"):
        remove_stale(job.folder / POINTER)
        generation = current_generation(job.folder)  # another process may just have made it
        if generation is None:
            return _first(job)
        _sweep(job.folder, generation)
        return _rebuild(job, generation) if config.rebuild else _update(job, generation)


@dataclass(frozen=True, slots=True)
class _Job:
    """One run of the command."""

    config: IndexConfig
    repo: Path
    embedder: Embedder | None
    start: float

    @property
    def folder(self) -> Path:
        return (self.config.out or default_folder(self.repo)).expanduser()

    def model(self, name: str, *, update: bool = False) -> PendingEmbedder:
        given = self.embedder
        light = load_light(name) if update and given is None else None
        return PendingEmbedder(lambda: given or load_embedder(name, bulk=True), light=light)

    def check_repo(self, settings: IndexSettings) -> None:
        if Path(settings.repo) != self.repo:
            raise ConfigError(
                f"{self.folder} is the index of {settings.repo}, not of {self.repo}; choose "
                "another --out folder"
            )


def _first(job: _Job) -> IndexReport:
    model = job.model(job.config.model or "embedded")
    catalog = _begin(job.folder, 1, _new_settings(job, model.get(), old=None))
    try:
        # At once, so that readers may search words while vectors are made.
        switch_generation(job.folder, 1)
        return _run(job, 1, catalog, model)
    finally:
        catalog.close()


def _update(job: _Job, generation: int) -> IndexReport:
    path = catalog_path(job.folder, generation)
    if not path.exists():
        raise DataError(f"{path} is missing; build the index again with --rebuild")
    catalog = Catalog(path, write=True)
    try:
        settings = read_settings(catalog)
        job.check_repo(settings)
        _check_unchanged(job.config, settings, job.folder)
        rules = _rules(job.config) or settings.rules
        if rules != settings.rules:
            write_settings(catalog, replace(settings, rules=rules))
        _discard(job.folder, generation + 1)  # a rebuild that was given up
        model = job.model(job.config.model or settings.model, update=True)
        return _run(job, generation, catalog, model)
    finally:
        catalog.close()


def _rebuild(job: _Job, generation: int) -> IndexReport:
    """Make the next generation beside the one that readers have, then switch."""
    old = _settings_if_readable(job.folder, generation)
    if old is not None:
        job.check_repo(old)
    model = job.model(job.config.model or (old.model if old else "embedded"))
    settings = _new_settings(job, model.get(), old=old)
    catalog = _begin(job.folder, generation + 1, settings)
    try:
        report = _run(job, generation + 1, catalog, model)
    finally:
        catalog.close()
    switch_generation(job.folder, generation + 1)
    _discard(job.folder, generation)
    return replace(report, disk_bytes=disk_bytes(job.folder))


def _run(job: _Job, generation: int, catalog: Catalog, model: PendingEmbedder) -> IndexReport:
    jobs = job.config.jobs or os.cpu_count() or 1
    indexer = Indexer(job.folder, generation, catalog, model, jobs=jobs)
    indexer.run()
    settings, counts = indexer.settings, indexer.counts
    units, embedded = catalog.coverage()
    problems = [file.problem for file in catalog.files().values() if file.problem]
    more = len(problems) - _PROBLEMS_SHOWN
    if more > 0:
        problems[_PROBLEMS_SHOWN:] = [f"and {more:,} more like these"]
    return IndexReport(
        folder=str(job.folder),
        repo=settings.repo,
        model=settings.model,
        model_id=settings.model_id,
        store=settings.store,
        units=units,
        embedded=embedded,
        added=counts["added"],
        changed=counts["changed"],
        removed=counts["removed"],
        renamed=counts["renamed"],
        unchanged=counts["unchanged"],
        encoded=counts["encoded"],
        copied=counts["copied"],
        skipped=dict(indexer.skipped.counts),
        problems=tuple(problems),
        disk_bytes=disk_bytes(job.folder),
        seconds=round(time.monotonic() - job.start, 3),
    )


def _check_has_source(repo: Path, rules: WalkRules | None) -> None:
    skipped = Skipped()
    if next(walk(repo, rules or WalkRules(), skipped), None) is None:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in skipped.counts.items())
        raise DataError(
            f"{repo} holds no source file to index (left out: "
            f"{reasons or 'nothing, it is empty'}); known languages: {', '.join(sorted(GRAMMARS))}"
        )


def _rules(config: IndexConfig) -> WalkRules | None:
    """Return what this run asks for; None when it says nothing, so that the index's rules stay."""
    compile_patterns(config.include, option="include")
    compile_patterns(config.exclude, option="exclude")
    rules = WalkRules(
        languages=tuple(config.language),
        include=tuple(config.include),
        exclude=tuple(config.exclude),
        gitignore=config.gitignore,
        vendored=config.vendored,
    )
    return None if rules == WalkRules() else rules


def _check_unchanged(config: IndexConfig, old: IndexSettings, folder: Path) -> None:
    wanted = {
        "store": (config.store, old.store),
        "store_location": (config.store_location, old.store_location),
        "dtype": (config.dtype, old.dtype),
        "keep_blocks": (config.keep_blocks or None, old.keep_blocks),
        "lexical_version": (lexical.VERSION, old.lexical_version),
    }
    for name, (value, then) in wanted.items():
        if value is not None and value != then:
            raise ConfigError(
                f"{folder} was built with {name}={then!r}, not {value!r}; build it again with: "
                f"polyzoo sea index {old.repo} --out {folder} --rebuild"
            )


def _new_settings(job: _Job, embedder: Embedder, *, old: IndexSettings | None) -> IndexSettings:
    """Settle what the config leaves open by the index before it, then by defaults."""
    config, folder = job.config, job.folder
    kind = config.store or (old.store if old else "local")
    same_kind = old is not None and old.store == kind
    return IndexSettings(
        repo=str(job.repo),
        model=config.model or (old.model if old else "embedded"),
        model_id=embedder.model_id,
        sea=embedder.config,
        dim=embedder.dim,
        dtype=config.dtype or (old.dtype if old else "float32"),
        store=kind,
        store_location=config.store_location or (old.store_location if old and same_kind else ""),
        store_name="vectors" if kind == "local" else store_name(folder),
        keep_blocks=any(
            (config.keep_blocks, embedder.config.keeps_entries, old is not None and old.keep_blocks)
        ),
        rules=_rules(config) or (old.rules if old else WalkRules()),
    )


def _settings_if_readable(folder: Path, generation: int) -> IndexSettings | None:
    """Return how a generation was made; None where it is missing or damaged."""
    path = catalog_path(folder, generation)
    if not path.exists():
        return None
    try:
        catalog = Catalog(path)
        try:
            return read_settings(catalog)
        finally:
            catalog.close()
    except DataError:
        return None


def _begin(folder: Path, generation: int, settings: IndexSettings) -> Catalog:
    """Open the catalog of a new generation: the one a killed run began, if it was for the same."""
    path = catalog_path(folder, generation)
    if path.exists():
        catalog = Catalog(path, write=True)
        if catalog.get_meta("settings") == dump(settings):
            return catalog
        catalog.close()
        _discard(folder, generation)
    return Catalog.create(path, settings=dump(settings))


def _sweep(folder: Path, generation: int) -> None:
    """Remove what a run left that was killed between switching and tidying up."""
    for path in folder.glob("catalog-*.sqlite"):
        number = path.stem.removeprefix("catalog-")
        if number.isdigit() and int(number) < generation:
            _discard(folder, int(number))


def _discard(folder: Path, generation: int) -> None:
    """Remove a generation nobody reads any more; a reader that has it open keeps it until then."""
    settings = _settings_if_readable(folder, generation)
    if settings is not None:
        for blocks in (False, True):
            place = settings.place(folder, generation, blocks=blocks)
            with suppress(DataError):  # it was never made
                open_store(place).drop()
    for name in ("vectors", "vectors-blocks"):  # a local store whose catalog was unreadable
        shutil.rmtree(folder / f"{name}-{generation}", ignore_errors=True)
    for suffix in ("", "-wal", "-shm"):
        Path(f"{catalog_path(folder, generation)}{suffix}").unlink(missing_ok=True)
