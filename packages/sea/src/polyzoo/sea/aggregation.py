"""Block vectors to one vector per function: the published variants and ours, segment-wise.

The entries of all functions lie end to end, each function a segment; softmax and sums work per
segment, so there is no loop over functions and no padding to a common block count.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from polyzoo.core.errors import ConfigError
from polyzoo.sea.config import Aggregator, Raw
from polyzoo.sea.encoding.segments import (
    inner_products,
    segment_ids,
    segment_max,
    segment_mean,
    segment_softmax,
    segment_sum,
)

_HIDDEN = 128  # fixed in the published two-layer score


@dataclass(frozen=True)
class Aggregated:
    """One vector per function, and how much each entry counted."""

    vectors: Tensor
    """(f, d)."""
    weights: Tensor
    """(k,) share of each entry in its function; sums to 1 (to 2 for the *_sum formula)."""


class Aggregation(nn.Module):
    """Weigh the entries of each function and add them up.

    Example:
        >>> aggregation = Aggregation(384, kind="attn1_mean")
        >>> aggregation(torch.rand(5, 384), torch.tensor([0, 2, 5])).vectors.shape
        torch.Size([2, 384])
    """

    def __init__(
        self, dim: int, *, kind: Aggregator, raw: Raw = "mean", multiply: bool = False
    ) -> None:
        """Build the scoring layers the kind needs.

        Args:
            dim: Channels of an entry.
            kind: How entries become one vector; "maxsim" and "soft_maxsim" have no single vector
                (see the functions of these names) and give the mean here.
            raw: What *_mean and *_sum add to the attention.
            multiply: Multiply every entry by the raw vector first (published option, never used).
        """
        super().__init__()
        self.kind: Aggregator = kind
        self.raw: Raw = raw
        self.multiply = multiply
        self.score: nn.Sequential | None = None
        if kind.startswith("attn1"):
            self.score = nn.Sequential(nn.Linear(dim, 1))
        elif kind.startswith("attn2"):
            self.score = nn.Sequential(nn.Linear(dim, _HIDDEN), nn.Tanh(), nn.Linear(_HIDDEN, 1))
        if kind.endswith("_sum"):
            # The published scalar: stored, never trained.
            self.register_buffer("raw_weight", torch.ones(1, 1))

    @torch.no_grad()
    def reset(self) -> None:
        """Start from equal weights: the first step then is mean pooling, known to work."""
        if self.score is not None:
            last = self.score[-1]
            assert isinstance(last, nn.Linear)  # noqa: S101 - our own promise
            last.weight.zero_()
            last.bias.zero_()

    def forward(self, x: Tensor, starts: Tensor, raw: Tensor | None = None) -> Aggregated:
        """Aggregate the entries of every function.

        Args:
            x: (k, d) entries, function after function.
            starts: (f + 1,) where each function's entries start; none may be empty.
            raw: (f, d) given raw vectors in place of the configured ones.
        """
        count = starts.shape[0] - 1
        owner = segment_ids(starts, x.shape[0])
        lengths = (starts[1:] - starts[:-1]).to(x.dtype)
        equal = (1 / lengths)[owner]
        if self.kind in ("mean", "maxsim", "soft_maxsim"):
            return Aggregated(segment_mean(x, starts, owner), equal)
        if self.kind == "max":
            return Aggregated(segment_max(x, owner, count), equal)
        first = starts[:-1].long()
        if self.kind == "first":
            weights = torch.zeros_like(equal).index_fill(0, first, 1.0)
            return Aggregated(x[first], weights)

        if raw is None:
            raw = {
                "mean": lambda: segment_mean(x, starts, owner),
                "max": lambda: segment_max(x, owner, count),
                "whole": lambda: x[first],
            }[self.raw]()
        if self.multiply:
            x = x * raw[owner]
        assert self.score is not None  # noqa: S101 - our own promise
        # Weights in float32: half precision loses small differences between blocks.
        with torch.autocast(x.device.type, enabled=False):
            scores = self.score(x.to(self._dtype))[:, 0].float()
        share = segment_softmax(scores, owner, count)
        attended = segment_sum(share[:, None].to(x.dtype) * x, owner, count)
        if self.kind.endswith("_mean"):
            return Aggregated((attended + raw) / 2, self._half(share, equal, first))
        if self.kind.endswith("_sum"):
            assert isinstance(self.raw_weight, Tensor)  # noqa: S101 - our own promise
            factor = self.raw_weight.reshape(())
            vectors = attended / 2 + lengths[:, None] * factor * raw / 2
            return Aggregated(vectors, share + factor * equal)
        return Aggregated(attended, share)

    @property
    def _dtype(self) -> torch.dtype:
        # The encoder's dtype may differ from ours: adapters keep frozen weights in half precision.
        return next(self.parameters()).dtype

    def _half(self, share: Tensor, equal: Tensor, first: Tensor) -> Tensor:
        if self.raw == "whole":
            return (share / 2).index_add(0, first, share.new_full(first.shape, 0.5))
        return (share + equal) / 2  # for a maximum, no share is exact: it is spread evenly


def maxsim(queries: Tensor, x: Tensor, starts: Tensor) -> Tensor:
    """(q, f) scores: the best entry of each function for each query."""
    owner = segment_ids(starts, x.shape[0])
    return segment_max(inner_products(x, queries), owner, starts.shape[0] - 1).T


def soft_maxsim(
    queries: Tensor, x: Tensor, starts: Tensor, *, temperature: float, discount: float = 1.0
) -> Tensor:
    """(q, f) scores: a smooth maximum over the entries of each function.

    t log sum_i exp(s_i / t) - discount * t log n over the similarities s_i of n entries. At
    discount 1 it is the mean in the space of exponentials: a function whose entries are all alike
    scores as if it had one, so many entries are no advantage by themselves.

    Args:
        queries: (q, d).
        x: (k, d) entries, function after function.
        starts: (f + 1,) where each function's entries start.
        temperature: t.
        discount: How much of the logarithm of the number of entries is taken off.
    """
    count = starts.shape[0] - 1
    owner = segment_ids(starts, x.shape[0])
    scores = inner_products(x, queries) / temperature
    top = segment_max(scores.detach(), owner, count)
    total = segment_sum((scores - top[owner]).exp(), owner, count)
    lengths = (starts[1:] - starts[:-1]).to(scores.dtype)
    return (temperature * (top + total.log() - discount * lengths.log()[:, None])).T


def released_kind(common_type: str, *, with_ave: bool) -> tuple[Aggregator, Raw]:
    """Name here of a published `common_type` and its `with_ave` flag."""
    if common_type == "meanpooling":
        return "mean", "mean"
    if common_type == "maxpooling":
        return "max", "mean"
    base, _, extra = common_type.partition("+")
    if base not in ("one_layer", "two_layer") or extra not in ("", "maxpooling"):
        raise ConfigError(
            f"common_type={common_type!r} is unknown: one_layer, two_layer (each also with "
            "+maxpooling), meanpooling, maxpooling"
        )
    raw: Raw = "max" if extra else "mean"
    if base == "one_layer":
        return ("attn1_sum" if with_ave else "attn1"), raw
    return ("attn2_sum" if with_ave else "attn2"), raw
