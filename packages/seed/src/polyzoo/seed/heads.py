"""From decoded codes to the image generator's condition: SEED-2's mlp, or a reverse Q-Former."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from polyzoo.seed.config import HeadConfig, QFormerConfig
from polyzoo.seed.qformer import QFormer


class MlpHead(nn.Module):
    """Narrow every position, put all of them side by side, project: (b, n, d) to (b, dim)."""

    def __init__(self, width: int, *, tokens: int, config: HeadConfig) -> None:
        super().__init__()
        first, second, last = config.mlp
        self.down = nn.Sequential(
            nn.Linear(width, first, bias=False),
            nn.ReLU(),
            nn.Linear(first, second, bias=False),
            nn.ReLU(),
            nn.Linear(second, last, bias=False),
        )
        self.projection = nn.Linear(last * tokens, config.dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map (b, n, d) to (b, dim)."""
        return self.projection(self.down(x).flatten(1))


class ReverseHead(nn.Module):
    """Learned queries, free to see one another, look at the decoded codes.

    Gives (b, dim) for one query and (b, queries, dim) for more.
    """

    def __init__(self, width: int, *, heads: int, config: HeadConfig, norm_eps: float) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(1, config.queries, width) * 0.02)
        self.qformer = QFormer(
            QFormerConfig(
                width=width,
                layers=config.layers,
                heads=heads,
                ffn=config.ffn,
                dropout=0.0,
                norm_eps=norm_eps,
            ),
            context_width=width,
        )
        self.projection = nn.Linear(width, config.dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map (b, n, d) to the target's shape."""
        out = self.projection(self.states(x))
        return out[:, 0] if self.queries.shape[1] == 1 else out

    def states(self, x: Tensor) -> Tensor:
        """Return (b, queries, d): the queries behind the last layer."""
        return self.qformer(self.queries.expand(len(x), -1, -1), context=x, causal=False)
