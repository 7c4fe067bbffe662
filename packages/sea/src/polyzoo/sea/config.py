"""Configurations of SEA: what is saved with the weights, and what the commands take. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

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

    @property
    def whole_entry(self) -> bool:
        """Whether functions of several blocks get the truncated whole as an entry."""
        return self.include_whole and self.aggregator != "maxsim"

    def __post_init__(self) -> None:
        """Check the relations between fields."""
        _at_least("max_query_tokens", self.max_query_tokens, 4)
        if self.raw == "whole" and not self.include_whole:
            raise ConfigError(
                "raw='whole' needs include_whole=True: there is no whole-function vector to add"
            )
        if self.aggregator == "first" and not self.include_whole:
            raise ConfigError(
                "aggregator='first' is the truncated whole function: it needs include_whole=True"
            )


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ConfigError(f"{name}={value} is too small: the least allowed value is {least}")


@dataclass(frozen=True, kw_only=True, slots=True)
class StudentConfig:
    """Shape of a small encoder cut out of the teacher's."""

    vocab_size: int = 8192
    """Pieces to keep, the most frequent of the training files."""
    layers: tuple[int, ...] = (0, 2, 5)
    """Layers of the teacher to start from, in order; their number is the small one's."""
    max_positions: int = 256
    """Longest sequence, special tokens included."""

    def __post_init__(self) -> None:
        """Check sizes."""
        _at_least("vocab_size", self.vocab_size, 105)
        if not self.layers:
            raise ConfigError("layers=() names none: at least one layer is needed")


@dataclass(frozen=True, kw_only=True, slots=True)
class RandomEncoderConfig:
    """An untrained encoder with a vocabulary learnt from the training file: for tests and demos."""

    vocab_size: int = 1000
    """Most pieces."""
    layers: int = 2
    """Transformer layers."""
    hidden: int = 64
    """Channels, a multiple of 32; heads have 32 of them."""
    max_positions: int = 256
    """Longest sequence, special tokens included."""


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
    """Use another combination of the blocks than the model's; only for one that needs no training."""
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
    like: Literal["minilm", "embedded", "paper"] = "minilm"
    """Preset whose encoder (for its tokenizer) and splitter are used."""
    model: SeaConfig | None = None
    """Another encoder and splitter than a preset's."""
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
    """checkpoint: folder or hub id of the RoBERTa encoder it was trained from (config, tokenizer)."""
    aggregator: Aggregator = "attn1_sum"
    """checkpoint: how it was trained; attn1_sum is one_layer with average."""
    codes: Path | None = None
    """cosqa: code_idx_map.txt."""
    queries: Path | None = None
    """cosqa: cosqa-retrieval-test-500.json or the dev file."""
