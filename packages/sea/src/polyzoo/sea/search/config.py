"""What `index`, `search`, `status` and `serve` take. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from polyzoo.core.errors import ConfigError
from polyzoo.sea.config import Language

Mode = Literal["hybrid", "vector", "lexical"]


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexConfig:
    """What `index` makes, and of what. What is not given stays as the index was made."""

    repo: Annotated[Positional[Path], arg(metavar="REPO")]
    """Folder of the repository."""
    out: Path | None = None
    """Folder of the index; by default a cache folder keyed by the repository's path."""
    model: str | None = None
    """Folder, hub id or asset name of a SEA model; `embedded` for a new index."""
    store: Literal["local", "qdrant", "lancedb"] | None = None
    """Where vectors go; `local` for a new index."""
    store_location: str | None = None
    """http://HOST:6333 or a folder for qdrant, folder or bucket for lancedb; by default `out`."""
    dtype: Literal["float32", "float16"] | None = None
    """Numbers of a local store's vectors; float32 for a new index."""
    language: tuple[Language, ...] = ()
    """Only files of these languages."""
    include: tuple[str, ...] = ()
    """Only files that match one of these patterns, in .gitignore syntax."""
    exclude: tuple[str, ...] = ()
    """No files or folders that match one of these patterns, in .gitignore syntax."""
    gitignore: bool = True
    """Leave out what .gitignore files name."""
    vendored: bool = False
    """Enter hidden and vendored folders, too."""
    keep_blocks: bool = False
    """Store the vectors of blocks in full as well, for --maxsim."""
    rebuild: bool = False
    """Make the index anew; readers keep the old one until the new one is complete."""
    jobs: int = 1
    """Processes that read and parse files, where there are hundreds; 0 takes one per core."""

    def __post_init__(self) -> None:
        """Check what tyro cannot."""
        if self.jobs < 0:
            raise ConfigError(f"jobs={self.jobs} must be 0 or more")


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchRequest:
    """One question to an index."""

    query: str
    top_k: int = 10
    mode: Mode = "hybrid"
    languages: tuple[str, ...] = ()
    paths: tuple[str, ...] = ()
    """Patterns in .gitignore syntax."""
    kinds: tuple[str, ...] = ()
    vector_weight: float = 1.0
    lexical_weight: float = 1.0
    maxsim: bool = False
    blocks: bool = True
    """Find the best block of each hit."""
    context: int = 6
    """Lines of code per hit."""

    def __post_init__(self) -> None:
        """Check ranges; NaN is in none."""
        if not 1 <= self.top_k <= 1000:
            raise ConfigError(f"top_k={self.top_k} must be from 1 to 1000")
        if self.context < 0:
            raise ConfigError(f"context={self.context} must be 0 or more")
        for name in ("vector_weight", "lexical_weight"):
            value = getattr(self, name)
            if not 0 <= value <= 1000:
                raise ConfigError(f"{name}={value} must be from 0 to 1000")
        if self.mode == "hybrid" and not self.vector_weight + self.lexical_weight:
            raise ConfigError(
                "vector_weight and lexical_weight are both 0: nothing is left to rank by"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchConfig:
    """What `search` looks for, and where."""

    query: Annotated[Positional[str], arg(metavar="QUERY")]
    """What the code does, in plain words, or names that occur in it."""
    repo: Path = Path()
    """Repository, or any folder in it, whose index is searched."""
    index: Path | None = None
    """Folder of the index, where `index --out` put it elsewhere."""
    top_k: int = 10
    """Hits to show."""
    mode: Mode = "hybrid"
    """Meaning and words together, or one of them; lexical needs no model."""
    language: tuple[Language, ...] = ()
    """Only units of these languages."""
    path: tuple[str, ...] = ()
    """Only files that match one of these patterns, in .gitignore syntax."""
    kind: tuple[Literal["function", "method", "class", "module"], ...] = ()
    """Only units of these kinds."""
    vector_weight: float = 1.0
    """Share of the vector rank in the hybrid score."""
    lexical_weight: float = 1.0
    """Share of the lexical rank in the hybrid score."""
    maxsim: bool = False
    """Score a unit by its best block; needs an index made with --keep-blocks."""
    model: str | None = None
    """Load the index's model from here; it must be the same one."""
    blocks: bool = True
    """Find the best block of each hit."""
    check: bool = True
    """Look whether files have changed since they were indexed."""
    context: int = 6
    """Lines of code to show per hit."""

    def __post_init__(self) -> None:
        """Check what tyro cannot."""
        self.request()

    def request(self) -> SearchRequest:
        """Return the question alone."""
        return SearchRequest(
            query=self.query,
            top_k=self.top_k,
            mode=self.mode,
            languages=tuple(self.language),
            paths=tuple(self.path),
            kinds=tuple(self.kind),
            vector_weight=self.vector_weight,
            lexical_weight=self.lexical_weight,
            maxsim=self.maxsim,
            blocks=self.blocks,
            context=self.context,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class StatusConfig:
    """Which index `status` describes."""

    repo: Annotated[Positional[Path], arg(metavar="REPO")] = Path()
    """Repository, or any folder in it."""
    index: Path | None = None
    """Folder of the index, where `index --out` put it elsewhere."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeConfig:
    """How `serve` answers, and what it refuses."""

    repo: Annotated[Positional[Path], arg(metavar="REPO")] = Path()
    """Repository, or any folder in it, whose index is served."""
    index: Path | None = None
    """Folder of the index, where `index --out` put it elsewhere."""
    model: str | None = None
    """Load the index's model from here; it must be the same one."""
    transport: Literal["http", "stdio"] = "http"
    """HTTP on a port, or one JSON object a line on stdin and stdout."""
    host: str = "127.0.0.1"
    """Address to listen on."""
    port: int = 7531
    """Port to listen on; 0 takes a free one and prints it."""
    allow_remote: bool = False
    """Permit an address that other machines can reach. There is no login: anyone who can connect
    can read the indexed code."""
    allow_host: tuple[str, ...] = ()
    """Further names that clients may call this server by, behind a proxy for example."""
    max_body_bytes: int = 65_536
    """Largest request."""
    max_query_characters: int = 2_000
    """Longest query."""
    max_top_k: int = 100
    """Most hits in one answer."""
    max_requests: int = 8
    """Requests at a time, running and waiting; more are refused with 503."""
    max_connections: int = 64
    """Open connections; more are closed at once."""
    timeout_seconds: float = 10.0
    """For a client to send its request, and for a request to be answered."""

    def __post_init__(self) -> None:
        """Check what tyro cannot."""
        if not 0 <= self.port <= 65_535:
            raise ConfigError(f"port={self.port} must be from 0 to 65535")
        for name in (
            "max_body_bytes", "max_query_characters", "max_top_k", "max_requests", "max_connections"
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
        if not 0 < self.timeout_seconds <= 3600:
            raise ConfigError(
                f"timeout_seconds={self.timeout_seconds} must be above 0, at most 3600"
            )
