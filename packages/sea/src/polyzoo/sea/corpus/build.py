"""Mine documented functions into CodeSearchNet files, split by package. Torch-free."""

from __future__ import annotations

import gzip
import hashlib
import json
import multiprocessing
import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from polyzoo.core.errors import ConfigError, DataError
from polyzoo.core.io import atomic_write
from polyzoo.core.log import progress
from polyzoo.sea.corpus import licences
from polyzoo.sea.corpus.config import CorpusConfig
from polyzoo.sea.corpus.mining import MinedFile, MineTask, mine_files
from polyzoo.sea.corpus.report import CorpusReport, PackageReport
from polyzoo.sea.corpus.sources import Package, guessed_name, normalise, open_package
from polyzoo.sea.splitting import languages

PARTITIONS = ("test", "valid", "train")
_FILES_PER_TASK = 48


def build_corpus(config: CorpusConfig) -> CorpusReport:
    """Write train, valid and test .jsonl.gz and report.json; equal sources give equal bytes.

    Exact duplicates of code or of documentation are kept once over the whole corpus: in test before
    valid before train, so that evaluation does not depend on what is trained on.

    Raises:
        ConfigError: a package is named for two partitions, or is not among the sources.
        DataError: a source that is no package, or nothing at all was found.

    Example:
        >>> build_corpus(CorpusConfig(sources=("requests",), out=Path("corpus"))).pairs
    """
    partitions = _partitions(config)
    report = CorpusReport()
    sources = _accepted(config, partitions, report)
    rows: list[tuple[Package, str, list[MinedFile]]] = []
    with _pool(config.workers) as pool:
        for source in progress(sources, description="mining", unit="package"):
            mined = _mine_package(source, config, partitions, report, pool)
            if mined is not None:
                rows.append(mined)
    _check_named(partitions, {package.name for package, _, _ in rows}, report)
    rows.sort(key=lambda row: (PARTITIONS.index(row[1]), row[0].name, row[0].version))
    _write(config, rows, report)
    if not any(report.pairs.values()) and not report.undocumented:
        raise DataError(
            f"no pair found in {len(sources)} sources; reasons: "
            f"{report.refused or report.skipped_sources or 'no source files'}"
        )
    with atomic_write(config.out / "report.json", "w") as file:
        json.dump(asdict(report), file, indent=1, ensure_ascii=False)
        file.write("\n")
    return report


def read_exclusions(path: Path) -> frozenset[str]:
    """Package names of an exclude file: one a line, `#` begins a comment."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"exclude_file={path}: cannot be read: {error}") from error
    names = (line.split("#", 1)[0].strip() for line in lines)
    return frozenset(normalise(name) for name in names if name)


def _partitions(config: CorpusConfig) -> dict[str, str]:
    partitions: dict[str, str] = {}
    for partition, names in (("valid", config.valid), ("test", config.test)):
        for name in (part for entry in names for part in entry.split(",") if part.strip()):
            key = normalise(name)
            if partitions.setdefault(key, partition) != partition:
                raise ConfigError(f"package {key} is named for valid and for test; choose one")
    return partitions


def _accepted(config: CorpusConfig, partitions: dict[str, str], report: CorpusReport) -> list[str]:
    """The sources to open, in a fixed order; excluded ones are not even unpacked."""
    excluded = _excluded(config)
    both = sorted(excluded & set(partitions))
    if both:
        raise ConfigError(f"package {both[0]} is excluded and named for {partitions[both[0]]}")
    accepted = []
    for source in sorted(set(config.sources), key=lambda entry: (guessed_name(entry), entry)):
        if guessed_name(source) in excluded:
            report.skipped_sources[source] = "on the exclude list"
        else:
            accepted.append(source)
    return accepted


def _excluded(config: CorpusConfig) -> frozenset[str]:
    named = frozenset(
        normalise(name) for entry in config.exclude for name in entry.split(",") if name.strip()
    )
    return named | (read_exclusions(config.exclude_file) if config.exclude_file else frozenset())


def _mine_package(
    source: str,
    config: CorpusConfig,
    partitions: dict[str, str],
    report: CorpusReport,
    pool: ProcessPoolExecutor | None,
) -> tuple[Package, str, list[MinedFile]] | None:
    with open_package(source, suffixes=languages.suffixes(config.languages)) as package:
        # The name inside the package counts, whatever the file is called.
        if package.name in _excluded(config):
            report.skipped_sources[source] = f"on the exclude list, as {package.name}"
            return None
        if config.licenses and not licences.is_allowed(package.licence, config.licenses):
            report.skipped_sources[source] = f"licence {package.licence} is not in licenses"
            return None
        partition = partitions.get(package.name, "train")
        files = [name for name in package.files if not name.endswith(".pyi")]
        tasks = [
            MineTask(
                root=package.root,
                files=tuple(files[start : start + _FILES_PER_TASK]),
                repo=package.name,
                version=package.version,
                license=package.licence,
                partition=partition,
                min_lines=config.min_code_lines,
                min_words=config.min_doc_words,
                max_doc_tokens=config.max_doc_tokens,
                keep_undocumented=config.undocumented is not None and partition == "train",
            )
            for start in range(0, len(files), _FILES_PER_TASK)
        ]
        batches = pool.map(mine_files, tasks) if pool else map(mine_files, tasks)
        return package, partition, [file for batch in batches for file in batch]


def _check_named(partitions: dict[str, str], found: set[str], report: CorpusReport) -> None:
    missing = sorted(set(partitions) - found)
    if missing:
        why = "; ".join(f"{name}: {reason}" for name, reason in report.skipped_sources.items())
        raise ConfigError(
            f"{partitions[missing[0]]} names {missing[0]}, which is not among the mined packages "
            f"({', '.join(sorted(found)) or 'none'}){'; skipped ' + why if why else ''}"
        )


def _write(
    config: CorpusConfig,
    rows: list[tuple[Package, str, list[MinedFile]]],
    report: CorpusReport,
) -> None:
    refused: Counter[str] = Counter()
    seen: dict[str, set[Any]] = {"code": set(), "documentation": set(), "url": set()}
    with ExitStack() as stack:
        outputs = {
            partition: stack.enter_context(_jsonl(config.out / f"{partition}.jsonl.gz"))
            for partition in PARTITIONS
            if partition == "train" or any(row[1] == partition for row in rows)
        }
        bare = stack.enter_context(_jsonl(config.undocumented)) if config.undocumented else None
        for package, partition, files in rows:
            entry = PackageReport(
                name=package.name,
                version=package.version,
                license=package.licence,
                partition=partition,
            )
            report.packages.append(entry)
            report.source_files += len(files)
            for file in files:
                refused.update(file.refused)
                report.functions += file.functions
                if file.failure and len(report.failed_files) < 20:
                    report.failed_files.append(f"{package.name}: {file.failure}")
                for record in file.records:
                    kept = _keep(record, seen, refused)
                    if kept and record["docstring_tokens"]:
                        outputs[partition].write(_line(record))
                        report.count(entry, length=len(record["code_tokens"]))
                    elif kept and bare is not None:
                        bare.write(_line(record))
                        entry.undocumented += 1
    report.refused = dict(sorted(refused.items()))
    report.pairs = {
        partition: sum(row.pairs for row in report.packages if row.partition == partition)
        for partition in reversed(PARTITIONS)
    }
    report.undocumented = sum(row.undocumented for row in report.packages)
    report.files = {
        name: str(config.out / f"{name}.jsonl.gz")
        for name in reversed(PARTITIONS)
        if name in outputs
    }
    if config.undocumented:
        report.files["undocumented"] = str(config.undocumented)


def _keep(record: dict[str, Any], seen: dict[str, set[Any]], refused: Counter[str]) -> bool:
    code = hashlib.sha256(" ".join(record["code_tokens"]).encode("utf-8", "replace")).digest()
    summary = " ".join(record["docstring_tokens"]).lower()
    text = hashlib.sha256(summary.encode("utf-8", "replace")).digest()
    if code in seen["code"]:
        refused["duplicate code"] += 1
        return False
    if summary and text in seen["documentation"]:
        refused["duplicate documentation"] += 1
        return False
    seen["code"].add(code)
    if summary:
        seen["documentation"].add(text)
    # Several functions on the same lines (minified code): the join key must still be unique.
    url, copies = record["url"], 1
    while record["url"] in seen["url"]:
        copies += 1
        record["url"] = f"{url}~{copies}"
    seen["url"].add(record["url"])
    return True


def _line(record: dict[str, Any]) -> bytes:
    return (json.dumps(record, ensure_ascii=False) + "\n").encode("utf-8", "replace")


@contextmanager
def _jsonl(path: Path) -> Iterator[gzip.GzipFile]:
    """A gzip file without name and time in its header: equal content is equal bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        atomic_write(path) as file,
        gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0, compresslevel=6) as packed,
    ):
        yield packed


@contextmanager
def _pool(workers: int) -> Iterator[ProcessPoolExecutor | None]:
    workers = workers or os.cpu_count() or 1
    if workers == 1:
        yield None
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        yield pool
