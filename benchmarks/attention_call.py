"""polyzoo.attention against torch's scaled_dot_product_attention, in turn in one process.

    python benchmarks/attention_call.py [--quick] [--device cuda] [--case NAME]

One JSON line per case. `ours_ms` and `peer_ms` are medians of alternating runs; `ratio` is peer /
ours, above 1 where ours is faster. `floor_ms` is the time of the necessary arithmetic (true
lengths, true head size) at the rate of a large matrix product measured in the same process. The
peer is what one writes without this package: torch's function, with a boolean mask where lengths
differ, or one call per sequence where a batch is packed.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from polyzoo.attention import CuSeqlens, attention

Function = Callable[[], Any]


@dataclass(frozen=True)
class Case:
    """Two ways to the same result."""

    name: str
    ours: Function
    peer: Function
    flops: float
    """Necessary floating point operations."""


def spread(*shape: int, dtype: torch.dtype, device: str, seed: int) -> Tensor:
    """A random `(b, h, n, d)` tensor whose heads lie inside, as a projection leaves them."""
    b, h, n, d = shape
    chance = torch.Generator().manual_seed(seed)
    return torch.randn(b, n, h, d, generator=chance).to(device, dtype).transpose(1, 2)


def lengths_like_code(count: int, longest: int) -> list[int]:
    """Normally distributed lengths with a mean of 150, as of the functions of a code corpus."""
    chance = torch.Generator().manual_seed(0)
    drawn = torch.randn(count, generator=chance) * 45 + 150
    return drawn.clamp(16, longest).long().tolist()


def trained(function: Callable[..., Tensor], leaves: Sequence[Tensor]) -> Function:
    """Forward and backward."""

    def run() -> list[Tensor]:
        out = function(*leaves)
        return [out, *torch.autograd.grad(out, leaves, torch.ones_like(out))]

    return run


def cases(device: str, quick: bool) -> list[Case]:
    half = torch.bfloat16 if device == "cuda" else torch.float32
    scale = 1 if device == "cuda" else 4  # a CPU gets smaller batches
    made: list[Case] = []

    def tensors(*shapes: tuple[int, ...], dtype: torch.dtype = half) -> list[Tensor]:
        return [
            spread(*shape, dtype=dtype, device=device, seed=i) for i, shape in enumerate(shapes)
        ]

    q, k, v = tensors(*[(1, 8, 4, 64)] * 3)
    made.append(
        Case(
            "overhead",
            lambda q=q, k=k, v=v: attention(q, k, v),
            lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q, k, v),
            4 * 8 * 4 * 4 * 64,
        )
    )
    n = 1024 if quick or device == "cpu" else 4096
    q, k, v = tensors(*[(2 if device == "cuda" else 1, 16, n, 72)] * 3)
    flops = 4 * q.shape[0] * 16 * n * n * 72
    made.append(
        Case(
            "dense d72",
            lambda q=q, k=k, v=v: attention(q, k, v),
            lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q, k, v),
            flops,
        )
    )
    leaves = [tensor.detach().requires_grad_() for tensor in (q, k, v)]
    made.append(
        Case(
            "dense d72 with gradients",
            trained(attention, leaves),
            trained(F.scaled_dot_product_attention, leaves),
            3.5 * flops,
        )
    )
    made += _ragged(device, half, 64 if quick else 256 // scale)
    made += _causal(device, half, quick)
    made += _decode(device, quick)
    return made


def _ragged(device: str, dtype: torch.dtype, count: int) -> list[Case]:
    lengths = lengths_like_code(count, 256)
    total, h, d = sum(lengths), 12, 64
    packed = [spread(1, h, total, d, dtype=dtype, device=device, seed=i) for i in range(3)]
    cu_seqlens = CuSeqlens.from_lengths(lengths, device=device)
    padded = [spread(count, h, 256, d, dtype=dtype, device=device, seed=i) for i in range(3)]
    kv_lens = torch.tensor(lengths, device=device)
    mask = (torch.arange(256, device=device) < kv_lens[:, None])[:, None, None]
    flops = 4 * h * d * sum(length * length for length in lengths)

    def one_by_one() -> Tensor:
        parts = zip(*(tensor.split(lengths, dim=2) for tensor in packed), strict=True)
        return torch.cat([F.scaled_dot_product_attention(*part) for part in parts], dim=2)

    def with_mask() -> Tensor:
        return F.scaled_dot_product_attention(*padded, attn_mask=mask)

    return [
        Case(
            "packed, mean length 150",
            lambda: attention(*packed, cu_seqlens=cu_seqlens),
            one_by_one,
            flops,
        ),
        Case(
            "padded to 256, kv_lens",
            lambda: attention(*padded, kv_lens=kv_lens),
            with_mask,
            4 * h * d * 256 * total,
        ),
    ]


def _causal(device: str, dtype: torch.dtype, quick: bool) -> list[Case]:
    n, m = (256, 1024) if quick else (512, 4096)
    q = spread(1, 8, n, 64, dtype=dtype, device=device, seed=0)
    k, v = (spread(1, 8, m, 64, dtype=dtype, device=device, seed=i) for i in (1, 2))
    lower = torch.ones(n, m, dtype=torch.bool, device=device).tril(m - n)
    window = 128
    both = lower & torch.ones_like(lower).triu(m - n - window)
    return [
        Case(
            "causal, further keys before",
            lambda: attention(q, k, v, causal=True),
            lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=lower),
            4 * 8 * 64 * float(lower.sum()),
        ),
        Case(
            "causal window of 128",
            lambda: attention(q, k, v, window=(window, 0)),
            lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=both),
            4 * 8 * 64 * float(both.sum()),
        ),
    ]


def _decode(device: str, quick: bool) -> list[Case]:
    m = 2048 if quick else 8192
    made = []
    for dtype in (torch.bfloat16, torch.float16):
        q = spread(1, 32, 1, 128, dtype=dtype, device=device, seed=0)
        k, v = (spread(1, 8, m, 128, dtype=dtype, device=device, seed=i) for i in (1, 2))
        made.append(
            Case(
                f"decode, grouped heads, {str(dtype).removeprefix('torch.')}",
                lambda q=q, k=k, v=v: attention(q, k, v, causal=True),
                lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
                4 * 32 * m * 128,
            )
        )
    return made


def measure(case: Case, device: str, seconds: float) -> tuple[float, float]:
    """Run both in turn; return their medians in milliseconds."""
    times: tuple[list[float], list[float]] = ([], [])
    repeat = 1
    for warm in (True, False):
        started = time.perf_counter()
        while time.perf_counter() - started < (seconds / 4 if warm else seconds) or (
            not warm and len(times[0]) < 5
        ):
            for function, kept in zip((case.ours, case.peer), times, strict=True):
                _wait(device)
                before = time.perf_counter()
                for _ in range(repeat):
                    function()
                _wait(device)
                kept.append((time.perf_counter() - before) / repeat * 1e3)
        if warm:
            repeat = max(1, int(1.0 / max(1e-3, min(times[0]))))
            times[0].clear()
            times[1].clear()
    return statistics.median(times[0]), statistics.median(times[1])


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def peak_flops(device: str, dtype: torch.dtype) -> float:
    """Rate of a large matrix product."""
    size = 8192 if device == "cuda" else 1024
    a = torch.randn(size, size, device=device).to(dtype)
    rates = []
    for _ in range(8):
        _wait(device)
        before = time.perf_counter()
        torch.mm(a, a)
        _wait(device)
        rates.append(2 * size**3 / (time.perf_counter() - before))
    return max(rates)


def same(ours: Any, peer: Any) -> float:
    """Largest difference of the results; packed and padded rows alike."""
    if isinstance(ours, Tensor):
        ours, peer = [ours], [peer]
    pairs = zip(ours, peer, strict=True)
    return max(float((a.detach().float() - b.detach().float()).abs().max()) for a, b in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="smaller shapes, shorter runs")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--case", help="only the cases whose name holds this")
    arguments = parser.parse_args()
    device = arguments.device
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    rate = peak_flops(device, dtype)
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or "cpu"
    for case in cases(device, arguments.quick):
        if arguments.case and arguments.case not in case.name:
            continue
        difference = same(case.ours(), case.peer())
        if difference > (5e-2 if dtype == torch.bfloat16 or "decode" in case.name else 1e-4):
            raise SystemExit(f"{case.name}: the results differ by {difference}")
        ours, peer = measure(case, device, 0.4 if arguments.quick else 3.0)
        line = {
            "case": case.name,
            "ours_ms": round(ours, 4),
            "peer_ms": round(peer, 4),
            "ratio": round(peer / ours, 3),
            "floor_ms": round(case.flops / rate * 1e3, 4),
            "largest_difference": difference,
            "device": name,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "python": platform.python_version(),
        }
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
