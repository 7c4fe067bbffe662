"""What the prepare, eval, embed and convert commands take. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from polyzoo.sea.config import Aggregator, Language, SeaConfig

Protocol = Literal["full", "graphcodebert", "csn1000", "released"]
Ties = Literal["pessimistic", "mean", "optimistic"]


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalConfig:
    """How well a model finds functions by their documentation."""

    data: Path
    """Queries and their functions: CodeSearchNet-format .jsonl or .jsonl.gz, or a prepared .npz."""
    codebase: Path | None = None
    """All candidates, which must include the queries' functions; without it, those are the pool."""
    model: str = "embedded"
    """embedded, minilm, a model folder, a hub id, or encoder:NAME for an untrained encoder."""
    protocol: Protocol = "full"
    """full: the whole pool, no cut-off. graphcodebert: ranks beyond 1000 count 0. csn1000: pools of
    1,000. released: the published procedure, which favours the answers; for comparison only."""
    ties: Ties = "pessimistic"
    """Where an answer stands among equal scores."""
    aggregator: Aggregator | None = None
    """Combine blocks differently than the model does; only in a way that needs no training."""
    keep_docstrings: bool = False
    """Leave docstrings in the functions; for data whose queries are not their docstrings."""
    baselines: bool = True
    """Also rank by TF-IDF and by the truncated function."""
    language: Language | None = None
    """Of records that do not say."""
    ranks: Path | None = None
    """Write every query's rank to this .jsonl file."""
    limit: int | None = None
    """Use only so many queries."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    dtype: str = "auto"
    """Of the encoder: auto, float32, bfloat16, float16."""
    cache: bool = True
    """Keep split files under the cache folder, and use them."""
    workers: int | None = None
    """Processes that split; one per core on large files by default."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PrepareConfig:
    """Tokenise and split a file once, to train or evaluate elsewhere."""

    data: Path
    """CodeSearchNet-format .jsonl or .jsonl.gz."""
    out: Path
    """The .npz file to write."""
    like: Literal["minilm", "minilm-single", "embedded", "paper"] = "minilm"
    """Preset whose encoder (for its tokenizer) and splitter are used."""
    model: SeaConfig | None = None
    """Another encoder and splitter than a preset's."""
    keep_docstrings: bool = False
    """Leave docstrings in the functions; for data whose queries are not their docstrings."""
    several_queries: bool = False
    """Several queries may have the same url (their id is unique); a codebase is evaluated apart."""
    unpaired: bool = False
    """Accept functions without documentation."""
    language: Language | None = None
    """Of records that do not say."""
    limit: int | None = None
    """Use only so many records."""
    workers: int | None = None
    """Processes; one per core on large files by default."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EmbedConfig:
    """Vectors of queries or functions."""

    data: Path | None = None
    """A .jsonl(.gz) file of records, or plain text with a query per line; stdin where not given."""
    out: Path | None = None
    """A .npy file; without it, JSON lines go to stdout."""
    kind: Literal["code", "query"] = "code"
    """What is embedded: the functions of the records, or their queries (plain text: its lines)."""
    model: str = "embedded"
    """embedded, minilm, a model folder, a hub id, or encoder:NAME."""
    language: Language | None = None
    """Of records that do not say."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    batch_size: int = 256
    """Records read at a time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ConvertConfig:
    """An official SEA checkpoint, or the CoSQA files, in this package's form."""

    what: Annotated[Literal["checkpoint", "cosqa"], tyro.conf.Positional]
    """checkpoint: an official model.best.bin. cosqa: the public retrieval files."""
    out: Path
    """Folder to write."""
    checkpoint: Path | None = None
    """checkpoint: the .bin file."""
    encoder: str | None = None
    """checkpoint: folder or hub id of the RoBERTa encoder it was trained from."""
    aggregator: Aggregator = "attn1_sum"
    """checkpoint: how it was trained; attn1_sum is one_layer with average."""
    codes: Path | None = None
    """cosqa: code_idx_map.txt."""
    queries: Path | None = None
    """cosqa: cosqa-retrieval-test-500.json or the dev file."""
