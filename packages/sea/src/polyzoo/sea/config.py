"""Configurations of SEA: what is saved with the weights, and what the commands take. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Language = Literal["python", "java", "javascript", "go", "php", "ruby"]
Splitter = Literal["ast", "line", "token", "space"]
Pooling = Literal["cls", "mean", "pooler"]
Aggregator = Literal[
    "attn1", "attn2", "mean", "max", "attn1_mean", "attn2_mean", "attn1_sum", "attn2_sum", "first", "maxsim"
]


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitConfig:
    """How source text becomes blocks (sea.md section 3)."""

    kind: Splitter = "ast"
    """ast: at statement borders; line, token, space: windows of that many items."""
    profile: Literal["fair", "released"] = "fair"
    """fair loses nothing and counts encoder tokens; released reproduces the published code, faults included."""
    budget: int = 254
    """Encoder pieces a block may hold, without the special tokens."""
    window: int = 32
    """Items in a window; only for line, token and space, and for every released splitter."""
    step: int = 16
    """Items between two window starts, 1 to window; the same splitters."""
    min_line: int = 3
    """Released AST only: rows between two kept cut points."""
    overlap: int = 0
    """Pieces of the previous block repeated at the start of the next (fair AST)."""
    max_blocks: int = 16
    """More blocks than this are thinned evenly, first and last kept."""
    min_tokens: int = 16
    """A last block smaller than this is merged into the one before it."""
    repeat_signature: bool = False
    """Put the function's signature before every block; it counts toward the budget."""
    keep_comments: bool = False
    """Leave comments in block text; docstrings are always removed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SeaConfig:
    """Shape of a SEA model, saved beside its weights as config.json."""

    encoder: str = "embedded"
    """Folder, hub id, or asset name of the Hugging Face encoder this model starts from."""
    pooling: Pooling = "mean"
    """How token states become one vector."""
    normalize: bool = True
    """Scale every vector to length 1."""
    split: SplitConfig = field(default_factory=SplitConfig)
    aggregator: Aggregator = "attn1_mean"
    """How block vectors become one vector per function (sea.md section 5)."""
    include_whole: bool = True
    """Add the vector of the truncated whole function to the blocks."""
    max_query_tokens: int = 128
    """Encoder pieces of a query, special tokens included; the rest is cut and counted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CorpusConfig:
    """What `build-corpus` mines, and by which rules."""

    sources: tuple[str, ...]
    """Wheels, sdists, other archives, unpacked folders, or names of installed packages."""
    out: Path
    """Folder for train, valid and test .jsonl.gz and report.json."""
    languages: tuple[Language, ...] = ("python",)
    """Languages to take."""
    valid: tuple[str, ...] = ()
    """Packages of the validation set; commas separate too."""
    test: tuple[str, ...] = ()
    """Packages of the test set; commas separate too."""
    exclude_file: Path | None = None
    """Package names never to mine, one a line."""
    exclude: tuple[str, ...] = ()
    """Further packages never to mine; commas separate too."""
    licenses: tuple[str, ...] = (
        "0BSD",
        "Apache-2.0",
        "BSD-2-Clause",
        "BSD-3-Clause",
        "CC0-1.0",
        "HPND",
        "ISC",
        "MIT",
        "MIT-0",
        "PSF-2.0",
        "Python-2.0",
        "Unlicense",
        "Zlib",
    )
    """SPDX names allowed; a package needs an expression these satisfy. Empty allows everything."""
    undocumented: Path | None = None
    """Also write the training packages' functions without usable documentation to this .jsonl.gz."""
    min_code_lines: int = 3
    """Lines of code a function needs, blank ones and the documentation not counted."""
    min_doc_words: int = 3
    """Words the first paragraph of the documentation needs."""
    max_doc_tokens: int = 256
    """Words and punctuation marks it may have."""
    workers: int = 0
    """Processes; 0 takes one per CPU. The result does not depend on it."""

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError("sources is empty; name at least one archive, folder or package")
        if not self.languages:
            raise ValueError("languages is empty; name at least one")
        for name in ("min_code_lines", "min_doc_words", "max_doc_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.workers < 0:
            raise ValueError(f"workers={self.workers} must be 0 or more")
