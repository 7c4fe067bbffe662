"""`polyzoo attention explain | backends | bench`. Torch-free until a command runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from polyzoo.core.cli import Command, CommandGroup


@dataclass(frozen=True, kw_only=True, slots=True)
class BackendsConfig:
    """Nothing to choose."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExplainConfig:
    """A call of `attention`, by its shapes."""

    q: str
    """Shape of the queries: batch, heads, length, channels, as in 2,16,4096,72."""
    k: str | None = None
    """Shape of the keys; that of the queries if left out."""
    v: str | None = None
    """Shape of the values; that of the keys if left out."""
    device: str = "cpu"
    """Where the call runs: cpu, cuda, or a GPU supposed to be here, as sm_75 (Turing)."""
    dtype: Literal["fp16", "bf16", "fp32", "fp64"] = "fp32"
    """Dtype of queries, keys and values."""
    causal: bool = False
    """See earlier keys only."""
    window: tuple[int, int] | None = None
    """Keys seen before and after the query; -1 is all."""
    kv_lens: bool = False
    """Batch items have their own numbers of keys."""
    packed: bool = False
    """The batch is packed: cu_seqlens; the lengths given are those of the longest sequence."""
    mask: bool = False
    """There is a boolean mask."""
    bias: bool = False
    """There is an additive bias."""
    relpos: str | None = None
    """Grid of a decomposed bias: rows, columns, as in 64,64."""
    dropout: float = 0.0
    """Probability of dropping."""
    lse: bool = False
    """The log-sum-exp is wanted."""
    backward: bool = False
    """Gradients are wanted."""
    precision: Literal["exact", "int8", "fp8"] = "exact"
    """Precision of the products."""
    backend: str = "auto"
    """Ask for one backend by name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchConfig:
    """Which calls to time, and how."""

    cases: str = "all"
    """Names with commas between, of image-self, image-text, vit, sam-global, encoder-padded,
    llm-train, llm-decode; on a CPU they are smaller."""
    q: str | None = None
    """A call of your own instead: shape of the queries, as in 2,16,4096,72."""
    k: str | None = None
    """Shape of its keys; that of the queries if left out."""
    causal: bool = False
    """Your call sees earlier keys only."""
    filled: float = 1.0
    """Mean share of valid keys in your call; below 1 it has kv_lens."""
    device: str = "auto"
    """Where; a GPU if there is one."""
    dtype: Literal["fp16", "bf16", "fp32"] | None = None
    """bf16 on a GPU, fp32 on a CPU if left out."""
    backward: bool = False
    """Time the gradients of queries, keys and values too."""
    seconds: float = 0.3
    """How long each backend is timed on each call."""

    def __post_init__(self) -> None:
        if not 0 < self.filled <= 1:
            raise ValueError(f"filled={self.filled} must be above 0 and at most 1")


GROUP = CommandGroup(
    summary="The attention every model shares: which backend serves what",
    commands={
        "explain": Command(
            summary="Say which backend serves a call, and why the others do not",
            config=ExplainConfig,
            run="polyzoo.attention.commands:explain_call",
            render="polyzoo.attention.commands:render_explanation",
        ),
        "backends": Command(
            summary="List the backends and what they offer",
            config=BackendsConfig,
            run="polyzoo.attention.commands:list_backends",
            render="polyzoo.attention.commands:render_backends",
        ),
        "bench": Command(
            summary="Time every backend that serves a call on this machine",
            config=BenchConfig,
            run="polyzoo.attention.bench:bench_calls",
            render="polyzoo.attention.bench:render_report",
        ),
    },
)
