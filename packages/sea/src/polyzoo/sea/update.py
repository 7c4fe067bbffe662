"""`polyzoo sea index`: make the index of a repository, or bring it up to date."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from polyzoo.core.config import dump
from polyzoo.core.errors import ConfigError, DataError
from polyzoo.core.io import FolderLock, remove_stale
from polyzoo.sea import lexical
from polyzoo.sea.catalog import Catalog
from polyzoo.sea.embedder import Embedder, load_embedder
from polyzoo.sea.embedding import PendingEmbedder
from polyzoo.sea.index import (
    POINTER,
    IndexSettings,
    catalog_path,
    current_generation,
    default_folder,
    disk_bytes,
    read_settings,
    store_name,
    switch_generation,
    write_settings,
)
from polyzoo.sea.indexer import Indexer
from polyzoo.sea.languages import GRAMMARS
from polyzoo.sea.search_config import IndexConfig
from polyzoo.sea.stores import open_store
from polyzoo.sea.walk import Skipped, WalkRules, compile_patterns, walk

_PROBLEMS_SHOWN = 50


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexReport:
    """What one run of `index` did."""

    folder: str
    repo: str
    model: str
    model_id: str
    store: str
    units: int
    embedded: int
    added: int
    """Files, like the next four."""
    changed: int
    removed: int
    renamed: int
    unchanged: int
    encoded: int
    """Units that went through the model in this run."""
    copied: int
    """Units that got the vector of one with the same text."""
    skipped: dict[str, int]
    """Files and folders left out, by reason."""
    problems: tuple[str, ...]
    """Files indexed although something was wrong with them."""
    disk_bytes: int
    seconds: float


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
    start = time.monotonic()
    repo = config.repo.expanduser().resolve()
    folder = (config.out or default_folder(repo)).expanduser()
    rules = _rules(config)
    old = current_generation(folder)
    if old is None or config.rebuild:
        _check_has_source(repo, rules)
    elif not repo.is_dir():
        raise DataError(f"{repo} is not there; remove {folder} if its index is no longer wanted")
    with FolderLock(folder, purpose="indexing"):
        remove_stale(folder / POINTER)
        old = current_generation(folder)  # another process may just have made it
        if old is None:
            return _first(config, repo, folder, embedder, start)
        _sweep(folder, old)
        catalog = Catalog(catalog_path(folder, old), write=True)
        try:
            return _again(config, repo, folder, old, catalog, embedder, start)
        finally:
            catalog.close()


def render(report: IndexReport) -> str:
    """Describe a run for people."""
    share = f" ({report.embedded / report.units:.0%} with vectors)" if report.units else ""
    lines = [
        f"{report.repo}: {report.units:,} units{share} in {report.seconds:.1f} s",
        f"files: {report.added:,} added, {report.changed:,} changed, {report.renamed:,} renamed, "
        f"{report.removed:,} removed, {report.unchanged:,} unchanged",
        f"vectors: {report.encoded:,} encoded with {report.model}, {report.copied:,} copied",
    ]
    lines += [f"left out: {count:,} x {reason}" for reason, count in sorted(report.skipped.items())]
    lines += [f"note: {problem}" for problem in report.problems]
    lines.append(f"index: {report.folder} ({report.disk_bytes / 1e6:,.1f} MB, {report.store})")
    return "\n".join(lines)


def _first(
    config: IndexConfig, repo: Path, folder: Path, embedder: Embedder | None, start: float
) -> IndexReport:
    name = config.model or "embedded"
    model = PendingEmbedder(lambda: embedder or load_embedder(name))
    settings = _new_settings(config, repo, folder, name, model.get(), _rules(config) or WalkRules())
    catalog = _begin(folder, 1, settings)
    try:
        # At once, so that readers may search words while vectors are made.
        switch_generation(folder, 1)
        return _run(config, folder, 1, catalog, model, start)
    finally:
        catalog.close()


def _again(
    config: IndexConfig,
    repo: Path,
    folder: Path,
    generation: int,
    catalog: Catalog,
    embedder: Embedder | None,
    start: float,
) -> IndexReport:
    old = read_settings(catalog)
    if Path(old.repo) != repo:
        raise ConfigError(
            f"{folder} is the index of {old.repo}, not of {repo}; choose another --out folder"
        )
    name = config.model or old.model
    model = PendingEmbedder(lambda: embedder or load_embedder(name))
    rules = _rules(config) or old.rules
    if not config.rebuild:
        _check_unchanged(config, old, folder)
        if rules != old.rules:
            write_settings(catalog, replace(old, rules=rules))
        _discard(folder, generation + 1)  # a rebuild that was given up
        return _run(config, folder, generation, catalog, model, start)
    settings = _new_settings(config, repo, folder, name, model.get(), rules, old)
    anew = _begin(folder, generation + 1, settings)
    try:
        report = _run(config, folder, generation + 1, anew, model, start)
    finally:
        anew.close()
    switch_generation(folder, generation + 1)
    catalog.close()
    _discard(folder, generation)
    return report


def _run(
    config: IndexConfig,
    folder: Path,
    generation: int,
    catalog: Catalog,
    model: PendingEmbedder,
    start: float,
) -> IndexReport:
    jobs = config.jobs or os.cpu_count() or 1
    indexer = Indexer(folder, generation, catalog, model, jobs=jobs)
    indexer.run()
    settings, counts = indexer.settings, indexer.counts
    units, embedded = catalog.coverage()
    problems = [file.problem for file in catalog.files().values() if file.problem]
    more = len(problems) - _PROBLEMS_SHOWN
    if more > 0:
        problems[_PROBLEMS_SHOWN:] = [f"and {more:,} more like these"]
    return IndexReport(
        folder=str(folder),
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
        disk_bytes=disk_bytes(folder),
        seconds=round(time.monotonic() - start, 3),
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
        gitignore=not config.no_gitignore,
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


def _new_settings(
    config: IndexConfig,
    repo: Path,
    folder: Path,
    name: str,
    embedder: Embedder,
    rules: WalkRules,
    old: IndexSettings | None = None,
) -> IndexSettings:
    kind = config.store or (old.store if old else "local")
    same_kind = old is not None and old.store == kind
    maxsim = embedder.config.aggregator == "maxsim"  # such a model ranks by blocks only
    return IndexSettings(
        repo=str(repo),
        model=name,
        model_id=embedder.model_id,
        sea=embedder.config,
        dim=embedder.dim,
        dtype=config.dtype or (old.dtype if old else "float32"),
        store=kind,
        store_location=config.store_location or (old.store_location if old and same_kind else ""),
        store_name="vectors" if kind == "local" else store_name(folder),
        keep_blocks=config.keep_blocks or maxsim or bool(old and old.keep_blocks),
        rules=rules,
    )


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
    path = catalog_path(folder, generation)
    if not path.exists():
        return
    catalog = Catalog(path)
    settings = read_settings(catalog)
    catalog.close()
    for blocks in (False, True):
        place = settings.place(folder, generation, blocks=blocks)
        with suppress(DataError):  # it was never made
            open_store(place).drop()
    for suffix in ("", "-wal", "-shm"):
        Path(f"{path}{suffix}").unlink(missing_ok=True)
