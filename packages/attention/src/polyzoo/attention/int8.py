"""The backend whose products of queries and keys are int8: for `precision="int8"` only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from polyzoo.attention.types import Call

HEAD_DIM_LIMIT = 128
FEATURES = frozenset({"causal", "kv_lens", "gqa", "dv_ne_d", "lse", "int8"})


def serves_head(d: int) -> bool:
    """Tell whether the kernels take a head size."""
    return 8 <= d <= HEAD_DIM_LIMIT and d % 8 == 0


def run(
    q: Tensor, k: Tensor, v: Tensor, kv_lens: Tensor | None, scale: float, right: int
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp; `right` is 0 for causal, else -1."""
    from polyzoo.attention.kernels.launch_int8 import forward as start
    from polyzoo.attention.kernels.problem import Problem

    return start(Problem(q=q, k=k, v=v, kv_lens=kv_lens, scale=scale, right=right))


def _fake(
    q: Tensor,
    k: Tensor,  # noqa: ARG001 - the signature of `run`
    v: Tensor,
    kv_lens: Tensor | None,  # noqa: ARG001
    scale: float,  # noqa: ARG001
    right: int,  # noqa: ARG001
) -> tuple[Tensor, Tensor]:
    b, h, n, _ = q.shape
    out = q.new_empty((b, n, h, v.shape[3])).transpose(1, 2)
    return out, q.new_empty((b, h, n), dtype=torch.float32)


attention_int8: Any = torch.library.custom_op("polyzoo::attention_int8", run, mutates_args=())
attention_int8.register_fake(_fake)


def forward(call: Call) -> tuple[Tensor, Tensor | None]:
    """Attend without gradients, with about three and a half times the error of bf16."""
    start = attention_int8 if torch.compiler.is_compiling() else run
    return start(call.q, call.k, call.v, call.kv_lens, call.scale, call.right)
