"""torch's own check of our operators, in Triton's interpreter; prints the outcomes as JSON."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import torch
from torch import Tensor

from polyzoo.attention import operators


def draw(*shape: int, seed: int, grad: bool = True) -> Tensor:
    chance = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=chance).requires_grad_(grad)


def forward_arguments(*, grad: bool = True, **given: Any) -> tuple[Any, ...]:
    """A grouped call of 18 queries over 20 keys."""
    q, k, v = (draw(2, h, n, 16, seed=h, grad=grad) for h, n in ((2, 18), (1, 20), (1, 20)))
    names = ("bias", "rel_h", "rel_w", "mask", "kv_lens", "cu_q", "cu_k", "rng")
    optional = [given.get(name) for name in names]
    return (q, k, v, *optional, 0, 0, 0.25, -1, given.get("right", -1), 0.0, "triton", False)


def main() -> None:
    forward, backward = operators.attention_forward, operators.attention_backward
    lens = torch.tensor([5, 20], dtype=torch.int32)
    report: dict[str, dict[str, str]] = {}
    for name, arguments in {
        "bias": forward_arguments(bias=draw(1, 2, 18, 20, seed=3)),
        "causal lengths": forward_arguments(kv_lens=lens, right=0),
    }.items():
        report[f"forward, {name}"] = torch.library.opcheck(forward, arguments)
    arguments = forward_arguments(grad=False, kv_lens=lens, bias=draw(1, 2, 18, 20, seed=3))
    arguments = tuple(a.detach() if isinstance(a, Tensor) else a for a in arguments)
    out, lse, low = forward(*arguments)
    needs = (True, True, True)
    # It has no gradient of its own: differentiating twice is refused by the forward operator.
    report["backward"] = torch.library.opcheck(
        backward,
        (torch.ones_like(out), out, lse, low, *arguments[:-1], *needs),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )
    json.dump(report, sys.stdout)


if __name__ == "__main__":
    main()
