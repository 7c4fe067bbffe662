"""SeaModel: split outside, encode, aggregate. The file to read first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polyzoo.sea.aggregation import Aggregation, maxsim, soft_maxsim
from polyzoo.sea.config import SeaConfig
from polyzoo.sea.data import PairBatch
from polyzoo.sea.encoding.encoder import PackedEncoder
from polyzoo.sea.encoding.segments import inner_products


@dataclass(frozen=True)
class CodeVectors:
    """Vectors of f functions, and of the k entries they were made of."""

    vectors: Tensor
    """(f, d)."""
    entries: Tensor
    """(k, d), function after function; the truncated whole first where there is one."""
    starts: Tensor
    """(f + 1,) where each function's entries start."""
    weights: Tensor
    """(k,) share of each entry in its function's vector."""


@dataclass(frozen=True)
class PairVectors:
    """What a training batch becomes."""

    queries: Tensor
    """(n, d)."""
    codes: CodeVectors


class SeaModel(nn.Module):
    """An encoder shared by queries and blocks, and the aggregation of the blocks.

    Example:
        >>> model = SeaModel(PackedEncoder.from_folder("encoder", pooling="mean"), SeaConfig())
        >>> model.embed_queries([[101, 2175, 102]]).shape
        torch.Size([1, 384])
    """

    def __init__(self, encoder: PackedEncoder, config: SeaConfig) -> None:
        """Put the parts together; the aggregation starts as a mean."""
        super().__init__()
        self.config = config
        self.encoder = encoder
        self.aggregation = Aggregation(encoder.dim, kind=config.aggregator, raw=config.raw)
        self.aggregation.reset()

    @property
    def dim(self) -> int:
        """Channels of a vector."""
        return self.encoder.dim

    def forward(self, batch: PairBatch, *, recompute: bool = False) -> PairVectors:
        """Vectors of a training batch.

        Args:
            batch: Packed pairs.
            recompute: Trade time for memory: see `PackedEncoder.forward`.
        """
        vectors = self.encoder(batch.packed, recompute=recompute)[batch.place]
        return PairVectors(
            queries=self._scaled(vectors[: batch.n]),
            codes=self.aggregate(vectors[batch.n :], batch.starts),
        )

    def aggregate(self, entries: Tensor, starts: Tensor, raw: Tensor | None = None) -> CodeVectors:
        """From pooled entries (k, d) to one vector per function."""
        entries = self._scaled(entries)
        out = self.aggregation(entries, starts, raw)
        return CodeVectors(
            vectors=self._scaled(out.vectors), entries=entries, starts=starts, weights=out.weights
        )

    def scores(self, queries: Tensor, codes: CodeVectors) -> Tensor:
        """(n, f) similarity: inner products, or by entries with "maxsim" and "soft_maxsim"."""
        if self.config.aggregator == "maxsim":
            return maxsim(queries, codes.entries, codes.starts)
        if self.config.aggregator == "soft_maxsim":
            return soft_maxsim(
                queries,
                codes.entries,
                codes.starts,
                temperature=self.config.soft_temperature,
                discount=self.config.count_discount,
            )
        return inner_products(queries, codes.vectors)

    @torch.no_grad()
    def embed_queries(self, sequences: Sequence[Sequence[int] | np.ndarray]) -> Tensor:
        """(n, d) vectors of queries given as ids, special tokens included."""
        return self._scaled(self.encoder.encode(sequences))

    @torch.no_grad()
    def embed_codes(
        self, entries: Sequence[Sequence[int] | np.ndarray], starts: np.ndarray | Sequence[int]
    ) -> CodeVectors:
        """Vectors of functions given as ids of their entries, end to end."""
        where = torch.as_tensor(np.asarray(starts), device=self.encoder.device)
        return self.aggregate(self.encoder.encode(entries), where)

    def _scaled(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1) if self.config.normalize else x
