"""What one run of `index` did. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass


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
