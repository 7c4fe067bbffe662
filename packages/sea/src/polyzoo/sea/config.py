"""Configurations of SEA: what is saved with the weights, and what the commands take. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from polyzoo.core.errors import ConfigError

Language = Literal["python", "java", "javascript", "go", "php", "ruby"]
Splitter = Literal["ast", "line", "token", "space"]
Pooling = Literal["cls", "mean", "pooler"]
Aggregator = Literal[
    "attn1",
    "attn2",
    "mean",
    "max",
    "attn1_mean",
    "attn2_mean",
    "attn1_sum",
    "attn2_sum",
    "first",
    "maxsim",
    "soft_maxsim",
]
Raw = Literal["mean", "max", "whole"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitConfig:
    """How source text becomes blocks."""

    kind: Splitter = "ast"
    """ast: at statement borders; line, token, space: windows of that many items."""
    profile: Literal["fair", "released"] = "fair"
    """fair loses nothing and counts encoder tokens; released repeats the published faults."""
    budget: int = 254
    """Encoder pieces a block may hold, without the special tokens."""
    whole_budget: int | None = None
    """Pieces of the truncated whole function, where it is an entry too; by default the budget."""
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
    signature_pieces: int = 32
    """Pieces of a repeated signature at most; its name and first arguments come first."""
    keep_comments: bool = False
    """Leave comments in block text."""
    keep_docstrings: bool = False
    """Leave docstrings in block text: never where the queries are docstrings, the answer leaks."""

    def __post_init__(self) -> None:
        """Check that no setting loses text."""
        for name in ("budget", "window", "step", "max_blocks", "signature_pieces"):
            _at_least(name, getattr(self, name), 1)
        for name in ("min_line", "overlap", "min_tokens"):
            _at_least(name, getattr(self, name), 0)
        if self.step > self.window:
            raise ConfigError(
                f"step={self.step} is larger than window={self.window}: the text between two "
                "windows would be lost; choose step from 1 to window"
            )
        if self.whole_budget is not None:
            _at_least("whole_budget", self.whole_budget, 1)
        if self.overlap >= self.budget:
            raise ConfigError(
                f"overlap={self.overlap} fills the whole budget={self.budget}: choose less"
            )

    @property
    def whole_pieces(self) -> int:
        """Pieces of the truncated whole function."""
        return self.budget if self.whole_budget is None else self.whole_budget

    @property
    def longest(self) -> int:
        """Pieces of the longest sequence that is encoded."""
        return max(self.budget, self.whole_pieces)


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterConfig:
    """A low-rank change of the encoder, stored instead of the encoder itself."""

    rank: int
    """Inner size of the two factors."""
    scale: float
    """Factor of the product of the two matrices when it is added to the encoder's weight."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SeaConfig:
    """Shape of a SEA model, saved beside its weights as config.json."""

    encoder: str = "minilm"
    """Folder, hub id, or asset name of the encoder; `self`: the folder beside this file."""
    pooling: Pooling = "mean"
    """How token states become one vector."""
    normalize: bool = True
    """Scale every vector to length 1."""
    split: SplitConfig = field(default_factory=SplitConfig)
    aggregator: Aggregator = "attn1_mean"
    """How block vectors become one vector per function; aggregation.py has the formulas."""
    raw: Raw = "mean"
    """What *_mean and *_sum add to the attention: mean or maximum of entries, or the whole."""
    include_whole: bool = True
    """Add the vector of the truncated whole function to the blocks."""
    head_pieces: int = 0
    """Add the vector of the function's first pieces alone, this many; 0 does not."""
    soft_temperature: float = 0.05
    """Of soft_maxsim: towards 0 the best entry alone counts, towards infinity all alike."""
    count_discount: float = 1.0
    """Of soft_maxsim: at 1 a function gains nothing by having many entries, at 0 it has as many
    chances as entries."""
    split_identifiers: bool = False
    """Cut identifiers at camelCase borders before tokenising; offsets still refer to the text."""
    max_query_tokens: int = 128
    """Encoder pieces of a query, special tokens included; the rest is cut and counted."""
    adapter: AdapterConfig | None = None
    """Set when model.safetensors holds a low-rank change of `encoder` and not the encoder."""
    tokenizer_sha256: str = ""
    """Fingerprint of the tokenizer this model was trained with; empty means unchecked."""

    @property
    def keeps_entries(self) -> bool:
        """Whether scores come from the entries, so that no single vector can stand for them."""
        return self.aggregator in ("maxsim", "soft_maxsim")

    @property
    def whole_entry(self) -> bool:
        """Whether functions of several blocks get the truncated whole as an entry."""
        return self.include_whole and self.aggregator != "maxsim"

    def __post_init__(self) -> None:
        """Check the relations between fields."""
        _at_least("max_query_tokens", self.max_query_tokens, 4)
        _at_least("head_pieces", self.head_pieces, 0)
        if not self.soft_temperature > 0:
            raise ConfigError(f"soft_temperature={self.soft_temperature} must be above 0")
        if not 0 <= self.count_discount <= 2:
            raise ConfigError(f"count_discount={self.count_discount} must be from 0 to 2")
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
