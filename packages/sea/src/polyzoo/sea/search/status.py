"""`polyzoo sea status`: what an index holds, and whether it can be trusted. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass

from polyzoo.core.errors import DataError
from polyzoo.sea.search.config import StatusConfig
from polyzoo.sea.search.index import CodeIndex, Freshness
from polyzoo.sea.search.layout import disk_bytes, find_folder

_EXAMPLES = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class StatusReport:
    """An index, described."""

    folder: str
    repo: str
    model: str
    model_id: str
    pooling: str
    splitter: str
    aggregator: str
    dim: int
    store: str
    keep_blocks: bool
    units: int
    embedded: int
    coverage: float
    languages: dict[str, dict[str, int]]
    """By language: files, functions, methods, classes, modules."""
    complete: bool
    interrupted: bool
    writer: int | None
    rebuilding: bool
    last_indexed: str | None
    stale_files: int | None
    """Files changed, added or removed since; None when the repository is not there."""
    stale_examples: tuple[str, ...]
    skipped: dict[str, int]
    problems: tuple[str, ...]
    disk_bytes: int


def main(config: StatusConfig) -> StatusReport:
    """Run the command."""
    index = CodeIndex.open(config.index or find_folder(config.repo))
    try:
        return describe(index)
    finally:
        index.close()


def describe(index: CodeIndex) -> StatusReport:
    """Describe an index, comparing it with its repository."""
    settings, state, catalog = index.settings, index.state(), index.catalog
    freshness: Freshness | None
    try:
        freshness = index.freshness()
    except DataError:  # the repository has gone; the index still answers
        freshness = None
    examples = [] if freshness is None else [
        *(f"changed: {path}" for path in freshness.changed),
        *(f"added: {path}" for path in freshness.added),
        *(f"removed: {path}" for path in freshness.removed),
    ]  # fmt: skip
    return StatusReport(
        folder=str(index.folder),
        repo=settings.repo,
        model=settings.model,
        model_id=settings.model_id,
        pooling=settings.sea.pooling,
        splitter=f"{settings.sea.split.kind} ({settings.sea.split.profile})",
        aggregator=settings.sea.aggregator,
        dim=settings.dim,
        store=settings.store,
        keep_blocks=settings.keep_blocks,
        units=state.units,
        embedded=state.embedded,
        coverage=state.coverage,
        languages=catalog.counts(),
        complete=state.complete,
        interrupted=state.interrupted,
        writer=state.writer,
        rebuilding=state.rebuilding,
        last_indexed=state.last_indexed,
        stale_files=None if freshness is None else freshness.count,
        stale_examples=tuple(examples[:_EXAMPLES]),
        skipped=catalog.get_meta("skipped", {}),
        problems=tuple(
            row[0] for row in catalog.rows("SELECT problem FROM files WHERE problem IS NOT NULL")
        ),
        disk_bytes=disk_bytes(index.folder),
    )


def render(report: StatusReport) -> str:
    """Describe an index for people."""
    lines = [
        f"{report.repo}",
        f"  index      {report.folder} ({report.disk_bytes / 1e6:,.1f} MB, {report.store} store)",
        f"  model      {report.model} ({report.model_id}, {report.dim} channels, "
        f"{report.aggregator}, splitter {report.splitter}"
        f"{', blocks kept' if report.keep_blocks else ''})",
        f"  units      {report.units:,}, {report.coverage:.0%} with vectors",
    ]
    for language, counts in report.languages.items():
        parts = ", ".join(f"{count:,} {kind}" for kind, count in sorted(counts.items()))
        lines.append(f"  {language:<10} {parts}")
    lines.append(f"  indexed    {report.last_indexed or 'never finished'}{_condition(report)}")
    if report.stale_files is None:
        lines.append("  stale      unknown: the repository is not there")
    else:
        lines.append(f"  stale      {report.stale_files:,} files")
        lines += [f"             {example}" for example in report.stale_examples]
    lines += [f"  left out   {count:,} x {why}" for why, count in sorted(report.skipped.items())]
    lines += [f"  note       {problem}" for problem in report.problems[:_EXAMPLES]]
    return "\n".join(lines)


def _condition(report: StatusReport) -> str:
    if report.writer is not None:
        return f"; being written by process {report.writer}"
    if report.interrupted:
        return "; the last run was interrupted: run index again to continue it"
    return "" if report.complete else "; not all files have been read yet"
