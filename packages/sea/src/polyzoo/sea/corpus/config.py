"""What `build-corpus` takes. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from polyzoo.core.errors import ConfigError
from polyzoo.sea.config import Language


@dataclass(frozen=True, kw_only=True, slots=True)
class CorpusConfig:
    """What `build-corpus` mines, and by which rules."""

    sources: Annotated[
        tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="SOURCE [SOURCE ...]")
    ]
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
    """Also write training functions without usable documentation, to this .jsonl.gz."""
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
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
        if self.workers < 0:
            raise ConfigError(f"workers={self.workers} must be 0 (one per CPU) or more")
