"""torch's own check of our operators, and what calls keep alive, in Triton's interpreter."""

from __future__ import annotations

import gc
import json
import os
import sys
import weakref
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import torch
from torch import Tensor

from polyzoo.attention import operators, triton
from polyzoo.attention.types import Call


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
    arguments = forward_arguments(bias=draw(1, 2, 18, 20, seed=3), kv_lens=lens, right=0)
    report["forward"] = torch.library.opcheck(forward, arguments)
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
    json.dump({"operators": report, "kept": kept_tensors()}, sys.stdout)


def kept_tensors() -> list[str]:
    """Inputs that a call keeps alive after it, until Python would collect cycles."""
    kept: list[str] = []
    gc.collect()
    gc.disable()
    for name, n, m, grad in (
        ("forward", 18, 40, False),
        ("few keys", 18, 8, False),
        ("decoding", 1, 40, False),
        ("training", 18, 40, True),
    ):
        tensors = [draw(1, 2, length, 16, seed=1, grad=grad) for length in (n, m, m)]
        nothing = (None,) * 3
        call = Call(*tensors, -1, -1, *nothing, None, 0.25, 0.0, None, True, True)
        out, lse = triton.forward(call)
        if grad:
            out.sum().backward()
        alive = [weakref.ref(tensor) for tensor in tensors]
        del out, lse, call, tensors
        kept += [name for reference in alive if reference() is not None]
    gc.enable()
    return kept


if __name__ == "__main__":
    main()
