"""`polyzoo attention explain | backends`. Torch-free until a command runs."""

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
    },
)
