"""Configurations of SEA: what is saved with the weights, and what the commands take. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from polyzoo.core.errors import ConfigError

Language = Literal["python", "java", "javascript", "go", "php", "ruby"]
Splitter = Literal["ast", "line", "token", "space"]
Pooling = Literal["cls", "mean", "pooler"]
Aggregator = Literal[
    "attn1", "attn2", "mean", "max", "attn1_mean", "attn2_mean", "attn1_sum", "attn2_sum", "first", "maxsim"
]
Raw = Literal["mean", "max", "whole"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitConfig:
    """How source text becomes blocks (sea.md section 3)."""

    kind: Splitter = "ast"
    """ast: at statement borders; line, token, space: windows of that many items."""
    profile: Literal["fair", "released"] = "fair"
    """fair loses nothing and counts encoder tokens; released repeats the published code's faults."""
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
    """Leave comments in block text."""
    keep_docstrings: bool = False
    """Leave docstrings in block text: never where the queries are docstrings, the answer leaks."""

    def __post_init__(self) -> None:
        """Check that no setting loses text."""
        for name in ("budget", "window", "step", "max_blocks"):
            _at_least(name, getattr(self, name), 1)
        for name in ("min_line", "overlap", "min_tokens"):
            _at_least(name, getattr(self, name), 0)
        if self.step > self.window:
            raise ConfigError(
                f"step={self.step} is larger than window={self.window}: the text between two windows would be lost; "
                "choose step from 1 to window"
            )
        if self.overlap >= self.budget:
            raise ConfigError(
                f"overlap={self.overlap} fills the whole budget={self.budget}: choose an overlap below it"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterConfig:
    """A low-rank change of the encoder, stored instead of the encoder itself."""

    rank: int
    """Inner size of the two factors."""
    scale: float
    """Factor of the product of the two matrices when it is added to the encoder's weight."""
    base_sha256: str = ""
    """Fingerprint of the encoder weights this change was trained on; empty means unchecked."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SeaConfig:
    """Shape of a SEA model, saved beside its weights as config.json."""

    encoder: str = "minilm"
    """Folder, hub id, or asset name of the Hugging Face encoder; `self`: the folder beside this file."""
    pooling: Pooling = "mean"
    """How token states become one vector."""
    normalize: bool = True
    """Scale every vector to length 1."""
    split: SplitConfig = field(default_factory=SplitConfig)
    aggregator: Aggregator = "attn1_mean"
    """How block vectors become one vector per function (sea.md section 5)."""
    raw: Raw = "mean"
    """What *_mean and *_sum add to the attention: mean or maximum of the entries, or the truncated whole."""
    include_whole: bool = True
    """Add the vector of the truncated whole function to the blocks."""
    split_identifiers: bool = False
    """Cut identifiers at camelCase borders before tokenising; offsets still refer to the text."""
    max_query_tokens: int = 128
    """Encoder pieces of a query, special tokens included; the rest is cut and counted."""
    adapter: AdapterConfig | None = None
    """Set when model.safetensors holds a low-rank change of `encoder` and not the encoder."""
    tokenizer_sha256: str = ""
    """Fingerprint of the tokenizer this model was trained with; empty means unchecked."""

    def __post_init__(self) -> None:
        """Check the relations between fields."""
        _at_least("max_query_tokens", self.max_query_tokens, 4)
        if self.raw == "whole" and not self.include_whole:
            raise ConfigError("raw='whole' needs include_whole=True: there is no whole-function vector to add")
        if self.aggregator == "first" and not self.include_whole:
            raise ConfigError(
                "aggregator='first' is the truncated whole function, but include_whole is False: set it to True"
            )


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ConfigError(f"{name}={value} is too small: the least allowed value is {least}")


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
        """Check that there is something to mine."""
        if not self.sources:
            raise ConfigError("sources is empty; name at least one archive, folder or package")
        if not self.languages:
            raise ConfigError("languages is empty; name at least one")
        for name in ("min_code_lines", "min_doc_words", "max_doc_tokens"):
            _at_least(name, getattr(self, name), 1)
        _at_least("workers", self.workers, 0)
