"""What an index asks of a model: vectors of code and of queries, and an identity. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from polyzoo.sea.config import SeaConfig
from polyzoo.sea.model_sources import BARE, model_folder
from polyzoo.sea.numpy_pipeline import NumpyPipeline
from polyzoo.sea.search.stores import Vectors


class CodeBlock(Protocol):
    """Where a block lies in its unit."""

    @property
    def first_line(self) -> int:
        """Counted from 0."""
        ...

    @property
    def last_line(self) -> int:
        """Counted from 0, inclusive."""
        ...


class CodeSplit(Protocol):
    """How one unit was split."""

    @property
    def blocks(self) -> Sequence[CodeBlock]:
        """In text order."""
        ...


class EmbeddedCode(Protocol):
    """What an embedder makes of some units."""

    @property
    def vectors(self) -> Vectors:
        """(k, dim), one per unit."""
        ...

    @property
    def block_vectors(self) -> Sequence[Vectors]:
        """(blocks of the unit, dim) per unit."""
        ...

    @property
    def entry_vectors(self) -> Sequence[Vectors]:
        """(entries of the unit, dim) per unit: its blocks, then what else the model compares."""
        ...

    @property
    def splits(self) -> Sequence[CodeSplit]:
        """One per unit."""
        ...


class Embedder(Protocol):
    """What turns code and queries into vectors; SeaPipeline is the one users meet."""

    @property
    def dim(self) -> int:
        """Channels of a vector."""
        ...

    @property
    def model_id(self) -> str:
        """Changes with anything that changes a vector."""
        ...

    @property
    def config(self) -> SeaConfig:
        """How units are split, pooled and aggregated."""
        ...

    def embed_code(self, codes: Sequence[str], *, language: str | Sequence[str]) -> EmbeddedCode:
        """Embed units; `language` is one for all, or one each."""
        ...

    def embed_queries(self, queries: Sequence[str]) -> Vectors:
        """Embed queries as (k, dim)."""
        ...


def load_embedder(name: str, *, bulk: bool = False) -> Embedder:
    """Load the model of that name or path.

    Args:
        name: As SeaPipeline takes it.
        bulk: For thousands of functions: half precision on a CPU that computes in it, whose vectors
            differ from float32's by less than 1e-4 of a cosine, in half the time.
    """
    from polyzoo.sea.pipeline import SeaPipeline  # torch: only where vectors are needed

    return SeaPipeline.from_pretrained(name, dtype=SeaPipeline.bulk_dtype() if bulk else None)


def load_light(name: str) -> Embedder | None:
    """Load the version without torch, for a few texts; None if this kind of model has none."""
    if name.startswith(BARE):
        return None
    return NumpyPipeline.load(model_folder(name))
