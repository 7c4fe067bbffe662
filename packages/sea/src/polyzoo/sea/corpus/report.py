"""What mining a corpus gave, for a file and for people. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass, field

LENGTH_EDGES = (32, 64, 128, 256, 512, 1024)


@dataclass(kw_only=True)
class PackageReport:
    """What one package gave."""

    name: str
    version: str
    license: str
    partition: str
    pairs: int = 0
    undocumented: int = 0
    longer_than_256: int = 0
    """Pairs whose code has more than 256 lexer tokens."""


@dataclass(kw_only=True)
class CorpusReport:
    """What `build_corpus` did: written beside the corpus as report.json."""

    files: dict[str, str] = field(default_factory=dict)
    pairs: dict[str, int] = field(default_factory=dict)
    undocumented: int = 0
    functions: int = 0
    source_files: int = 0
    refused: dict[str, int] = field(default_factory=dict)
    """Functions or files left out, by reason."""
    failed_files: list[str] = field(default_factory=list)
    """The first few files that could not be read, with the reason."""
    skipped_sources: dict[str, str] = field(default_factory=dict)
    packages: list[PackageReport] = field(default_factory=list)
    lengths: dict[str, dict[str, int]] = field(default_factory=dict)
    """Per partition: upper edge of a bin of lexer tokens of the code -> pairs."""

    def count(self, package: PackageReport, *, length: int) -> None:
        """Take a pair into the package's numbers and the histogram of its partition."""
        package.pairs += 1
        package.longer_than_256 += length > 256
        bins = self.lengths.setdefault(
            package.partition, {**{str(edge): 0 for edge in LENGTH_EDGES}, "more": 0}
        )
        bins[next((str(edge) for edge in LENGTH_EDGES if length <= edge), "more")] += 1


def render(report: CorpusReport) -> str:
    """The report for people."""
    lines = [f"{name}: {count:,} pairs" for name, count in report.pairs.items()]
    lines.append(f"functions seen: {report.functions:,} in {report.source_files:,} files")
    if report.undocumented:
        lines.append(f"undocumented functions: {report.undocumented:,}")
    lines.extend(
        f"  {package.partition:5} {package.name} {package.version} ({package.license}): "
        f"{package.pairs:,} pairs, {package.longer_than_256:,} longer than 256 tokens"
        for package in report.packages
    )
    refused = sorted(report.refused.items(), key=lambda item: -item[1])
    lines.append("left out: " + ", ".join(f"{reason} {count:,}" for reason, count in refused))
    lines.extend(f"skipped {name}: {reason}" for name, reason in report.skipped_sources.items())
    lines.extend(f"failed {line}" for line in report.failed_files)
    lines.extend(f"{name} -> {path}" for name, path in report.files.items())
    return "\n".join(lines)
